// Reading tensors of any stride and floating dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace vosops::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The compiler's own half, whose conversions are vector instructions; g++ 12 knows only this name on Arm.
#if defined(__aarch64__)
using NativeHalf = __fp16;
#define VOSOPS_NATIVE_HALF
#elif defined(__FLT16_MANT_DIG__)
using NativeHalf = _Float16;
#define VOSOPS_NATIVE_HALF
#endif

// float64 accumulates in itself, everything else in float32.
template <class S>
using Accumulator = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
inline Accumulator<S> widen(S value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    uint32_t bits = static_cast<uint32_t>(value.x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
#if defined(VOSOPS_NATIVE_HALF)
  } else if constexpr (std::is_same_v<S, Half>) {
    NativeHalf half;
    std::memcpy(&half, &value, sizeof half);
    return static_cast<float>(half);
#endif
  } else {
    return static_cast<Accumulator<S>>(value);
  }
}

// Calls f with a value of the C++ type of `dtype`.
template <class F>
void dispatch_floating(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "expected float32, float16, bfloat16 or float64");
  }
}

inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace vosops::cpu
