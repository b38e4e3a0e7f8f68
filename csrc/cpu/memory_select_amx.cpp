// Exact top-k by Intel's matrix engine: scores of bfloat16 vectors with a strict bound of their error choose
// the few positions whose scores are computed in float32, as the FMA code does, element by element.
//
// A block of keys is packed once for all queries: rows of float32 (kRowBytes, beyond the second-level cache
// only where the check meets them) and panels of their bfloat16 (half of that, in the second-level cache).
// A task owns 32 queries: it multiplies their panels (in the first-level cache) by those of the block, 32
// keys at a time into a ring of two such tiles, and compares each row of 16 keys with the query's bar. What
// reaches it is noted with its position, a lower and an upper bound of its score. A list of notes that is
// full raises the bar to (nearly) its k-th greatest lower bound and drops what cannot reach it. After the
// block the notes left are replaced by their scores in float32, 16 at a time. Some 100 notes a query are
// made and 40 scores computed for k = 30. Bytes: the keys once, and twice as rows.
//
// The bound. q', k' are the roundings to bfloat16 of query q and key k, and u = 2^-24. With Cauchy-Schwarz
//   |q.k - q'.k'| <= |q - q'| |k| + |q'| |k - k'|,
// the engine's sum is within (16 + 2 + steps) u |q'| |k'| of q'.k', and the FMA code's within elements * u
// |q| |k| of q.k. So the score of a key with factor f lies within
//   reach of the query * |f| |k|,  reach = |q - q'| + |q'| (max |k - k'| / |k| + the two multiples of u),
// of the approximation, but for the last roundings, which Bars allow for. Norms are rounded up by kInflation,
// kLeastSquare and kLeastLoss cover what is flushed to zero.
#include "cpu/memory_select_amx.h"

#if defined(VOSOPS_AMX)

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/best.h"
#include "cpu/memory_scores.h"
#include "cpu/parallel.h"

