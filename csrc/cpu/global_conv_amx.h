// Line convolutions by the matrix engine (amx_conv.h), for global_conv.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/global_conv.h"

namespace vosops::cpu::global_conv {

// One line convolution: of a map by a weight, or that convolution's gradient of its input.
struct LineTerm {
  const Tensor& map;
  const Tensor& weight;
  bool input_gradient;
};

// Writes the sum of line convolutions, and of a bias for each output, to `out`. False, and nothing is
// written, where the engine is not to be used or cannot: then another way must be taken.
bool amx_lines(const std::vector<LineTerm>& terms, const MaybeTensor& bias, Tensor& out);

// Writes the gradient of dense bfloat16 weights (M,C,k,1) or (M,C,1,k), from a map (N,C,H,W) and the gradient
// (N,M,H,W) of its convolution. False, and nothing is written, where the engine is not to be used.
bool amx_weights(const Tensor& x, const Tensor& grad, Tensor& weight);

}  // namespace vosops::cpu::global_conv
