// What the backward passes of the memory read on the CPU share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "common/score_inputs.h"
#include "cpu/memory_scores.h"
#include "cpu/parallel.h"

namespace vosops::cpu {

// What is differentiated, and its results.
struct ReadBackward {
  const ScoreInputs& in;
  const Tensor& value;     // (N, O, Cv, M)
  const Tensor& grad_out;  // (N, O, Cv, P)
  const Tensor& grad_lse;  // (N, P)
  const Tensor& out;       // (N, O, Cv, P)
  const Tensor& lse;       // (N, P)
};

// Contiguous, of the shapes of what they are the gradients of; (N, 0) where there was no input.
struct ReadGradients {
  Tensor query, key, value, shrinkage, query_bias, key_bias;

  // Zeros for the memory positions of batch element n that are not within `span`.
  void clear_outside(int64_t n, const ReadSpan& span) {
    for (Tensor* gradient : {&key, &value, &shrinkage, &key_bias}) {
      const int64_t positions = gradient->size(gradient->dim() - 1), batch = gradient->size(0);
      if (positions == 0 || span.size() == positions) continue;
      const int64_t rows = gradient->numel() / positions / batch;
      dispatch_floating(gradient->scalar_type(), [&]<class S>(S) {
        S* from = gradient->mutable_data_ptr<S>() + n * rows * positions;
        parallel_each(rows, [&](int64_t row) {
          std::fill(from + row * positions, from + row * positions + span.begin, S{});
          std::fill(from + row * positions + span.end, from + (row + 1) * positions, S{});
        });
      });
    }
  }
};

#if defined(VOSOPS_AMX)
namespace amx {

// Computes the gradients by the matrix engine. False where it does not take the problem or met numbers out of
// its range: then they are still to be computed.
bool read_backward(const ReadBackward& read, std::string_view precision, ReadGradients& gradients);

}  // namespace amx
#endif

}  // namespace vosops::cpu