namespace vosops::cpu::amx {
namespace {

constexpr int kGroup = 2 * kRows;                // queries and keys that are multiplied at a time
constexpr int kTaskQueries = 128;                // at most, of a task
constexpr int64_t kTaskBytes = 16384;            // of their panels, in the first-level cache
constexpr int64_t kRowBytes = int64_t{1} << 20;  // of a block of keys in float32
constexpr float kInflation = 1 + 0x1p-10f;       // covers the roundings of norms of up to kMostElements
constexpr float kLeastSquare = 0x1p-100f;        // added for each element: products that are flushed
constexpr float kLeastLoss = 0x1p-124f;          // the same of what rounding takes away
constexpr float kMostScore = 0x1p100f;           // beyond, sums might overflow
constexpr float kUnit = 0x1p-24f;
constexpr int64_t kMostElements = 4096;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Batch elements served; queries left to the FMA code because their lists stayed full or their scores may
// overflow; batch elements left to it because too many queries were, or because a key is not finite.
Counter served("memory_select.filter"), queries_left("memory_select.overflow"),
    given_up("memory_select.given_up"), out_of_range("memory_select.range");

int64_t round_up(int64_t size, int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

// Whether lanes of a vector are at least those of another, by bits.
uint32_t at_least(Reg a, Reg b) {
  return lanes_at_least<Lanes>(a, b);
}

// Sums of the 16 lanes of 16 registers.
Reg sums_of_lanes(Reg rows[kRows]) {
  alignas(64) float lanes[kSums];
  transpose_lanes<Lanes>(reinterpret_cast<const float*>(rows), kRows, lanes, kRows);
  Reg sum{};
  for (int i = 0; i < kRows; ++i) sum += Lanes::load(lanes + i * kRows);
  return sum;
}

// Vectors in float32, one a row, zeros after their elements.
struct Rows {
  int64_t elements, stride;
  Workspace<float> data;

  Rows(int64_t count, int64_t elements_)
      : elements(elements_), stride(round_up(elements, kStep)), data(count * stride) {}
  float* row(int64_t i) { return data.data() + i * stride; }
  const float* row(int64_t i) const { return data.data() + i * stride; }
  int64_t steps() const { return stride / kStep; }

  // Rows [to, to + 16) become vectors [first, first + count) of a matrix (its pixels); those whose bit is
  // not set, and those after them, 0.
  void fill(const StridedMatrix& matrix, int64_t first, int64_t count, uint32_t which, int64_t to) {
    which &= count >= kRows ? 0xffffu : (1u << count) - 1;
    dispatch_floating(matrix.dtype, [&]<class S>(S) {
      if constexpr (!std::is_same_v<S, double>) {
        const S* base = static_cast<const S*>(matrix.data) + first * matrix.pixel_stride;
        for (int64_t e = 0; e < stride; e += kRows) {
          const int64_t left = std::clamp<int64_t>(matrix.channels - e, 0, kRows);
          const uint32_t elements = (1u << left) - 1;
          const S* from = base + e * matrix.channel_stride;
          if (matrix.channel_stride == 1) {
            for (int i = 0; i < kRows; ++i)
              Lanes::store(row(to + i) + e,
                           load_some(from + i * matrix.pixel_stride, which >> i & 1 ? elements : 0));
            continue;
          }
          alignas(64) float square[kSums] = {};
          for (int64_t c = 0; c < left; ++c) {
            if (matrix.pixel_stride == 1) {
              Lanes::store(square + c * kRows, load_some(from + c * matrix.channel_stride, which));
            } else {
              for (int i = 0; i < kRows; ++i)
                if (which >> i & 1)
                  square[c * kRows + i] = widen(from[c * matrix.channel_stride + i * matrix.pixel_stride]);
            }
          }
          transpose_lanes<Lanes>(square, kRows, row(to) + e, stride);
        }
      }
    });
  }

  // The lengths of 16 vectors and of what rounding to bfloat16 takes from them, rounded up.
  void norms(int64_t first, float* length, float* lost) const {
    Reg squares[kRows], losses[kRows];
    for (int i = 0; i < kRows; ++i) {
      squares[i] = losses[i] = Reg{};
      for (int64_t e = 0; e < stride; e += kStep) {
        const Reg low = Lanes::load(row(first + i) + e), high = Lanes::load(row(first + i) + e + kRows);
        const Bits pairs = round_pairs(low, high);
        const Reg a = low - low_of(pairs), b = high - high_of(pairs);
        squares[i] = Lanes::fma(low, low, Lanes::fma(high, high, squares[i]));
        losses[i] = Lanes::fma(a, a, Lanes::fma(b, b, losses[i]));
      }
    }
    const float size = static_cast<float>(elements);
    const Reg square = sums_of_lanes(squares) + size * kLeastSquare;
    const Reg loss = sums_of_lanes(losses) + size * kLeastLoss;
    for (int i = 0; i < kRows; ++i) {
      length[i] = std::sqrt(square[i]) * kInflation;
      lost[i] = std::sqrt(loss[i]) * kInflation;
    }
  }

  // The panel of 16 vectors.
  template <bool kB>
  void pack(int64_t first, uint16_t* to) const {
    Extent unused;
    for (int64_t s = 0; s < steps(); ++s)
      pack_tile<1, true, kB>(row(first) + s * kStep, stride, 0xffffu, ~0u, 1.f, to + s * kTile, unused);
  }
};

// All queries of a batch element, in whole groups.
struct Queries {
  int64_t count, groups, panel;  // panel: bfloat16 of 16 vectors
  Rows rows;
  Workspace<uint16_t> panels;
  Workspace<float> length, lost, bias;
  bool has_bias;

  Queries(const ScoreInputs& in, int64_t n)
      : count(in.queries()),
        groups(panels_of(count, kGroup)),
        panel(round_up(in.query.size(1), kStep) * kRows),
        rows(groups * kGroup, in.query.size(1)),
        panels(groups * 2 * panel),
        length(groups * kGroup),
        lost(groups * kGroup),
        bias(groups * kGroup),
        has_bias(in.query_bias.has_value()) {
    const StridedMatrix matrix = StridedMatrix::of(in.query, n * in.query.stride(0));
    const OptionalRow<float> biases(in.query_bias, n, 0.f);
    parallel_each(groups * 2, [&](int64_t i) {
      const int64_t first = i * kRows;
      rows.fill(matrix, first, std::max<int64_t>(count - first, 0), 0xffffu, first);
      rows.norms(first, length.data() + first, lost.data() + first);
      rows.pack<false>(first, panels.data() + i * panel);
      for (int64_t p = first; p < first + kRows; ++p) {
        length[p] += lost[p];  // of the vector and of its rounding
        bias[p] = p < count ? biases[p] : 0.f;
      }
    });
  }
  const uint16_t* panel_of(int64_t i) const { return panels.data() + i * panel; }
};

// A block of keys and what turns their products into scores: factor * product + weight * query_bias + shift.
struct Keys {
  const ScoreInputs& in;
  int64_t n, panel;
  bool uniform;  // one positive factor, nothing added
  int64_t begin = 0, count = 0;
  Rows rows;
  Workspace<uint16_t> panels;
  Workspace<float> factor, weight, shift, size;  // size: |factor| |key|
  Workspace<float> ratios;                       // by panel of 16: the greatest |k - k'| / |k|
  float ratio = 0, most_size = 0, most_weight = 0, most_shift = 0;

  static int64_t capacity(const ScoreInputs& in) {
    const int64_t row = round_up(in.query.size(1), kStep) * sizeof(float);
    return std::min(round_up(std::max<int64_t>(kRowBytes / row, kGroup), kGroup),
                    round_up(in.memory(), kGroup));
  }

  Keys(const ScoreInputs& in_, int64_t n_)
      : in(in_),
        n(n_),
        panel(round_up(in.query.size(1), kStep) * kRows),
        uniform(!in.shrinkage && !in.query_bias && !in.key_bias && static_cast<float>(in.scale) > 0),
        rows(capacity(in), in.query.size(1)),
        panels(capacity(in) / kRows * panel),
        factor(capacity(in)),
        weight(capacity(in)),
        shift(capacity(in)),
        size(capacity(in)),
        ratios(capacity(in) / kRows) {}

  const uint16_t* panel_of(int64_t i) const { return panels.data() + i * panel; }
  int64_t pairs() const { return panels_of(count, kGroup); }

  // Takes positions [begin, begin + count); false if their scores may not be finite.
  bool take(int64_t begin_, int64_t count_) {
    begin = begin_, count = count_;
    parallel_each(2 * pairs(), [&](int64_t i) { take_panel(i * kRows); });
    ratio = most_size = most_weight = most_shift = 0;
    bool finite = true;
    for (int64_t i = 0; i < 2 * pairs(); ++i) ratio = std::max(ratio, ratios[i]);
    for (int64_t j = 0; j < count; ++j) {
      finite &= size[j] < kMostScore && std::abs(weight[j]) < kMostScore;
      finite &= shift[j] == -kInfinity || std::abs(shift[j]) < kMostScore;
      most_size = std::max(most_size, size[j]);
      most_weight = std::max(most_weight, std::abs(weight[j]));
      if (shift[j] != -kInfinity) most_shift = std::max(most_shift, std::abs(shift[j]));
    }
    return finite;
  }

 private:
  void take_panel(int64_t first) {
    const OptionalRow<float> factors(in.shrinkage, n, 1.f), biases(in.key_bias, n, 0.f);
    const int64_t channels = in.key.size(1), used = std::clamp<int64_t>(count - first, 0, kRows);
    uint32_t which = 0;
    for (int64_t j = first; j < first + kRows; ++j) {
      const bool is_used = j < first + used && biases[begin + j] != -kInfinity;
      which |= static_cast<uint32_t>(is_used) << (j - first);
      weight[j] = is_used ? factors[begin + j] : 0.f;
      factor[j] = weight[j] * static_cast<float>(in.scale);
      shift[j] = is_used ? biases[begin + j] : -kInfinity;
    }
    rows.fill(StridedMatrix::of(in.key, n * in.key.stride(0)), begin + first, used, which, first);
    if (in.squares()) {
      for (int64_t j = first; j < first + kRows; ++j) {
        float* row = rows.row(j);
        for (int64_t e = 0; e < channels; ++e) row[channels + e] = row[e] * row[e];
      }
    }
    float length[kRows], lost[kRows];
    rows.norms(first, length, lost);
    float greatest = 0;
    for (int i = 0; i < kRows; ++i) {
      size[first + i] = std::abs(factor[first + i]) * length[i];
      greatest = std::max(greatest, lost[i] / length[i]);
    }
    ratios[first / kRows] = greatest * kInflation;
    rows.pack<true>(first, panels.data() + first / kRows * panel);
  }
};

// What a query has noted, in the order of positions: bounds of the score, equal once it is known.
struct Notes {
  int64_t top_k, capacity;
  Workspace<float> lower, upper;
  Workspace<int32_t> index;
  Workspace<int32_t> counts;
  // A score below its query's bar is not among the best k; errors: the greatest bound so far of a score's
  // distance from its approximation.
  Workspace<float> bars, errors;

  static int64_t capacity_for(int64_t top_k) { return round_up(std::max<int64_t>(4 * top_k, 128), kGroup); }

  Notes(int64_t queries, int64_t top_k_)
      : top_k(top_k_),
        capacity(capacity_for(top_k)),
        lower(queries * capacity),
        upper(queries * capacity),
        index(queries * capacity),
        counts(queries),
        bars(queries),
        errors(queries) {
    std::fill_n(counts.data(), queries, 0);
    std::fill_n(bars.data(), queries, std::numeric_limits<float>::lowest());
    std::fill_n(errors.data(), queries, 0.f);
  }

  bool closed(int64_t p) { return bars[p] == kInfinity; }
  void close(int64_t p) {
    bars[p] = kInfinity;
    counts[p] = 0;
  }
  // Room for another kGroup.
  bool full(int64_t p) { return counts[p] > capacity - kGroup; }

  // Notes the positions first + lane of 16 whose bits are set.
  void add(int64_t p, uint32_t which, Reg low, Reg high, int64_t first) {
    const int64_t at = p * capacity + counts[p];
    counts[p] += __builtin_popcount(which);
#if defined(__AVX512F__)
    const __mmask16 mask = static_cast<__mmask16>(which);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i positions = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(first)));
    float *const lows = lower.data() + at, *const highs = upper.data() + at;
    int32_t* const indices = index.data() + at;
    _mm512_storeu_ps(lows, _mm512_maskz_compress_ps(mask, (__m512)low));
    _mm512_storeu_ps(highs, _mm512_maskz_compress_ps(mask, (__m512)high));
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(mask, positions));
#else
    for (int64_t to = at; which != 0; which &= which - 1, ++to) {
      const int lane = __builtin_ctz(which);
      lower[to] = low[lane], upper[to] = high[lane], index[to] = static_cast<int32_t>(first + lane);
    }
#endif
  }

