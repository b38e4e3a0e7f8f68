// The scores of a memory read and what they are made of, on every backend:
// score[m, p] = shrinkage[m] * (scale * key[m] . query[p] + query_bias[p]) + key_bias[m].
// A query of twice the key's channels meets the key's channels followed by their squares.
#pragma once

#include <cstdint>
#include <optional>

#include "common/checks.h"

namespace vosops {

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

// Checks shapes and dtypes; `accumulator` is the dtype that sums of the key's elements have.
inline void check_scores(const ScoreInputs& in, ScalarType accumulator) {
  check_shape("query", in.query, {kAnySize, kAnySize, kAnySize});
  check_shape("key", in.key, {in.batch(), kAnySize, kAnySize});
  STD_TORCH_CHECK(in.query.size(1) == in.key.size(1) || in.query.size(1) == 2 * in.key.size(1),
                  "query must have the channels of key or twice as many");
  STD_TORCH_CHECK(in.query.scalar_type() == accumulator || in.query.scalar_type() == in.key.scalar_type(),
                  "query must have the dtype of key or of its accumulator");
  const auto check_vector = [&](const char* name, const std::optional<Tensor>& vector, int64_t size) {
    if (!vector) return;
    check_shape(name, *vector, {in.batch(), size});
    check_dtype(name, *vector, accumulator);
  };
  check_vector("shrinkage", in.shrinkage, in.memory());
  check_vector("query_bias", in.query_bias, in.queries());
  check_vector("key_bias", in.key_bias, in.memory());
}

}  // namespace vosops
