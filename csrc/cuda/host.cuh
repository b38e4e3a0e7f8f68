// What the host side of every kernel needs: dtypes, precision, sizes of grids, and sorting by PyTorch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "common/checks.h"
#include "dtypes.cuh"
#include "launch.cuh"

namespace vosops::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int64_t kMostPixels =
    (int64_t{1} << 31) - 1;  // of one batch element: flat indices are 32 bits in kernels

template <class A>
__host__ __device__ constexpr A ceil_div(A a, A b) {
  return (a + b - 1) / b;
}

inline unsigned checked_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMostPixels, "too many pixels in all");
  return unsigned(blocks);
}

template <class E>
constexpr ScalarType kScalarType = std::is_same_v<E, float>  ? ScalarType::Float
                                   : std::is_same_v<E, half> ? ScalarType::Half
                                                             : ScalarType::BFloat16;

inline bool is_16_bit(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16;
}

enum class Precision { kIeee, kTf32, kTf32x3 };

inline Precision parse_precision(std::string_view name) {
  if (name == "ieee" || name == "highest") return Precision::kIeee;
  if (name == "tf32" || name == "high" || name == "medium") return Precision::kTf32;
  STD_TORCH_CHECK(name == "tf32x3", "precision must be ieee, tf32 or tf32x3, got ", std::string(name));
  return Precision::kTf32x3;
}

// Calls f with a value of the tensor's element type.
template <class F>
void dispatch(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(half{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    default:
      STD_TORCH_CHECK(false, "the CUDA kernels take float32, float16 and bfloat16 only");
  }
}

// aten::sort.stable along the last dimension, ascending: values, order.
inline std::tuple<Tensor, Tensor> stable_sort(const Tensor& tensor) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(tensor), from(std::optional<bool>(true)), from(int64_t{-1}),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace vosops::cuda