  // Raises the bar to about the k-th greatest lower bound and drops what lies below.
  void sift(int64_t p) {
    const int64_t count = counts[p];
    if (count <= top_k) return;
    float *low = lower.data() + p * capacity, *high = upper.data() + p * capacity;
    int32_t* at = index.data() + p * capacity;
    const int64_t whole = round_up(count, kRows);
    for (int64_t i = count; i < whole; ++i) low[i] = high[i] = -kInfinity;
    const float least = least_of_best(low, whole);
    // The k-th greatest score is at least `least`, and what may be it has an upper bound of at least that,
    // but for five roundings of a score or its error.
    const float bar = least - 16 * kUnit * (std::abs(least) + errors[p]) - kLeastSquare;
    bars[p] = std::max(bars[p], bar);
    int64_t kept = 0;
    for (int64_t i = 0; i < whole; i += kRows) {
      uint32_t which = at_least(Lanes::load(high + i), Lanes::set1(bars[p]));
#if defined(__AVX512F__)
      const __mmask16 mask = static_cast<__mmask16>(which);
      const __m512 l = _mm512_maskz_compress_ps(mask, (__m512)Lanes::load(low + i));
      const __m512 h = _mm512_maskz_compress_ps(mask, (__m512)Lanes::load(high + i));
      const __m512i x = _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(at + i));
      _mm512_storeu_ps(low + kept, l);
      _mm512_storeu_ps(high + kept, h);
      _mm512_storeu_si512(at + kept, x);
      kept += __builtin_popcount(which);
#else
      for (; which != 0; which &= which - 1, ++kept) {
        const int64_t j = i + __builtin_ctz(which);
        low[kept] = low[j], high[kept] = high[j], at[kept] = at[j];
      }
#endif
    }
    counts[p] = static_cast<int32_t>(kept);
  }

 private:
  // A number that at least k, and hardly more, of `count` numbers reach.
  float least_of_best(const float* numbers, int64_t count) const {
    constexpr int kHalvings = 24;
    Reg most = Lanes::load(numbers), least = Lanes::set1(kInfinity);
    for (int64_t i = 0; i < count; i += kRows) {
      const Reg x = Lanes::load(numbers + i);
      most = x > most ? x : most;
      least = x < least && x > -kInfinity ? x : least;
    }
    float high = most[0], low = least[0];
    for (int i = 1; i < kRows; ++i) high = std::max(high, most[i]), low = std::min(low, least[i]);
    for (int i = 0; i < kHalvings; ++i) {
      const float middle = low + (high - low) / 2;
      if (!(middle > low)) break;
      int64_t reached = 0;
      for (int64_t j = 0; j < count; j += kRows)
        reached += __builtin_popcount(at_least(Lanes::load(numbers + j), Lanes::set1(middle)));
      (reached >= top_k ? low : high) = middle;
      if (reached >= top_k && reached <= top_k + top_k / 16) break;
    }
    return low;
  }
};

