// The backward pass of the memory read by Intel's matrix engine, from the saved log-sum-exp.
//
// The maths are those of cpu/memory_read_backward.cpp: with G = grad_out, weights W = 2^(score - lse) and
// delta = sum over channels of out * G - grad_lse, dS = W (V^T G - delta). Five products of pieces:
//   scores[p][m] = Q K       products[p][m] = G V         (A: rows of queries, B: columns of positions)
//   dV[c][m] += G W          dK[c][m] += Q dS             (A: rows of channels, B: columns of positions)
//   dQ[p][c] += dS K                                      (A: rows of queries, B: columns of channels)
// Scores and products meet in registers, lanes are positions: pairs of rows become B panels of W and dS (k
// runs over queries), single rows the A panel of dS (k runs over positions). Nothing is transposed but Q, K
// and G at packing, once in each of two forms, and the small dQ at the end; gradients of values and keys
// leave the tiles as rows of M.
//
// Blocks of memory positions outside, packed once; chunks of queries inside, in two steps. (1) Every group of
// 32 queries makes its columns of W and dS, which are kept for the chunk, and adds to its sums of dQ; where
// the values have many channels their products are summed over parts of them, each of which stays in the
// second-level cache. (2) Every pair of channel panels reduces W and dS, a slice of the chunk at a time, to
// sums of dV and dK that stay in that cache and are written once; where W takes more than kChunkBytes, a
// range of pairs shares a slice of it. Each sum takes its terms in a fixed order, so the result does not
// depend on the number of threads. Queries and G, packed, stream from the third-level cache once a block;
// where they would take more than kPackedBytes they are packed anew.
//
// Weights of a saved log-sum-exp have its rounding as an error, which the softmax of plain PyTorch does not
// have; so that nothing is added to it, factors and constants of the scores are sums of two float32.
//
// Floor: 4 (C + O Cv) + 2 C operations per pair of query and position, times the products of their pieces,
// at the engine's rate. Bytes per pair through the third-level cache, of pieces of 2 bytes: 4 (C + O Cv) /
// kPositions, and 8 of W and dS. More than 800 lines: both steps share the layouts of the packed panels.
#if defined(VOSOPS_AMX)

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/checks.h"
#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/memory_amx.h"
#include "cpu/memory_read_backward.h"
#include "cpu/memory_scores.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace vosops::cpu::amx {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPackedBytes = 14 << 20;  // of queries and their gradients, in all forms
constexpr int64_t kPositions = 256;         // of a block
// Of 32 channels of values that a block's products are summed over at a time: all, up to the first; of more,
// in bfloat16, so few that a group's queries stay in the first-level cache.
constexpr int64_t kPartSteps = 16, kShortPartSteps = 8;
constexpr int64_t kRangePairs = 20;            // of channel panels whose sums are in the second-level cache
constexpr int64_t kChunkBytes = 1 << 20;       // of a chunk's weights that are in the second-level cache
constexpr int64_t kChunkNumbers = 256 * 2048;  // of the weights of a block that are kept at a time

// The greatest |dS| of a query is 0 or between these: then what the pieces of smaller ones lose is nothing
// beside it.
constexpr float kLeastSlope = 0x1p-90f, kMostSlope = 0x1p100f;
constexpr float kLeastFactor = 0x1p-10f, kMostFactor = 0x1p20f;

Counter served("memory_read_backward"), outside_pieces("memory_read_backward_outside");

// Vectors and elements exchanged.
StridedMatrix exchanged(StridedMatrix matrix, int64_t first, int64_t count) {
  matrix.data = static_cast<const char*>(matrix.data) +
                first * matrix.pixel_stride * (matrix.dtype == ScalarType::Float ? 4 : 2);
  std::swap(matrix.channel_stride, matrix.pixel_stride);
  matrix.channels = count;
  return matrix;
}

// Splits a row of an A panel, 32 numbers, at `to` and kTile after it for every further piece.
template <int kPieces>
[[gnu::always_inline]] inline void split_row(Reg low, Reg high, uint16_t* to) {
  typedef uint16_t Half16 __attribute__((vector_size(32)));
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i, to += kTile) {
    const Bits row = round_in_order(low, high);
    std::memcpy(to, &row, sizeof row);
    if (i + 1 == kPieces) break;
    Half16 halves[2];
    std::memcpy(halves, &row, sizeof row);
    low -= (Reg)(__builtin_convertvector(halves[0], Bits) << 16);
    high -= (Reg)(__builtin_convertvector(halves[1], Bits) << 16);
  }
}

template <int kPieces>
[[gnu::always_inline]] inline void store_pairs(Reg low, Reg high, uint16_t* to) {
  Bits pieces[kPieces];
  split_pairs<kPieces>(low, high, pieces);
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i) std::memcpy(to + i * kTile, &pieces[i], sizeof pieces[i]);
}

// Writes the first `count` of 32 numbers.
template <class S>
[[gnu::always_inline]] inline void store_both(S* to, Reg low, Reg high, int64_t count) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (count >= kGroup) {
      const Bits rounded = round_in_order(low, high);
      std::memcpy(to, &rounded, sizeof rounded);
      return;
    }
  }
  store_first(to, low, count);
  if (count > kRows) store_first(to + kRows, high, count - kRows);
}

