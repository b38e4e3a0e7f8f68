// The scores of a memory read (common/score_inputs.h) on the CPU, shared by the streaming softmax, its
// backward, the usage and the selection.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>

#include "common/checks.h"
#include "common/score_inputs.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"

namespace vosops::cpu {

// Positions of the memory that are packed and read together: a multiple of both panel widths.
constexpr int64_t kMemoryBlock = 288;

constexpr double kLog2E = 1.4426950408889634;

inline void check_scores(const ScoreInputs& in) {
  check_scores(in, accumulator_dtype(in.key.scalar_type()));
}

// a * b + c, rounded once where the instructions are compiled for. V::fma() promises that only where compiler
// finds product and sum side by side; equal keys must have equal scores wherever they lie in a tile.
template <class V>
[[gnu::always_inline]] inline typename V::Reg fma_once(typename V::Reg a, typename V::Reg b,
                                                       typename V::Reg c) {
  [[maybe_unused]] constexpr bool is_float = std::is_same_v<typename V::T, float>;
#if defined(__AVX512F__)
  if constexpr (sizeof a == 64 && is_float) return (typename V::Reg)_mm512_fmadd_ps(a, b, c);
  if constexpr (sizeof a == 64 && !is_float) return (typename V::Reg)_mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  constexpr int kParts = sizeof a / 32;
  if constexpr (is_float) {
    __m256 x[kParts], y[kParts], z[kParts];
    std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b), std::memcpy(z, &c, sizeof c);
    for (int i = 0; i < kParts; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    std::memcpy(&c, z, sizeof c);
    return c;
  } else {
    __m256d x[kParts], y[kParts], z[kParts];
    std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b), std::memcpy(z, &c, sizeof c);
    for (int i = 0; i < kParts; ++i) z[i] = _mm256_fmadd_pd(x[i], y[i], z[i]);
    std::memcpy(&c, z, sizeof c);
    return c;
  }
#elif defined(__aarch64__)
  if constexpr (sizeof a == 16 && is_float) return vfmaq_f32(c, a, b);
  if constexpr (sizeof a == 16 && !is_float) return vfmaq_f64(c, a, b);
#endif
  return V::fma(a, b, c);
}

// Row n of an optional (N, size) tensor, or a constant.
template <class T>
struct OptionalRow {
  const T* data;
  int64_t stride;
  T missing;

  OptionalRow(const std::optional<Tensor>& tensor, int64_t n, T missing_)
      : data(tensor ? tensor->const_data_ptr<T>() + n * tensor->stride(0) : nullptr),
        stride(tensor ? tensor->stride(1) : 0),
        missing(missing_) {}
  T operator[](int64_t i) const { return data == nullptr ? missing : data[i * stride]; }
};

// Adjacent memory positions of a batch element.
struct ReadSpan {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// From the first to the last position whose bias is not -inf: the others, as those beyond a batch element's
// own length, cost a look at their bias. One position where there is no such, so that there is a block.
template <class T>
ReadSpan read_span(const ScoreInputs& in, int64_t n) {
  const OptionalRow<T> biases(in.key_bias, n, T{0});
  const auto is_read = [&](int64_t m) { return biases[m] != -std::numeric_limits<T>::infinity(); };
  ReadSpan span{0, in.memory()};
  if (biases.data == nullptr) return span;
  while (span.end > 1 && !is_read(span.end - 1)) --span.end;
  while (span.size() > 1 && !is_read(span.begin)) ++span.begin;
  return span;
}

inline int64_t panels_of(int64_t size, int64_t width) {
  return (size + width - 1) / width;
}

// All query pixels of one batch element as lane panels.
template <class E>
struct PackedQueries {
  using T = typename E::Lanes::T;
  static constexpr int64_t kLanes = kLanePanel<typename E::Lanes>;

  int64_t queries, panels, elements;
  Workspace<T> data, bias;
  bool has_bias;

  PackedQueries(const ScoreInputs& in, int64_t n)
      : queries(in.queries()),
        panels(panels_of(queries, kLanes)),
        elements(elements_of<E>(in.query.size(1))),
        data(panels * elements * kLanes),
        bias(panels * kLanes),
        has_bias(in.query_bias.has_value()) {
    const StridedMatrix matrix = StridedMatrix::of(in.query, n * in.query.stride(0));
    const OptionalRow<T> source(in.query_bias, n, T{0});
    parallel_each(panels, [&](int64_t i) {
      pack_pixels<E, kLanes>(matrix, i * kLanes, count(i), lanes(i));
      for (int64_t p = 0; p < kLanes; ++p)
        bias[i * kLanes + p] = p < count(i) ? source[i * kLanes + p] : T{0};
    });
  }
  int64_t count(int64_t panel) const { return std::min<int64_t>(kLanes, queries - panel * kLanes); }
  T* lanes(int64_t panel) { return data.data() + panel * elements * kLanes; }
};

// The log-sum-exp of one batch element in powers of two, per lane; +inf, which makes every weight 0, where
// there is no query or nothing was read.
template <class E>
struct PackedLse {
  using T = typename E::Lanes::T;
  Workspace<T> data;