// The queries of one task, `groups` groups, against one block of keys.
class Search {
 public:
  Search(Queries& queries, Keys& keys, int64_t first_group, int64_t groups)
      : queries_(queries), keys_(keys), first_(first_group * kGroup), groups_(groups) {
    const float roundings =
        static_cast<float>(kRows + 2 + queries.rows.steps() + queries.rows.elements) * kUnit * kInflation;
    for (int64_t i = 0; i < groups * kGroup; ++i) {
      const int64_t p = first_ + i;
      reach_[i] = (queries.lost[p] + queries.length[p] * (keys.ratio + roundings)) * kInflation;
      error_[i] = reach_[i] * keys.most_size * kInflation;
    }
  }

  // Whether no score of a query can overflow.
  bool is_finite(int64_t i) const {
    const int64_t p = first_ + i;
    return queries_.length[p] * keys_.most_size + error_[i] + keys_.most_weight * std::abs(queries_.bias[p]) +
               keys_.most_shift <
           kMostScore;
  }
  float error(int64_t i) const { return error_[i]; }

  // Calls see(tiles, first row, first key) with the products of 32 queries, from that row of the task on, and
  // 32 keys: four tiles, those of one half of the queries side by side.
  template <class See>
  [[gnu::always_inline]] void products(const See& see) const {
    alignas(64) float ring[2][4 * kSums];
    const int64_t panel = queries_.panel, steps = queries_.rows.steps(), rounds = keys_.pairs() * groups_;
    const uint16_t* const queries = queries_.panel_of(first_ / kRows);
    const uint16_t *a = queries, *b = keys_.panel_of(0);
    int64_t group = 0, seen_group = 0, seen_key = 0;
    for (int64_t i = 0; i <= rounds; ++i) {
      if (i < rounds) {
        zero_sums();
        multiply_add<1>(a, a + panel, b, b + panel, steps);
        store_sums(ring[i % 2]);
        a += 2 * panel;
        if (++group == groups_) group = 0, a = queries, b += 2 * panel;
      }
      if (i == 0) continue;
      see(ring[(i - 1) % 2], static_cast<int>(seen_group * kGroup), seen_key);
      if (++seen_group == groups_) seen_group = 0, seen_key += kGroup;
    }
  }
  // The products of a row of such tiles with the first 16 keys; those with the others lie kSums behind.
  static const float* row_of(const float* tiles, int row) {
    return tiles + row / kRows * 2 * kSums + row % kRows * kRows;
  }