inline Reg magnitude(Reg x) {
  return (Reg)((Bits)x & 0x7fffffffu);
}
// Of magnitudes; NaN is the greatest.
inline Reg greater_of(Reg a, Reg b) {
  return (Reg)((Bits)a > (Bits)b ? (Bits)a : (Bits)b);
}
inline float sum_of(Reg x) {
  float sum = 0;
  for (int i = 0; i < kRows; ++i) sum += x[i];
  return sum;
}

// A number as the sum of two float32.
struct Exact {
  float high, low;
  explicit Exact(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - high)) {
    if (!std::isfinite(high)) low = 0;
  }
};

// One batch element. kScores and kValues: pieces of what makes the scores, and of what makes the gradients.
template <int kScores, int kValues>
class BackwardElement {
  static constexpr int kDegree = kValues == 1 ? 3 : 6;
  static constexpr bool kExact = kValues > 1;  // what is rounded to float32 once is added to the scores
  static constexpr int64_t kMostGroups = kValues == 1 ? 9 : 4;  // of 32 queries, of a slice
  static constexpr int64_t kPanelStep = kValues * kTile;        // bfloat16 of a step of a panel

 public:
  BackwardElement(const ReadBackward& read, int64_t n, ReadGradients& gradients)
      : read_(read),
        in_(read.in),
        n_(n),
        queries_(in_.queries()),
        positions_(in_.memory()),
        span_(read_span<float>(in_, n)),
        objects_(read.value.size(1)),
        channels_(read.value.size(2)),
        parts_(in_.squares() ? 2 : 1),
        part_panels_(panels_of(in_.key.size(1), kRows)),
        object_panels_(panels_of(channels_, kRows)),
        key_pairs_(panels_of(parts_ * part_panels_, 2)),
        value_pairs_(panels_of(objects_ * object_panels_, 2)),
        object_steps_(panels_of(channels_, kStep)),
        value_panel_(objects_ * object_steps_ * kPanelStep),
        groups_(panels_of(queries_, kGroup)),
        slices_(panels_of(groups_, kMostGroups)),
        slice_groups_(panels_of(groups_, std::max<int64_t>(slices_, 1))),
        slice_(slice_groups_ * kGroup),
        steps_(objects_ * object_steps_),
        part_steps_(kValues == 1 && steps_ > kPartSteps ? kShortPartSteps : kPartSteps),
        parts_of_steps_(panels_of(steps_, part_steps_)),
        block_(block_positions()),
        chunk_slices_(std::clamp<int64_t>(kChunkNumbers / (block_ * slice_), 1, slices_)),
        chunk_groups_(chunk_slices_ * slice_groups_),
        by_pair_(chunk_slices_ * block_ * slice_ * kValues * 2 <= kChunkBytes),
        kept_(slices_ * slice_size() * 2 <= kPackedBytes),
        gradients_(gradients),
        query_rows_(in_, n, kept_ ? groups_ : chunk_groups_),
        forms_((kept_ ? slices_ : chunk_slices_) * forms_size()),
        keys_(in_, n, block_),
        values_(block_ / kRows * std::min(steps_, part_steps_) * kPanelStep),
        key_channels_(2 * key_pairs_ * block_ / kStep * kPanelStep),
        weights_(chunk_slices_ * block_ * slice_ * kValues),
        slopes_(chunk_slices_ * block_ * slice_ * kValues),
        products_(parts_of_steps_ > 1 ? chunk_groups_ * block_ * kGroup : 0),
        value_sums_(holds_value_sums() ? 2 * value_pairs_ * kRows * block_ : 0),
        key_sums_(2 * key_pairs_ * kRows * block_),
        query_sums_(groups_ * key_pairs_ * 4 * kSums),
        lse_(groups_ * kGroup),
        lse_low_(groups_ * kGroup),
        factor_low_(block_),
        shrinkage_low_(block_),
        shift_low_(block_),
        delta_(groups_ * kGroup),
        most_(groups_ * kGroup),
        bias_sums_(groups_ * kGroup),
        slope_sums_(chunk_groups_ * block_),
        biased_sums_(chunk_groups_ * block_),
        total_(block_),
        biased_(block_),
        read_position_(block_) {}

  // False if a number was out of range.
  bool run() {
    start();
    if (kept_) pack_queries(0, slices_);
    gradients_.clear_outside(n_, span_);
    for (int64_t begin = span_.begin; begin < span_.end; begin += block_) {
      keys_.start(begin, std::min(block_, span_.end - begin));
      pack_keys();
      std::fill_n(total_.data(), block_, 0.f);
      std::fill_n(biased_.data(), block_, 0.f);
      for (first_slice_ = 0; first_slice_ < slices_; first_slice_ = last_slice_) {
        last_slice_ = std::min(first_slice_ + chunk_slices_, slices_);
        if (!kept_) pack_queries(first_slice_, last_slice_);
        for (int64_t part = 0; part < parts_of_steps_; ++part) {
          if (parts_of_steps_ > 1 || first_slice_ == 0) pack_values(part);
          if (outside_.found()) return false;
          multiply_part(part);
        }
        reduce_chunk();
      }
      write_keys();
    }
    if (!slopes_in_range()) return false;
    write_query();
    return true;
  }

 private:
  // ---- Sizes

