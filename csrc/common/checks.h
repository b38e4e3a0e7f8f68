// The second line of checks: Python has raised a ValueError that names the argument before these can fail.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace vosops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAnySize = -1;

// Checks the number of dimensions of `tensor` and every size that is not kAnySize.
inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ",
                  std::to_string(sizes.size()), " dimensions, got ", std::to_string(tensor.dim()));
  int64_t dim = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size == kAnySize || tensor.size(dim) == size, name, " dimension ", std::to_string(dim),
                    " must have size ", std::to_string(size), ", got ", std::to_string(tensor.size(dim)));
    ++dim;
  }
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType wanted) {
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, name, " has the wrong dtype ",
                  std::to_string(static_cast<int>(tensor.scalar_type())), ", expected ",
                  std::to_string(static_cast<int>(wanted)));
}

}  // namespace vosops