  // Approximations of the scores of 16 keys, and how far the scores may lie from them.
  struct Scores {
    Reg near, error;
  };
  template <bool kUniform>
  [[gnu::always_inline]] Scores scores(int row, int64_t key, Reg product) const {
    const Reg factor = Lanes::load(keys_.factor.data() + key);
    if constexpr (kUniform) return {factor * product, Lanes::set1(error_[row])};
    Reg constant = Lanes::load(keys_.shift.data() + key);
    if (queries_.has_bias)
      constant = fma_once<Lanes>(Lanes::load(keys_.weight.data() + key),
                                 Lanes::set1(queries_.bias[first_ + row]), constant);
    return {fma_once<Lanes>(factor, product, constant),
            Lanes::load(keys_.size.data() + key) * Lanes::set1(reach_[row])};
  }

  // Notes what may be among the best. Queries whose lists stay full are closed.
  template <bool kUniform>
  void run(Notes& notes) {
    constexpr int kTogether = 4;  // rows that one branch leaves out
    for (int row = 0; row < groups_ * kGroup; ++row) set_bar<kUniform>(notes, row);
    products([&](const float* tiles, int first_row, int64_t key) {
#pragma GCC unroll 1
      for (int row = 0; row < kGroup; row += kTogether) {
        const float* at = row_of(tiles, row);
        uint32_t reached[kTogether], any = 0;
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          Reg top0 = Lanes::load(at + i * kRows), top1 = Lanes::load(at + i * kRows + kSums);
          if constexpr (!kUniform) {
            const Scores s0 = scores<false>(first_row + row + i, key, top0),
                         s1 = scores<false>(first_row + row + i, key + kRows, top1);
            top0 = s0.near + s0.error, top1 = s1.near + s1.error;
          }
          const Reg bar = Lanes::set1(bars_[first_row + row + i]);
          reached[i] = at_least(top0, bar) | at_least(top1, bar) << kRows;
          any |= reached[i];
        }
        if (any == 0) continue;
#pragma GCC unroll 1
        for (int i = 0; i < kTogether; ++i)
          if (reached[i] != 0) note<kUniform>(notes, first_row + row + i, key, reached[i], at + i * kRows);
      }
    });
  }

 private:
  template <bool kUniform>
  void set_bar(Notes& notes, int row) {
    float bar = notes.bars[first_ + row];
    if (kUniform && bar != kInfinity) {  // of products: a little lower, which only costs notes
      bar -= error_[row];
      bar = (bar - 8 * kUnit * (std::abs(bar) + error_[row])) / static_cast<float>(keys_.in.scale);
      bar -= 8 * kUnit * std::abs(bar);
    }
    bars_[row] = bar;
  }

  template <bool kUniform>
  [[gnu::noinline]] void note(Notes& notes, int row, int64_t key, uint32_t reached, const float* products) {
    if (keys_.count - key < kGroup) reached &= (1u << (keys_.count - key)) - 1;
    const int64_t p = first_ + row;
    for (int half = 0; half < 2; ++half, reached >>= kRows, key += kRows) {
      const uint32_t which = reached & 0xffffu;
      if (which == 0) continue;
      const Scores s = scores<kUniform>(row, key, Lanes::load(products + half * kSums));
      notes.add(p, which, s.near - s.error, s.near + s.error, keys_.begin + key);
    }
    if (!notes.full(p)) return;
    notes.sift(p);
    if (notes.full(p)) notes.close(p);
    set_bar<kUniform>(notes, row);
  }

  Queries& queries_;
  Keys& keys_;
  int64_t first_, groups_;
  // By query: what |f| |k| is multiplied by to bound an error; the greatest error of the block; and what a
  // score's upper bound, or without factors a product, must reach.
  alignas(64) float reach_[kTaskQueries], error_[kTaskQueries], bars_[kTaskQueries];
};