  PackedLse(const Tensor& lse, int64_t n, const PackedQueries<E>& queries)
      : data(queries.panels * PackedQueries<E>::kLanes) {
    const T* row = lse.const_data_ptr<T>() + n * lse.stride(0);
    for (int64_t p = 0; p < queries.panels * PackedQueries<E>::kLanes; ++p) {
      const T value = p < queries.queries ? row[p * lse.stride(1)] : -std::numeric_limits<T>::infinity();
      data[p] = value == -std::numeric_limits<T>::infinity() ? -value : value * static_cast<T>(kLog2E);
    }
  }
};

// Up to `capacity` memory positions as key panels, with what turns their products into scores.
template <class E>
struct PackedMemory {
  using T = typename E::Lanes::T;

  const ScoreInputs& in;
  int64_t n, channels, elements;
  T unit;  // scores are multiplied by this: 1, or log2(e) for powers of two
  int64_t begin = 0, count = 0;
  Workspace<T> data, factor, shrinkage, shift;  // score = factor * product + shrinkage * query_bias + shift

  PackedMemory(const ScoreInputs& in_, int64_t n_, T unit_, int64_t capacity = kMemoryBlock)
      : in(in_),
        n(n_),
        channels(in.key.size(1)),
        elements(elements_of<E>(in.query.size(1))),
        unit(unit_),
        data(capacity * elements),
        factor(capacity),
        shrinkage(capacity),
        shift(capacity) {}

  int64_t panels() const { return panels_of(count, kKeyPanel); }
  T* keys(int64_t panel) { return data.data() + panel * elements * kKeyPanel; }

  // Chooses positions [begin, begin + count); pack_panel(i) must follow for every panel.
  void start(int64_t begin_, int64_t count_) {
    begin = begin_;
    count = count_;
  }

  void pack_panel(int64_t i) {
    const int64_t first = i * kKeyPanel, used = std::min<int64_t>(kKeyPanel, count - first);
    const StridedMatrix matrix = StridedMatrix::of(in.key, n * in.key.stride(0));
    pack_pixels<E, kKeyPanel>(matrix, begin + first, used, keys(i));
    const OptionalRow<T> factors(in.shrinkage, n, T{1}), biases(in.key_bias, n, T{0});
    for (int64_t j = 0; j < kKeyPanel; ++j) {
      const int64_t m = begin + first + j;
      const bool is_used = j < used && biases[m] != -std::numeric_limits<T>::infinity();
      shrinkage[first + j] = is_used ? factors[m] * unit : T{0};
      factor[first + j] = shrinkage[first + j] * static_cast<T>(in.scale);
      shift[first + j] = is_used ? biases[m] * unit : -std::numeric_limits<T>::infinity();
      if (j < used && !is_used)  // an excluded position may hold anything
        for (int64_t e = 0; e < elements_of<E>(channels); ++e) keys(i)[panel_at<E>(e, j, kKeyPanel)] = T{0};
    }
    if (in.squares()) {
      const T* plain = keys(i);
      T* squared = keys(i) + channels * kKeyPanel;
      for (int64_t j = 0; j < channels * kKeyPanel; ++j) squared[j] = plain[j] * plain[j];
    }
  }

  // Computes the scores of key panel i with a lane panel in registers and hands them to finish(scores).
  template <class Finish>
  [[gnu::always_inline]] void score(int64_t i, const T* lanes, const T* query_bias, const Finish& finish) {
    using V = typename E::Lanes;
    const T* f = factor.data() + i * kKeyPanel;
    const T* w = shrinkage.data() + i * kKeyPanel;
    const T* s = shift.data() + i * kKeyPanel;
    multiply<E>(
        lanes, keys(i), elements, [](int, int) { return typename V::Reg{}; },
        [&](TileSums<E>& sums) {
#pragma GCC unroll 16
          for (int j = 0; j < kKeyPanel; ++j) {
#pragma GCC unroll 16
            for (int r = 0; r < kTileRegisters; ++r) {
              typename V::Reg constant = V::set1(s[j]);
              if (query_bias != nullptr)
                constant = fma_once<V>(V::set1(w[j]), V::load(query_bias + r * V::kLanes), constant);
              sums[j][r] = fma_once<V>(V::set1(f[j]), sums[j][r], constant);
            }
          }
          finish(sums);
        });
  }
};

// Calls f(E): the element that multiplies these keys. Pairs of bfloat16 where query and key are that.
template <class Function>
void with_score_element(const ScoreInputs& in, const Function& f) {
  if (in.key.scalar_type() == ScalarType::Double) return f(FloatElement<Vec<double, kRegisterBytes>>{});
#if defined(VOSOPS_BF16_DOT)
  const bool pairs = in.key.scalar_type() == ScalarType::BFloat16 &&
                     in.query.scalar_type() == ScalarType::BFloat16 && !in.squares();
  if (pairs && has_bf16_dot()) return f(Bf16Element{});
#endif
  f(FloatElement<Vec<float, kRegisterBytes>>{});
}

}  // namespace vosops::cpu
