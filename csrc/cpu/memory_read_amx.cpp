// The memory read by Intel's matrix engine: softmax over the memory in a streaming pass, as memory_read.cpp
// does it, with both products on tiles.
//
// The memory is taken in blocks of up to 512 positions, packed once into pieces of keys and values that stay
// in the second-level cache. For each block groups of 32 queries are shared out over the threads: products
// leave the tiles 32 positions at a time into a ring in the first-level cache, become weights 2^(score -
// maximum) in panels of pieces while the next ones are multiplied, and multiply the values into sums that
// pass through the tiles. The maximum is the one known so far; only where a score passes it by 2^8 the sums
// are scaled and the block's weights are made again. Weights below 2^-100 are 0.
//
// Pieces: the scores' by the dtypes of query and key, the values' by their own. Bytes: the memory is read
// once per kHeldBytes of sums and queries, the sums once from and to the third-level cache a block; the
// affinity matrix never exists. Floor: 2 (C kScores + O Cv kValues) operations of bfloat16 per pair of query
// and position, 1, 3 or 6 products for 1, 2 or 3 pieces.
#include "cpu/memory_read_amx.h"

#if defined(VOSOPS_AMX)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "cpu/amx.h"
#include "cpu/memory_amx.h"
#include "cpu/memory_scores.h"
#include "cpu/memory_values.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace vosops::cpu {
namespace {

using namespace amx;

constexpr int64_t kLongestBlock = 512;    // memory positions
constexpr int64_t kBlockBytes = 5 << 18;  // of packed keys and values

constexpr int64_t kHeldBytes = 12 << 20;  // of sums and packed queries
constexpr float kLazy = 8;                // how far a score may pass the maximum, in powers of two
constexpr float kLowest = std::numeric_limits<float>::lowest();

Counter served("memory_read"), outside_pieces("memory_read_outside");

// Sixteen rows of values, channels of one object or of objects at equal distances.
struct RowPanel {
  const Tensor* tensor;
  int64_t offset, stride, count, row;  // the first row's place in the tensor and in the output
};

std::vector<RowPanel> row_panels(const Values& values) {
  std::vector<RowPanel> panels;
  int64_t row = 0;
  const auto add = [&](const Tensor& tensor, int64_t offset, int64_t stride, int64_t rows) {
    for (int64_t r = 0; r < rows; r += kRows)
      panels.push_back({&tensor, offset + r * stride, stride, std::min<int64_t>(kRows, rows - r), row + r});
    row += rows;
  };
  for (int64_t o = 0; o < values.objects(); ++o) {
    const Tensor& tensor = values.tensor(o);
    const int64_t channels = tensor.size(2);
    const bool even = channels == 1 || tensor.stride(1) == channels * tensor.stride(2);
    if (values.within(o) == 0 && even) {
      add(tensor, 0, channels == 1 ? tensor.stride(1) : tensor.stride(2), tensor.size(1) * channels);
      o += tensor.size(1) - 1;
    } else {
      add(tensor, values.within(o) * tensor.stride(1), tensor.stride(2), channels);
    }
  }
  return panels;
}

struct Running {
  alignas(64) float maximum[kGroup], total[kGroup];
};

inline Reg greater(Reg a, Reg b) {  // b where a is NaN
#if defined(__AVX512F__)
  return (Reg)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline bool any_above(Reg a, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
  bool found = false;
  for (int i = 0; i < kRows; ++i) found |= a[i] > limit;
  return found;
#endif
}

// What stands between products and scores: a positive factor, terms of the position, or those and one of the
// query.
enum class Terms { kFactor, kPosition, kAll };

// A worker's view of one packed block.
struct Block {
  const KeyTerms& key_terms;
  Terms terms;
  const uint16_t* values;
  int64_t value_stride, value_panels;  // an even number of panels
  int64_t count, padded;
  float factor;
};

// The softmax of one group while a block is read: lanes of its two panels of queries.
struct Softmax {
  Reg query_bias[2], top[2], high[2], sum[2];  // top: the maximum in use; high: the greatest score
};

// Position r of the group at m, lanes of query panel j.
template <Terms kTerms>
[[gnu::always_inline]] inline Reg score(const Block& block, const float* products, int j, int64_t m,
                                        int64_t r, Reg query_bias) {
  const Reg product = load_bits(products + j * 2 * kSums + r * kRows);
  if constexpr (kTerms == Terms::kFactor) return product * block.factor;
  return block.key_terms.score<kTerms == Terms::kAll>(product, m + r, query_bias);
}

// Calls f(std::integral_constant<Terms, terms>).
template <class F>
void with_terms(Terms terms, const F& f) {
  if (terms == Terms::kFactor) return f(std::integral_constant<Terms, Terms::kFactor>{});
  if (terms == Terms::kPosition) return f(std::integral_constant<Terms, Terms::kPosition>{});
  f(std::integral_constant<Terms, Terms::kAll>{});
}

// Makes the greatest of the 32 positions at m the maximum in use.
template <Terms kTerms>
[[gnu::noinline]] void start_maximum(const Block& block, const float* products, int64_t m, Softmax& softmax) {
  for (int j = 0; j < 2; ++j) {
    Reg top = softmax.top[j];
    for (int64_t r = 0; r < kGroup; ++r)
      top = greater(score<kTerms>(block, products, j, m, r, softmax.query_bias[j]), top);
    softmax.top[j] = top;
  }
}

// The weights of the 32 positions at m and 32 queries as B tiles of pieces, those of query panel j at
// to + j * stride.
template <int kPieces, int kDegree, Terms kTerms>
[[gnu::noinline]] void weigh(const Block& block, const float* products, int64_t m, Softmax& softmax,
                             uint16_t* to, int64_t stride) {
  for (int j = 0; j < 2; ++j, to += stride) {
    const Reg bias = softmax.query_bias[j], top = softmax.top[j];
    Reg high = softmax.high[j], sum = softmax.sum[j];
    for (int64_t r = 0; r < kGroup; r += 2) {
      const Reg a = score<kTerms>(block, products, j, m, r, bias);
      const Reg b = score<kTerms>(block, products, j, m, r + 1, bias);
      high = greater(a, high);
      high = greater(b, high);
      const Reg low = exp2_weight<kDegree>(a - top), up = exp2_weight<kDegree>(b - top);
      sum += low + up;
      Bits pieces[kPieces];
      split_pairs<kPieces>(low, up, pieces);
#pragma GCC unroll 3
      for (int i = 0; i < kPieces; ++i) std::memcpy(to + i * kTile + r * kRows, &pieces[i], sizeof(Bits));
    }
    softmax.high[j] = high;
    softmax.sum[j] = sum;
  }
}

// sums (+)= values weights for pairs of panels of values.
template <int kPieces>
[[gnu::noinline]] void add_values(const Block& block, Piece w0, Piece w1, bool first, float* sums) {
  const int64_t steps = block.padded / kStep;
  for (int64_t c = 0; c < block.value_panels; c += 2, sums += 4 * kSums) {
    const uint16_t* panel = block.values + c * block.value_stride;
    begin_sums<(kPieces > 1)>(first, sums);
    multiply_add<kPieces>(panel, panel + block.value_stride, w0, w1, steps);
    end_sums<(kPieces > 1)>(first, sums);
  }
}

// One worker thread: the ring of products and the panels of weights.
template <int kScores, int kValues>
class Reader {
  static constexpr int kDegree = kScores == 1 && kValues == 1 ? 3 : 6;

 public:
  Reader() : ring_(2 * kGroupProducts), weights_(2 * kLongestBlock / kStep * kValues * kTile) {}

  // Reads one block for one group of queries; `first`: there are no sums yet.
  void read(const KeyBlock<kScores>& keys, const Block& block, Piece q0, Piece q1, const float* bias,
            int64_t score_steps, bool first, Running& running, float* sums) {
    const int64_t stride = block.padded / kStep * kValues * kTile;
    Softmax softmax{};
    Reg old[2];
    for (int j = 0; j < 2; ++j) {
      if (block.terms == Terms::kAll) softmax.query_bias[j] = load_bits(bias + j * kRows);
      old[j] = first ? Lanes::set1(kLowest) : load_bits(running.maximum + j * kRows);
      softmax.top[j] = old[j];
    }
    for (bool known = !first, again = true; again;) {
      for (int j = 0; j < 2; ++j) softmax.high[j] = Lanes::set1(kLowest), softmax.sum[j] = Reg{};
      for (int64_t m = 0; m <= block.padded; m += kGroup) {
        if (m < block.padded) {
          float* products = ring(m);
          group_products<kScores>(keys.at(m / kRows), keys.at(m / kRows + 1), q0, q1, score_steps, products);
          if (block.terms == Terms::kFactor) exclude_after(block.count - m, products);
          if (!known)
            with_terms(block.terms,
                       [&](auto terms) { start_maximum<terms.value>(block, products, m, softmax); });
          known = true;
        }
        if (m == 0) continue;
        const int64_t before = m - kGroup;
        with_terms(block.terms, [&](auto terms) {
          weigh<kValues, kDegree, terms.value>(block, ring(before), before, softmax,
                                               weights_.data() + before / kStep * kValues * kTile, stride);
        });
      }
      again = false;
      for (int j = 0; j < 2; ++j) {
        if (!any_above(softmax.high[j] - softmax.top[j], kLazy)) continue;
        softmax.top[j] = greater(softmax.high[j], softmax.top[j]);
        again = true;
      }
    }
    for (int j = 0; j < 2; ++j) {
      const Reg top = softmax.top[j];
      Reg total = first ? Reg{} : load_bits(running.total + j * kRows);
      if (!first && any_above(top - old[j], 0)) {
        const Reg scale = exp2_weight<6>(old[j] - top);
        total *= scale;
        for (int64_t c = 0; c < block.value_panels * kRows; ++c) {
          float* row = sums + (c / kRows * 2 + j) * kSums + c % kRows * kRows;
          Lanes::store(row, load_bits(row) * scale);
        }
      }
      Lanes::store(running.maximum + j * kRows, top);
      Lanes::store(running.total + j * kRows, total + softmax.sum[j]);
    }
    add_values<kValues>(block, weights_.data(), weights_.data() + stride, first, sums);
  }

 private:
  // Where the products of the 32 positions at m are.
  float* ring(int64_t m) { return ring_.data() + (m / kGroup & 1) * kGroupProducts; }

  static void exclude_after(int64_t count, float* products) {
    for (int64_t r = std::max<int64_t>(0, count); r < kGroup; ++r) {
      for (int j = 0; j < 2; ++j)
        Lanes::store(products + j * 2 * kSums + r * kRows,
                     Lanes::set1(-std::numeric_limits<float>::infinity()));
    }
  }

  Workspace<float> ring_;
  Workspace<uint16_t> weights_;
};

// The output of one group: sums of the panels over the total.
void write_group(const std::vector<RowPanel>& panels, const float* sums, const Running& running,
                 int64_t first, int64_t n, int64_t rows, Tensor& out, Tensor& lse) {
  const int64_t queries = lse.size(1), count = std::min(kGroup, queries - first);
  alignas(64) float inverse[kGroup] = {};
  float* lse_row = lse.mutable_data_ptr<float>() + n * queries + first;
  for (int64_t p = 0; p < count; ++p) {
    const float total = running.total[p];
    inverse[p] = total == 0 ? 0.f : 1 / total;
    lse_row[p] = total == 0 ? -std::numeric_limits<float>::infinity()
                            : (running.maximum[p] + std::log2(total)) / static_cast<float>(kLog2E);
  }
  const Reg inverses[2] = {load_bits(inverse), load_bits(inverse + kRows)};
  dispatch_floating(out.scalar_type(), [&]<class S>(S) {
    if constexpr (!std::is_same_v<S, double>) {
      S* result = out.mutable_data_ptr<S>() + n * rows * queries + first;
      for (size_t i = 0; i < panels.size(); ++i) {
        for (int64_t r = 0; r < panels[i].count; ++r) {
          S* row = result + (panels[i].row + r) * queries;
          for (int64_t j = 0; j * kRows < count; ++j)
            store_first(row + j * kRows, load_bits(sums + (i * 2 + j) * kSums + r * kRows) * inverses[j],
                        count - j * kRows);
        }
      }
    }
  });
}

template <int kScores, int kValues>
bool read_element(const ScoreInputs& in, const std::vector<RowPanel>& panels, int64_t rows, int64_t n,
                  Tensor& out, Tensor& lse) {
  const int64_t value_panels = panels_of(static_cast<int64_t>(panels.size()), 2) * 2;
  const int64_t steps = score_steps(in), sums_size = value_panels * 2 * kSums;
  const int64_t position_bytes = 2 * (steps * kStep * kScores + value_panels * kRows * kValues);
  const int64_t longest =
      std::clamp<int64_t>(kBlockBytes / position_bytes / kGroup * kGroup, 2 * kGroup, kLongestBlock);
  const int64_t group_bytes = sums_size * 4 + 2 * score_panel(in, kScores) * 2;
  const int64_t groups = panels_of(in.queries(), kGroup);
  const int64_t at_once = std::min(groups, std::max<int64_t>(16, kHeldBytes / group_bytes));

  const ReadSpan span = read_span<float>(in, n);
  QueryGroups<kScores> queries(in, n, at_once);
  KeyBlock<kScores> keys(in, n, longest);
  const int64_t value_stride = longest / kStep * kValues * kTile;
  Workspace<uint16_t> values(value_panels * value_stride);
  std::fill_n(values.data() + (value_panels - 1) * value_stride, value_stride, uint16_t{0});
  Workspace<float> sums(at_once * sums_size);
  std::vector<Running> running(at_once);
  std::vector<char> keep_bytes(in.key_bias ? longest : 0);
  bool* keep = in.key_bias ? reinterpret_cast<bool*>(keep_bytes.data()) : nullptr;
  const bool only_factor = !in.shrinkage && !in.query_bias && !in.key_bias && in.scale > 0;
  const Terms terms = only_factor ? Terms::kFactor : in.query_bias ? Terms::kAll : Terms::kPosition;

  for (int64_t first = 0; first < groups; first += at_once) {
    Outside outside;
    queries.start(first * kGroup, std::min(at_once * kGroup, in.queries() - first * kGroup));
    pack_each(queries.groups(), outside, [&](int64_t i, Extent& extent) { queries.pack(i, extent); });
    for (int64_t begin = span.begin; begin < span.end; begin += longest) {
      keys.start(begin, std::min(longest, span.end - begin));
      if (keep != nullptr) {
        const OptionalRow<float> biases(in.key_bias, n, 0.f);
        for (int64_t m = 0; m < keys.count; ++m)
          keep[m] = biases[begin + m] != -std::numeric_limits<float>::infinity();
      }
      const int64_t used_panels = static_cast<int64_t>(panels.size());
      pack_each(keys.panels() + used_panels, outside, [&](int64_t i, Extent& extent) {
        if (i < keys.panels()) return keys.pack(i, extent);
        const RowPanel& panel = panels[i - keys.panels()];
        const Tensor& tensor = *panel.tensor;
        const int64_t place = n * tensor.stride(0) + panel.offset + begin * tensor.stride(3);
        const StridedMatrix matrix{
            static_cast<const char*>(tensor.const_data_ptr()) + place * tensor.element_size(),
            tensor.scalar_type(), keys.count, tensor.stride(3), panel.stride};
        pack_panel<kValues, false>(matrix, 0, panel.count, keys.padded() / kStep,
                                   values.data() + (i - keys.panels()) * value_stride, extent, 1.f, 0xffffu,
                                   keep);
      });
      if (outside.found()) return false;
      const Block block{keys,         terms,      values.data(), value_stride,
                        value_panels, keys.count, keys.padded(), keys.factor[0]};
      parallel_tasks(queries.groups(), [&] {
        return [&, region = Region(), reader = Reader<kScores, kValues>()](int64_t i) mutable {
          reader.read(keys, block, queries.at(i, 0), queries.at(i, 1), queries.bias_of(i), steps,
                      begin == span.begin, running[i], sums.data() + i * sums_size);
        };
      });
    }
    parallel_each(queries.groups(), [&](int64_t i) {
      write_group(panels, sums.data() + i * sums_size, running[i], (first + i) * kGroup, n, rows, out, lse);
    });
  }
  return true;
}

}  // namespace

bool read_by_tiles(const ScoreInputs& in, const Values& values, std::string_view precision, Tensor& out,
                   Tensor& lse) {
  if (in.key.scalar_type() == ScalarType::Double) return false;
  const int of_scores = score_pieces(in, precision);
  const int of_values = pieces_for(values.dtype(), pieces_of(precision).values);
  const int64_t rows = values.objects() * values.channels();
  const bool worth = rows > 0 && worth_tiles(std::max(of_scores, of_values), in.queries(), in.memory(),
                                             in.query.size(1) + rows);
  if (!worth || in.queries() == 0 || !ready()) return false;
  const std::vector<RowPanel> panels = row_panels(values);
  bool done = true;
  with_pieces(of_scores, [&](auto score_pieces) {
    with_pieces(of_values, [&](auto value_pieces) {
      for (int64_t n = 0; done && n < in.batch(); ++n)
        done = read_element<score_pieces.value, value_pieces.value>(in, panels, rows, n, out, lse);
    });
  });
  ++(done ? served : outside_pieces);
  return done;
}

}  // namespace vosops::cpu

#endif