// Replaces the bounds of a query's notes of this block by the scores, as the FMA code computes them.
void check(Queries& queries, Keys& keys, Notes& notes, int64_t p) {
  float *lower = notes.lower.data() + p * notes.capacity, *upper = notes.upper.data() + p * notes.capacity;
  const int32_t* index = notes.index.data() + p * notes.capacity;
  const float* query = queries.rows.row(p);
  const int64_t count = notes.counts[p], elements = queries.rows.elements;
  int64_t from = count;
  while (from > 0 && index[from - 1] >= keys.begin) --from;
  for (; from < count; from += kRows) {
    const int64_t some = std::min<int64_t>(kRows, count - from);
    int64_t key[kRows];
    alignas(64) float factor[kRows], weight[kRows], shift[kRows], square[kSums], lanes[kSums];
    for (int i = 0; i < kRows; ++i) {
      key[i] = index[from + (i < some ? i : 0)] - keys.begin;
      factor[i] = keys.factor[key[i]], weight[i] = keys.weight[key[i]], shift[i] = keys.shift[key[i]];
    }
    Reg sum{};
    for (int64_t e = 0; e < elements; e += kRows) {
      for (int i = 0; i < kRows; ++i)
        Lanes::store(square + i * kRows, Lanes::load(keys.rows.row(key[i]) + e));
      transpose_lanes<Lanes>(square, kRows, lanes, kRows);
      const int64_t end = std::min<int64_t>(kRows, elements - e);
      for (int64_t i = 0; i < end; ++i)
        sum = fma_once<Lanes>(Lanes::set1(query[e + i]), Lanes::load(lanes + i * kRows), sum);
    }
    Reg constant = Lanes::load(shift);
    if (queries.has_bias)
      constant = fma_once<Lanes>(Lanes::load(weight), Lanes::set1(queries.bias[p]), constant);
    const Reg score = fma_once<Lanes>(Lanes::load(factor), sum, constant);
    for (int64_t i = 0; i < some; ++i) lower[from + i] = upper[from + i] = score[i];
  }
}

