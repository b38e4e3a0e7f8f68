// What the backward passes of the memory read on the CPU share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string_view>

#include "common/score_inputs.h"

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
};

#if defined(VOSOPS_AMX)
namespace amx {

// Computes the gradients by the matrix engine. False where it does not take the problem or met numbers out of
// its range: then they are still to be computed.
bool read_backward(const ReadBackward& read, std::string_view precision, ReadGradients& gradients);

}  // namespace amx
#endif

}  // namespace vosops::cpu
