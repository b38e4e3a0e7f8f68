// The scores of a memory read, shared by the streaming softmax, its backward, the usage and the selection:
// score[m, p] = shrinkage[m] * (scale * key[m] . query[p] + query_bias[p]) + key_bias[m].
// A query of twice the key's channels meets the key's channels followed by their squares.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "common/checks.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"

namespace vosops::cpu {

// Positions of the memory that are packed and read together: a multiple of both panel widths.
constexpr int64_t kMemoryBlock = 288;

struct ScoreInputs {
  const Tensor& query;                      // (N, C or 2 C, P)
  const Tensor& key;                        // (N, C, M)
  const std::optional<Tensor>& shrinkage;   // (N, M) of the accumulator's dtype, as both biases
  const std::optional<Tensor>& query_bias;  // (N, P)
  const std::optional<Tensor>& key_bias;    // (N, M)
  double scale;

  int64_t batch() const { return query.size(0); }
  int64_t queries() const { return query.size(2); }
  int64_t memory() const { return key.size(2); }
  bool squares() const { return query.size(1) != key.size(1); }
};

inline void check_scores(const ScoreInputs& in) {
  check_shape("query", in.query, {kAnySize, kAnySize, kAnySize});
  check_shape("key", in.key, {in.batch(), kAnySize, kAnySize});
  STD_TORCH_CHECK(in.query.size(1) == in.key.size(1) || in.query.size(1) == 2 * in.key.size(1),
                  "query must have the channels of key or twice as many");
  const ScalarType wide = accumulator_dtype(in.key.scalar_type());
  STD_TORCH_CHECK(in.query.scalar_type() == wide || in.query.scalar_type() == in.key.scalar_type(),
                  "query must have the dtype of key or of its accumulator");
  const auto check_vector = [&](const char* name, const std::optional<Tensor>& vector, int64_t size) {
    if (!vector) return;
    check_shape(name, *vector, {in.batch(), size});
    check_dtype(name, *vector, wide);
  };
  check_vector("shrinkage", in.shrinkage, in.memory());
  check_vector("query_bias", in.query_bias, in.queries());
  check_vector("key_bias", in.key_bias, in.memory());
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

// Calls f(i) for i in [0, count) on the pool.
template <class F>
void parallel_each(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
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

// Up to `capacity` memory positions as key panels, with what turns their products into scores.
template <class E>
struct PackedMemory {
  using T = typename E::Lanes::T;

  const ScoreInputs& in;
  int64_t n, channels, elements;
  T unit;  // scores are multiplied by this: 1, or log2(e) for powers of two
  int64_t begin = 0, count = 0;
  Workspace<T> data, factor, slope, shift;  // score = factor * product + slope * query_bias + shift

  PackedMemory(const ScoreInputs& in_, int64_t n_, T unit_, int64_t capacity = kMemoryBlock)
      : in(in_),
        n(n_),
        channels(in.key.size(1)),
        elements(elements_of<E>(in.query.size(1))),
        unit(unit_),
        data(capacity * elements),
        factor(capacity),
        slope(capacity),
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
    const OptionalRow<T> shrinkage(in.shrinkage, n, T{1}), bias(in.key_bias, n, T{0});
    for (int64_t j = 0; j < kKeyPanel; ++j) {
      const int64_t m = begin + first + j;
      const bool is_used = j < used && bias[m] != -std::numeric_limits<T>::infinity();
      slope[first + j] = is_used ? shrinkage[m] * unit : T{0};
      factor[first + j] = slope[first + j] * static_cast<T>(in.scale);
      shift[first + j] = is_used ? bias[m] * unit : -std::numeric_limits<T>::infinity();
      if (j < used && !is_used)  // an excluded position may hold anything
        for (int64_t e = 0; e < elements_of<E>(channels); ++e) keys(i)[e * kKeyPanel + j] = T{0};
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
    const T* w = slope.data() + i * kKeyPanel;
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
                constant = V::fma(V::set1(w[j]), V::load(query_bias + r * V::kLanes), constant);
              sums[j][r] = V::fma(V::set1(f[j]), sums[j][r], constant);
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
#if defined(__AVX512BF16__)
  const bool pairs = in.key.scalar_type() == ScalarType::BFloat16 &&
                     in.query.scalar_type() == ScalarType::BFloat16 && !in.squares();
  if (pairs && has_bf16_dot()) return f(Bf16PairElement<Vec<float, 64>>{});
#endif
  f(FloatElement<Vec<float, kRegisterBytes>>{});
}

}  // namespace vosops::cpu