// The best k of the scores of up to 16 queries, in order: a note's place is how many are greater, and equal
// ones follow each other as their positions do.
void finish(Notes& notes, int64_t first, int64_t queries, float* score, int64_t* index) {
  const int64_t count = std::min<int64_t>(kRows, queries - first), top_k = notes.top_k;
  Workspace<float> scores(top_k * kRows);
  Workspace<int64_t> indices(top_k * kRows);
  std::fill_n(scores.data(), top_k * kRows, -kInfinity);
  std::fill_n(indices.data(), top_k * kRows, -1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = first + i, noted = notes.counts[p], whole = round_up(noted, kRows);
    float* all = notes.lower.data() + p * notes.capacity;
    std::fill(all + noted, all + whole, -kInfinity);
    for (int64_t j = 0; j < noted; ++j) {
      int64_t place = whole;
      for (int64_t other = 0; other < whole; other += kRows)
        place -= __builtin_popcount(at_least(Lanes::set1(all[j]), Lanes::load(all + other)));
      while (place < top_k && indices[place * kRows + i] >= 0) ++place;
      if (place >= top_k) continue;
      scores[place * kRows + i] = all[j];
      indices[place * kRows + i] = notes.index[p * notes.capacity + j];
    }
  }
  for (int64_t k = 0; k < top_k; ++k) {
    std::copy_n(scores.data() + k * kRows, count, score + k * queries + first);
    std::copy_n(indices.data() + k * kRows, count, index + k * queries + first);
  }
}

}  // namespace

bool selects(const ScoreInputs& in, int64_t top_k) {
  // Measured on an Intel Xeon (family 6, model 207) with 16 to 512 channels: below, FMA is as fast or faster.
  constexpr int64_t kLeastMemory = 512, kLeastQueries = 32, kLeastShare = 8;
  constexpr int64_t kLeastWork = int64_t{1} << 21, kLongList = 16;  // lists cost the FMA code more
  const int64_t channels = in.query.size(1);
  return in.key.scalar_type() != ScalarType::Double && channels > 0 && channels <= kMostElements &&
         in.queries() >= kLeastQueries && in.memory() >= kLeastMemory &&
         in.memory() <= std::numeric_limits<int32_t>::max() - kGroup && in.memory() / top_k >= kLeastShare &&
         (top_k >= kLongList || in.queries() * in.memory() * channels >= kLeastWork);
}