  int64_t block_positions() const { return std::min(kPositions, panels_of(span_.size(), kGroup) * kGroup); }
  int64_t groups_in(int64_t slice) const { return std::min(slice_groups_, groups_ - slice * slice_groups_); }
  // bfloat16 of a slice: G as rows of queries, G and Q as rows of channels.
  int64_t rows_size() const { return slice_ / kRows * value_panel_; }
  int64_t pair_size() const { return 2 * slice_groups_ * kPanelStep; }
  int64_t forms_size() const { return rows_size() + (value_pairs_ + key_pairs_) * pair_size(); }
  int64_t slice_size() const { return forms_size() + slice_ / kRows * score_panel(in_, kScores); }

  uint16_t* forms(int64_t slice) {
    return forms_.data() + (kept_ ? slice : slice - first_slice_) * forms_size();
  }
  // Two panels of channels, values before keys, of so many queries.
  uint16_t* channel_pair(int64_t slice, int64_t pair) {
    return forms(slice) + rows_size() + pair * pair_size();
  }
  // Where the weights, or slopes, of a slice begin: (panel of positions, group of the slice).
  int64_t weights_at(int64_t slice) const { return (slice - first_slice_) * block_ * slice_ * kValues; }
  int64_t first_group() const { return first_slice_ * slice_groups_; }

  // ---- Packing

  // delta, lse in powers of two, +inf where nothing was read, and sums of 0.
  void start() {
    using E = FloatElement<Lanes>;
    parallel_tasks(groups_ * 2, [&] {
      return [&, grads = Workspace<float>(channels_ * kRows),
              outs = Workspace<float>(channels_ * kRows)](int64_t panel) mutable {
        const int64_t first = panel * kRows, count = std::clamp<int64_t>(queries_ - first, 0, kRows);
        const OptionalRow<float> grad_lse(read_.grad_lse, n_, 0.f), lse(read_.lse, n_, 0.f);
        Reg delta{};
        for (int64_t o = 0; o < objects_ && count > 0; ++o) {
          const StridedMatrix grad = values_of(read_.grad_out, o), out = values_of(read_.out, o);
          if (grad.pixel_stride == 1 && out.pixel_stride == 1 && grad.dtype == out.dtype) {
            delta = add_channels(grad, out, first, count, delta);
            continue;
          }
          pack_pixels<E, kRows>(grad, first, count, grads.data());
          pack_pixels<E, kRows>(out, first, count, outs.data());
          for (int64_t c = 0; c < channels_; ++c)
            delta = Lanes::fma(Lanes::load(grads.data() + c * kRows), Lanes::load(outs.data() + c * kRows),
                               delta);
        }
        for (int64_t i = 0; i < kRows; ++i) {
          const bool reads = i < count && lse[first + i] != -kInfinity;
          const Exact exact(reads ? lse[first + i] * kLog2E : kInfinity);
          lse_[first + i] = exact.high, lse_low_[first + i] = exact.low;
          delta_[first + i] = i < count ? delta[i] - grad_lse[first + i] : 0.f;
          most_[first + i] = bias_sums_[first + i] = 0.f;
        }
      };
    });
  }

  // Adds the products of two matrices with adjacent pixels over the channels, of up to 16 pixels, one channel
  // after the other as for any other layout.
  static Reg add_channels(const StridedMatrix& a, const StridedMatrix& b, int64_t first, int64_t count,
                          Reg sum) {
    const uint32_t lanes = count >= kRows ? 0xffffu : (1u << count) - 1;
    dispatch_floating(a.dtype, [&]<class S>(S) {
      if constexpr (!std::is_same_v<S, double>) {
        const S* of_a = static_cast<const S*>(a.data) + first;
        const S* of_b = static_cast<const S*>(b.data) + first;
        for (int64_t c = 0; c < a.channels; ++c)
          sum = Lanes::fma(load_some(of_a + c * a.channel_stride, lanes),
                           load_some(of_b + c * b.channel_stride, lanes), sum);
      }
    });
    return sum;
  }

  // The channels and pixels of one object of (N, O, C, pixels).
  StridedMatrix values_of(const Tensor& tensor, int64_t object) const {
    return StridedMatrix::of(tensor, n_ * tensor.stride(0) + object * tensor.stride(1));
  }

  // Packs 16 channels of the values' side (panel < 2 value_pairs_) or of the keys' side as vectors, over
  // pixels [first, first + count); nothing where there are no such channels.
  template <bool kB>
  void pack_channels(const Tensor& tensor, bool value, int64_t panel, int64_t first, int64_t count,
                     int64_t steps, uint16_t* to, Extent& extent, const bool* keep = nullptr) const {
    const int64_t in_part = value ? object_panels_ : part_panels_, part = panel / in_part;
    const int64_t channels = value ? channels_ : in_.key.size(1);
    if (part >= (value ? objects_ : parts_)) {
      std::fill_n(to, steps * kPanelStep, uint16_t{0});
      return;
    }
    const int64_t offset = value ? part * tensor.stride(1) : part * channels * tensor.stride(1);
    const StridedMatrix matrix = StridedMatrix::of(tensor, n_ * tensor.stride(0) + offset);
    const int64_t channel = panel % in_part * kRows;
    amx::pack_panel<kValues, kB>(exchanged(matrix, first, count), channel,
                                 std::min<int64_t>(kRows, channels - channel), steps, to, extent, 1.f,
                                 0xffffu, keep);
  }

