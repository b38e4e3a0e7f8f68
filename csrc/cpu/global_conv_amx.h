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

// Whether PyTorch's sums by the engine make the gradient of a bfloat16 weight faster than Winograd
// arithmetic.
bool amx_sums_weights(const Tensor& grad);

}  // namespace vosops::cpu::global_conv