bool select_by_tiles(const ScoreInputs& in, int64_t n, int64_t top_k, float* score, int64_t* index,
                     std::vector<int64_t>& left) {
  constexpr int64_t kMostLeft = 4;  // a query in so many
  const int64_t count = in.queries();
  Queries queries(in, n);
  Keys keys(in, n);
  Notes notes(queries.groups * kGroup, top_k);
  for (int64_t p = count; p < queries.groups * kGroup; ++p) notes.close(p);
  const int64_t block = Keys::capacity(in);
  const int64_t together =
      std::clamp<int64_t>(kTaskBytes / (2 * queries.panel * sizeof(uint16_t)), 1, kTaskQueries / kGroup);
  const ReadSpan span = read_span<float>(in, n);
  for (int64_t begin = span.begin; begin < span.end; begin += block) {
    if (!keys.take(begin, std::min(block, span.end - begin))) {
      ++out_of_range;
      return false;
    }
    std::atomic<int64_t> closed{0};
    parallel_tasks(panels_of(queries.groups, together), [&] {
      return [&](int64_t task) {
        const int64_t first_group = task * together,
                      groups = std::min(together, queries.groups - first_group);
        Search search(queries, keys, first_group, groups);
        const int64_t first = first_group * kGroup, end = std::min(first + groups * kGroup, count);
        for (int64_t p = first; p < end; ++p) {
          notes.errors[p] = std::max(notes.errors[p], search.error(p - first));
          if (!search.is_finite(p - first)) notes.close(p);
        }
        {
          const Region region;
          keys.uniform ? search.run<true>(notes) : search.run<false>(notes);
        }
        int64_t closed_here = 0;
        for (int64_t p = first; p < end; ++p) {
          if (notes.closed(p)) {
            ++closed_here;
            continue;
          }
          notes.sift(p);
          check(queries, keys, notes, p);
        }
        closed.fetch_add(closed_here, std::memory_order_relaxed);
      };
    });
    if (closed.load() > count / kMostLeft) {
      ++given_up;
      return false;
    }
  }
  parallel_each(panels_of(count, kRows), [&](int64_t i) { finish(notes, i * kRows, count, score, index); });
  for (int64_t p = 0; p < count; ++p)
    if (notes.closed(p)) left.push_back(p), ++queries_left;
  ++served;
  return true;
}

void filter_bounds(const ScoreInputs& in, int64_t n, float* approximation, float* bound) {
  Queries queries(in, n);
  Keys keys(in, n);
  const int64_t block = Keys::capacity(in), count = in.queries();
  for (int64_t begin = 0; begin < in.memory(); begin += block) {
    keys.take(begin, std::min(block, in.memory() - begin));
    for (int64_t group = 0; group < queries.groups; ++group) {
      const Search search(queries, keys, group, 1);
      const Region region;
      search.products([&](const float* tiles, int, int64_t key) {
        for (int row = 0; row < kGroup; ++row) {
          const int64_t p = group * kGroup + row;
          for (int64_t first = key; first < key + kGroup; first += kRows) {
            const Reg product = Lanes::load(Search::row_of(tiles, row) + (first - key) / kRows * kSums);
            const auto s = keys.uniform ? search.scores<true>(row, first, product)
                                        : search.scores<false>(row, first, product);
            for (int i = 0; i < kRows; ++i) {
              if (p >= count || first + i >= keys.count) continue;
              const int64_t at = (begin + first + i) * count + p;
              approximation[at] = s.near[i];
              bound[at] = s.error[i] + 4 * kUnit * (std::abs(s.near[i]) + s.error[i]);
            }
          }
        }
      });
    }
  }
}

}  // namespace vosops::cpu::amx

#endif