  // Packs the queries and G of slices [first, last) in all their forms.
  void pack_queries(int64_t first, int64_t last) {
    const int64_t from = first * slice_,
                  groups = std::min(last * slice_groups_, groups_) - first * slice_groups_;
    query_rows_.start(from, std::min(last * slice_, queries_) - from);
    pack_each(groups, outside_, [&](int64_t i, Extent& extent) { query_rows_.pack(i, extent); });
    pack_each(2 * groups, outside_, [&](int64_t i, Extent& extent) {
      const int64_t query = from + i * kRows, used = std::clamp<int64_t>(queries_ - query, 0, kRows);
      uint16_t* to = forms(first + i / (2 * slice_groups_)) + i % (2 * slice_groups_) * value_panel_;
      pack_steps<false>(read_.grad_out, query, used, 0, steps_, 0xffffu, to, extent);
    });
    const int64_t value_panels = 2 * value_pairs_, panels = value_panels + 2 * key_pairs_;
    pack_each((last - first) * panels, outside_, [&](int64_t i, Extent& extent) {
      const int64_t slice = first + i / panels, panel = i % panels, steps = groups_in(slice);
      const int64_t query = slice * slice_, count = std::min(slice_, queries_ - query);
      const bool value = panel < value_panels;
      pack_channels<false>(value ? read_.grad_out : in_.query, value, value ? panel : panel - value_panels,
                           query, count, steps,
                           channel_pair(slice, panel / 2) + panel % 2 * steps * kPanelStep, extent);
    });
  }

  // Packs the channels of steps [first, last) of all objects of pixels [pixel, pixel + count) as elements.
  template <bool kB>
  void pack_steps(const Tensor& tensor, int64_t pixel, int64_t count, int64_t first, int64_t last,
                  uint32_t pixels, uint16_t* to, Extent& extent) const {
    for (int64_t step = first; step < last;) {
      const int64_t object = step / object_steps_, in_object = step % object_steps_;
      const int64_t steps = std::min(object_steps_ - in_object, last - step);
      StridedMatrix matrix = values_of(tensor, object);
      matrix.data = static_cast<const char*>(matrix.data) +
                    in_object * kStep * matrix.channel_stride * tensor.element_size();
      matrix.channels -= in_object * kStep;
      amx::pack_panel<kValues, kB>(matrix, pixel, count, steps, to, extent, 1.f, pixels);
      to += steps * kPanelStep;
      step += steps;
    }
  }

  // The block's keys in both forms.
  void pack_keys() {
    pack_each(keys_.panels(), outside_, [&](int64_t i, Extent& extent) {
      keys_.pack(i, extent);
      const OptionalRow<float> shrinkages(in_.shrinkage, n_, 1.f), biases(in_.key_bias, n_, 0.f);
      for (int64_t m = i * kRows; m < (i + 1) * kRows; ++m) {
        read_position_[m] = keys_.shift[m] != -kInfinity;
        const double unit = read_position_[m] ? shrinkages[keys_.begin + m] * kLog2E : 0;
        const Exact shrinkage(unit), product(unit * in_.scale);
        const Exact shift(read_position_[m] ? biases[keys_.begin + m] * kLog2E : -kInfinity);
        keys_.shrinkage[m] = shrinkage.high, shrinkage_low_[m] = shrinkage.low;
        keys_.factor[m] = product.high, factor_low_[m] = product.low;
        keys_.shift[m] = shift.high, shift_low_[m] = shift.low;
        const float factor = std::abs(keys_.factor[m]);
        if (kValues > 1 && factor != 0.f && !(factor >= kLeastFactor && factor <= kMostFactor))
          extent.see(Lanes::set1(kInfinity));
      }
    });
    const int64_t steps = panels_of(keys_.count, kStep);
    pack_each(2 * key_pairs_, outside_, [&](int64_t i, Extent& extent) {
      uint16_t* to = key_channels_.data() + i * steps * kPanelStep;
      if (i >= part_panels_ && i < parts_ * part_panels_)
        return pack_squared_channels((i - part_panels_) * kRows, steps, to, extent);
      pack_channels<true>(in_.key, false, i, keys_.begin, keys_.count, steps, to, extent,
                          read_position_.data());
    });
  }

  // Steps of the values that are multiplied together.
  int64_t first_step(int64_t part) const { return part * part_steps_; }
  int64_t steps_in(int64_t part) const { return std::min(part_steps_, steps_ - part * part_steps_); }

  void pack_values(int64_t part) {
    const int64_t steps = steps_in(part);
    pack_each(keys_.panels(), outside_, [&](int64_t i, Extent& extent) {
      const int64_t first = i * kRows, used = std::clamp<int64_t>(keys_.count - first, 0, kRows);
      uint32_t read = 0;
      for (int64_t j = 0; j < kRows; ++j) read |= static_cast<uint32_t>(read_position_[first + j]) << j;
      pack_steps<true>(read_.value, keys_.begin + first, used, first_step(part), first_step(part) + steps,
                       read, values_.data() + i * steps * kPanelStep, extent);
    });
  }

  // The squares of 16 channels of the block's keys as vectors.
  void pack_squared_channels(int64_t channel, int64_t steps, uint16_t* to, Extent& extent) const {
    const StridedMatrix key = StridedMatrix::of(in_.key, n_ * in_.key.stride(0));
    alignas(64) float squares[kStep * kRows];
    dispatch_floating(key.dtype, [&]<class S>(S) {
      const S* from = static_cast<const S*>(key.data) + keys_.begin * key.pixel_stride;
      for (int64_t s = 0; s < steps; ++s, to += kPanelStep) {
        for (int64_t j = 0; j < kRows; ++j) {
          for (int64_t m = s * kStep; m < (s + 1) * kStep; ++m) {
            const bool used = m < keys_.count && channel + j < key.channels && read_position_.data()[m];
            const float x = used ? static_cast<float>(
                                       widen(from[m * key.pixel_stride + (channel + j) * key.channel_stride]))
                                 : 0.f;
            squares[j * kStep + m % kStep] = x * x;
          }
        }
        pack_tile<kValues, true, true>(squares, kStep, 0xffffu, ~0u, 1.f, to, extent);
      }
    });
  }

  // ---- Gradients

  // Adds the products of a part of the values with the chunk's queries; after the last part makes their W and
  // dS.
  void multiply_part(int64_t part) {
    const int64_t groups = std::min(last_slice_ * slice_groups_, groups_) - first_group();
    if (part + 1 < parts_of_steps_) {
      parallel_tasks(groups, [&] {
        return [&, region = Region()](int64_t i) mutable { add_products(part, first_group() + i); };
      });
      return;
    }
    parallel_tasks(groups, [&] {
      return [&, panels = Workspace<uint16_t>(2 * block_ / kStep * kPanelStep),
              ring = Workspace<float>(4 * kGroupProducts), rows = Workspace<float>(2 * kGroup * kRows),
              region = Region()](int64_t i) mutable {
        differentiate(part, first_group() + i, panels.data(), ring.data(), rows.data());
      };
    });
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t m = 0; m < keys_.padded(); ++m) {
        total_[m] += slope_sums_[g * block_ + m];
        biased_[m] += biased_sums_[g * block_ + m];
      }
    }
  }

  // Sums += products of a part of the values of 32 positions with those of a group of queries.
  [[gnu::noinline]] void multiply_values(int64_t part, int64_t group, int64_t m) {
    const int64_t steps = steps_in(part), panel = steps * kPanelStep;
    const uint16_t* g = forms(group / slice_groups_) + 2 * (group % slice_groups_) * value_panel_ +
                        first_step(part) * kPanelStep;
    const uint16_t* v = values_.data() + 2 * m * panel;
    multiply_add<kValues>(g, g + value_panel_, v, v + panel, steps);
  }
  // Where their sums over parts are.
  float* products(int64_t group, int64_t m) {
    return products_.data() + ((group - first_group()) * (block_ / kGroup) + m) * kGroupProducts;
  }
  void load_products(int64_t part, int64_t group, int64_t m) {
    if (part == 0) {
      zero_sums();
    } else {
      load_sums(products(group, m));
    }
  }

  void add_products(int64_t part, int64_t group) {
    for (int64_t m = 0; m < keys_.padded() / kGroup; ++m) {
      load_products(part, group, m);
      multiply_values(part, group, m);
      store_sums(products(group, m));
    }
  }

  // W and dS of 32 queries with the block, and their share of the gradients of queries.
  void differentiate(int64_t part, int64_t group, uint16_t* panels, float* ring, float* rows) {
    const int64_t groups = keys_.padded() / kGroup, packed = kept_ ? group : group - first_group();
    std::fill_n(rows, 2 * kGroup * kRows, 0.f);
    for (int64_t m = 0; m <= groups; ++m) {
      if (m < groups) {
        float* scores = ring + m % 2 * 2 * kGroupProducts;
        zero_sums();
        multiply_add<kScores>(query_rows_.at(packed, 0), query_rows_.at(packed, 1), keys_.at(2 * m),
                              keys_.at(2 * m + 1), score_steps(in_));
        store_sums(scores);
        load_products(part, group, m);
        multiply_values(part, group, m);
        store_sums(scores + kGroupProducts);
      }
      if (m == 0) continue;
      const float* scores = ring + (m - 1) % 2 * 2 * kGroupProducts;
      if (query_rows_.has_bias) {
        weigh<true>(group, m - 1, scores, query_rows_.bias_of(packed), panels, rows);
      } else {
        weigh<false>(group, m - 1, scores, nullptr, panels, rows);
      }
    }
    const int64_t query = group * kGroup;
    for (int64_t p = 0; p < kGroup; ++p) {
      if (kValues > 1) {
        const Reg sizes = Lanes::load(rows + p * kRows);
        for (int i = 0; i < kRows; ++i) {
          const auto bits = std::bit_cast<uint32_t>(most_[query + p]);
          most_[query + p] = std::bit_cast<float>(std::max(bits, std::bit_cast<uint32_t>(sizes[i])));
        }
      }
      if (query_rows_.has_bias) bias_sums_[query + p] += sum_of(Lanes::load(rows + (kGroup + p) * kRows));
    }
    float* sums = query_sums_.data() + group * key_pairs_ * 4 * kSums;
    for (int64_t c = 0; c < key_pairs_; ++c, sums += 4 * kSums) {
      const uint16_t* k = key_channels_.data() + 2 * c * groups * kPanelStep;
      begin_sums<(kValues > 1)>(keys_.begin == span_.begin, sums);
      multiply_add<kValues>(panels, panels + groups * kPanelStep, k, k + groups * kPanelStep, groups);
      end_sums<(kValues > 1)>(keys_.begin == span_.begin, sums);
    }
  }

  // The same of 32 positions from their scores and products.
  template <bool kQueryBias>
  [[gnu::noinline]] void weigh(int64_t group, int64_t m, const float* scores, const float* bias,
                               uint16_t* panels, float* rows) {
    const int64_t slice = group / slice_groups_, steps = groups_in(slice), first = m * kGroup;
    const int64_t query = group * kGroup;
    uint16_t *weights[2], *slopes[2];
    Reg factor[2], shift[2], shrinkage[2], to_query[2], slope_sum[2]{}, biased_sum[2]{};
    Reg factor_low[2], shift_low[2], shrinkage_low[2];
    for (int j = 0; j < 2; ++j) {
      factor[j] = Lanes::load(keys_.factor.data() + first + j * kRows);
      shift[j] = Lanes::load(keys_.shift.data() + first + j * kRows);
      shrinkage[j] = Lanes::load(keys_.shrinkage.data() + first + j * kRows);
      factor_low[j] = Lanes::load(factor_low_.data() + first + j * kRows);
      shift_low[j] = Lanes::load(shift_low_.data() + first + j * kRows);
      shrinkage_low[j] = Lanes::load(shrinkage_low_.data() + first + j * kRows);
      to_query[j] = factor[j] * static_cast<float>(1 / kLog2E);
      const int64_t at = weights_at(slice) + ((2 * m + j) * steps + group % slice_groups_) * kPanelStep;
      weights[j] = weights_.data() + at;
      slopes[j] = slopes_.data() + at;
    }
    for (int i = 0; i < 2; ++i) {
      uint16_t* row = panels + (i * (keys_.padded() / kGroup) + m) * kPanelStep;
      for (int r = 0; r < kRows; r += 2) {
        Reg weight[2][2], slope[2][2];
#pragma GCC unroll 2
        for (int e = 0; e < 2; ++e) {
          const int64_t p = i * kRows + r + e;
          const Reg lse = Lanes::set1(lse_.data()[query + p]),
                    lse_low = Lanes::set1(lse_low_.data()[query + p]),
                    delta = Lanes::set1(delta_.data()[query + p]);
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) {
            const float* from = scores + (2 * i + j) * kSums + (r + e) * kRows;
            const Reg product = Lanes::load(from);
            Reg constant = shift[j] - lse;
            if constexpr (kQueryBias) constant = Lanes::fma(shrinkage[j], Lanes::set1(bias[p]), constant);
            Reg score = Lanes::fma(factor[j], product, constant);
            if constexpr (kExact) {
              Reg low = Lanes::fma(factor_low[j], product, shift_low[j] - lse_low);
              if constexpr (kQueryBias) low = Lanes::fma(shrinkage_low[j], Lanes::set1(bias[p]), low);
              score += low;
            }
            weight[e][j] = exp2_weight<kDegree>(score);
            slope[e][j] = weight[e][j] * (Lanes::load(from + kGroupProducts) - delta);
            slope_sum[j] += slope[e][j];
            if constexpr (kQueryBias)
              biased_sum[j] = Lanes::fma(slope[e][j], Lanes::set1(bias[p]), biased_sum[j]);
          }
          if constexpr (kValues > 1) {
            float* most = rows + p * kRows;
            Lanes::store(most, greater_of(Lanes::load(most),
                                          greater_of(magnitude(slope[e][0]), magnitude(slope[e][1]))));
          }
          if constexpr (kQueryBias) {
            float* sum = rows + (kGroup + p) * kRows;
            Lanes::store(sum, Lanes::fma(slope[e][0], shrinkage[0],
                                         Lanes::fma(slope[e][1], shrinkage[1], Lanes::load(sum))));
          }
          split_row<kValues>(slope[e][0] * to_query[0], slope[e][1] * to_query[1], row + (r + e) * kStep);
        }
        const int64_t at = (i * kRows + r) / 2 * kStep;
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          store_pairs<kValues>(weight[0][j], weight[1][j], weights[j] + at);
          store_pairs<kValues>(slope[0][j], slope[1][j], slopes[j] + at);
        }
      }
    }
    for (int j = 0; j < 2; ++j) {
      Lanes::store(slope_sums_.data() + (group - first_group()) * block_ + first + j * kRows, slope_sum[j]);
      Lanes::store(biased_sums_.data() + (group - first_group()) * block_ + first + j * kRows, biased_sum[j]);
    }
  }

  // Adds the chunk's share to the sums of dV and dK, and writes dV after the last.
  void reduce_chunk() {
    const int64_t pairs = value_pairs_ + key_pairs_;
    const int64_t few = std::max<int64_t>(panels_of(pairs, kRangePairs), torch::stable::get_num_threads());
    const int64_t ranges = by_pair_ ? pairs : std::min(pairs, few);
    parallel_tasks(ranges, [&] {
      return [&, region = Region(),
              scratch = Workspace<float>(holds_value_sums() ? 0 : kGroup * block_)](int64_t range) mutable {
        const int64_t first = pairs * range / ranges, last = pairs * (range + 1) / ranges;
        const auto sums = [&](int64_t pair) {
          if (pair >= value_pairs_) return key_sums_.data() + (pair - value_pairs_) * kGroup * block_;
          return holds_value_sums() ? value_sums_.data() + pair * kGroup * block_ : scratch.data();
        };
        for (int64_t slice = first_slice_; slice < last_slice_; ++slice)
          for (int64_t pair = first; pair < last; ++pair) reduce(slice, pair, sums(pair));
        if (last_slice_ < slices_) return;
        for (int64_t pair = first; pair < std::min(last, value_pairs_); ++pair)
          write_values(pair, sums(pair));
      };
    });
  }
  // Where a task has one pair in one chunk, its sums of dV last as long as the task.
  bool holds_value_sums() const { return !by_pair_ || chunk_slices_ < slices_; }

  // Adds a slice's share to the sums of a pair of channel panels, those of values before those of keys.
  void reduce(int64_t slice, int64_t pair, float* sums) {
    const int64_t steps = groups_in(slice), groups = keys_.padded() / kGroup;
    const uint16_t* a = channel_pair(slice, pair);
    const uint16_t* b = (pair < value_pairs_ ? weights_.data() : slopes_.data()) + weights_at(slice);
    for (int64_t m = 0; m < groups; ++m, b += 2 * steps * kPanelStep, sums += 4 * kSums) {
      begin_sums<(kValues > 1)>(slice == 0, sums);
      multiply_add<kValues>(a, a + steps * kPanelStep, b, b + steps * kPanelStep, steps);
      end_sums<(kValues > 1)>(slice == 0, sums);
    }
  }

  // Row `row` of a pair's sums at 16 positions.
  static const float* sums_of(const float* pair, int64_t row, int64_t panel) {
    return pair + panel / 2 * 4 * kSums + (row / kRows * 2 + panel % 2) * kSums + row % kRows * kRows;
  }

  // The gradients of a pair of panels of channels of the block's values.
  void write_values(int64_t pair, const float* sums) {
    dispatch_floating(gradients_.value.scalar_type(), [&]<class S>(S) {
      S* target = gradients_.value.mutable_data_ptr<S>() + n_ * objects_ * channels_ * positions_;
      const int64_t count = keys_.count;
      for (int64_t row = 0; row < kGroup; ++row) {
        const int64_t panel = 2 * pair + row / kRows, object = panel / object_panels_;
        const int64_t channel = panel % object_panels_ * kRows + row % kRows;
        if (object >= objects_ || channel >= channels_) continue;
        S* to = target + (object * channels_ + channel) * positions_ + keys_.begin;
        for (int64_t first = 0; first < count; first += kGroup) {
          const float* from = sums_of(sums, row, first / kRows);
          store_both(to + first, Lanes::load(from), Lanes::load(from + kSums), count - first);
        }
      }
    });
  }

  // Gradients of the block's keys, shrinkages and key biases.
  void write_keys() {
    parallel_tasks(panels_of(keys_.count, kRows), [&] {
      return [&, keys = Workspace<float>(in_.key.size(1) * kRows)](int64_t i) mutable {
        write_keys(i, keys.data());
      };
    });
  }

  // Of 16 positions.
  void write_keys(int64_t panel, float* keys) {
    const int64_t first = panel * kRows, count = std::min<int64_t>(kRows, keys_.count - first);
    const int64_t channels = in_.key.size(1);
    const bool squares = in_.squares();
    const StridedMatrix key = StridedMatrix::of(in_.key, n_ * in_.key.stride(0));
    pack_pixels<FloatElement<Lanes>, kRows>(key, keys_.begin + first, count, keys);
    const auto row_of = [&](int64_t part, int64_t channel) {
      const int64_t row = part * part_panels_ * kRows + channel;
      return Lanes::load(sums_of(key_sums_.data() + row / kGroup * kGroup * block_, row % kGroup, panel));
    };
    const Reg factor = Lanes::load(keys_.factor.data() + first) * static_cast<float>(1 / kLog2E);
    Reg used{}, product{};
    for (int i = 0; i < kRows; ++i) used[i] = read_position_[first + i] ? 1.f : 0.f;
    dispatch_floating(gradients_.key.scalar_type(), [&]<class S>(S) {
      S* target = gradients_.key.mutable_data_ptr<S>() + n_ * channels * positions_ + keys_.begin + first;
      for (int64_t c = 0; c < channels; ++c) {
        const Reg x = used != 0.f ? Lanes::load(keys + c * kRows) : Reg{};
        Reg sum = row_of(0, c);
        product = Lanes::fma(sum, x, product);
        if (squares) {
          const Reg squared = row_of(1, c);
          product = Lanes::fma(squared, x * x, product);
          sum = Lanes::fma(2 * x, squared, sum);
        }
        sum *= factor;
        store_first(target + c * positions_, sum, count);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      const int64_t m = n_ * positions_ + keys_.begin + first + i;
      if (in_.shrinkage)
        gradients_.shrinkage.mutable_data_ptr<float>()[m] =
            biased_[first + i] + product[i] * static_cast<float>(in_.scale);
      if (in_.key_bias) gradients_.key_bias.mutable_data_ptr<float>()[m] = total_[first + i];
    }
  }

  bool slopes_in_range() const {
    if (kValues == 1) return true;
    for (int64_t p = 0; p < queries_; ++p) {
      const float most = most_.data()[p];
      if (most != 0.f && !(most >= kLeastSlope && most <= kMostSlope)) return false;
    }
    return true;
  }

  void write_query() {
    const int64_t channels = in_.key.size(1);
    dispatch_floating(gradients_.query.scalar_type(), [&]<class S>(S) {
      S* target = gradients_.query.mutable_data_ptr<S>() + n_ * parts_ * channels * queries_;
      parallel_each(groups_, [&](int64_t group) {
        const float* sums = query_sums_.data() + group * key_pairs_ * 4 * kSums;
        const int64_t first = group * kGroup, count = std::min(kGroup, queries_ - first);
        for (int64_t part = 0; part < parts_; ++part) {
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t row = part * part_panels_ * kRows + c;
            const float* tile = sums + row / kGroup * 4 * kSums + row / kRows % 2 * kSums + row % kRows;
            S* to = target + (part * channels + c) * queries_ + first;
            for (int64_t p = 0; p < count; ++p)
              to[p] = static_cast<S>(tile[p / kRows * 2 * kSums + p % kRows * kRows]);
          }
        }
      });
    });
    if (in_.query_bias) {
      float* target = gradients_.query_bias.mutable_data_ptr<float>() + n_ * queries_;
      for (int64_t p = 0; p < queries_; ++p) target[p] = bias_sums_[p] * static_cast<float>(1 / kLog2E);
    }
  }

  const ReadBackward& read_;
  const ScoreInputs& in_;
  const int64_t n_, queries_, positions_;
  const ReadSpan span_;
  const int64_t objects_, channels_;
  const int64_t parts_;                        // of keys: channels, and their squares
  const int64_t part_panels_, object_panels_;  // of 16 channels
  const int64_t key_pairs_, value_pairs_;      // of channel panels of all parts, and of all objects
  const int64_t object_steps_;                 // of 32 channels
  const int64_t value_panel_;                  // bfloat16 of 16 positions' or queries' values
  const int64_t groups_, slices_;              // of queries
  const int64_t slice_groups_, slice_;         // groups, and queries, of a slice
  const int64_t steps_;                        // of all objects' values
  const int64_t part_steps_, parts_of_steps_;  // steps of a part
  const int64_t block_;                        // positions
  const int64_t chunk_slices_, chunk_groups_;  // whose weights are kept at a time
  const bool by_pair_;                         // sums go over all slices before the next pair's begin
  const bool kept_;                            // all queries stay packed
  ReadGradients& gradients_;
  Outside outside_;
  int64_t first_slice_ = 0, last_slice_ = 0;  // of the chunk
  QueryGroups<kScores, false> query_rows_;
  Workspace<uint16_t> forms_;
  KeyBlock<kScores, true> keys_;
  Workspace<uint16_t> values_;              // B panels of positions, a part of the channels
  Workspace<uint16_t> key_channels_;        // B panels of channels
  Workspace<uint16_t> weights_, slopes_;    // of a chunk: (slice, panel of positions, group) of B panels
  Workspace<float> products_;               // (group of queries, group of positions, 4 tiles)
  Workspace<float> value_sums_, key_sums_;  // (pair of channel panels, group of positions, 4 tiles)
  Workspace<float> query_sums_;             // (group of queries, pair of channel panels, 4 tiles)
  Workspace<float> lse_, lse_low_;          // per query: in powers of two, and what that rounds
  Workspace<float> factor_low_, shrinkage_low_, shift_low_;  // what rounds those of keys_
  Workspace<float> delta_, most_, bias_sums_;                // per query
  Workspace<float> slope_sums_, biased_sums_;                // (group of a chunk, position)
  Workspace<float> total_, biased_;                          // per position
  Workspace<bool> read_position_;                            // not excluded
};

// Smaller problems are not worth their packing: measured on an Intel Xeon of the Emerald Rapids class, one
// thread, against the same problems by AVX-512.
bool is_worth(const ReadBackward& read, int pieces) {
  const int64_t queries = read.in.queries(), positions = read.in.memory();
  if (read.in.key.size(1) == 0 || read.value.size(1) == 0 || read.value.size(2) == 0) return false;
  if (pieces == 1) return queries >= 64 && positions >= 64;
  const int64_t channels = 3 * read.in.key.size(1) + 2 * read.value.size(1) * read.value.size(2);
  return queries >= 320 && positions >= 256 && channels >= 320;
}

}  // namespace

bool read_backward(const ReadBackward& read, std::string_view precision, ReadGradients& gradients) {
  const ScoreInputs& in = read.in;
  if (in.key.scalar_type() == ScalarType::Double) return false;
  const Pieces of_float = pieces_of(precision);
  const int scores = score_pieces(in, precision);
  const int values = std::max({pieces_for(read.value.scalar_type(), of_float.values),
                               pieces_for(in.key.scalar_type(), of_float.values), scores > 1 ? 2 : 1});
  if (!is_worth(read, std::max(scores, values)) || !ready()) return false;
  const auto run = [&]<int kScores, int kValues>() {
    for (int64_t n = 0; n < in.batch(); ++n) {
      if (!BackwardElement<kScores, kValues>(read, n, gradients).run()) return false;
    }
    return true;
  };
  const bool done = scores == 1 && values == 1   ? run.template operator()<1, 1>()
                    : scores <= 2 && values <= 2 ? run.template operator()<2, 2>()
                    : values <= 2                ? run.template operator()<3, 2>()
                                                 : run.template operator()<3, 3>();
  ++(done ? served : outside_pieces);
  return done;
}

}  // namespace vosops::cpu::amx

#endif
