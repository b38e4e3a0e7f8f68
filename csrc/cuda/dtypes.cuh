// The element types of the ops, for nvcc and the emulator alike: loads and stores that compute in float32.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulator.h"
#endif

namespace vosops::cuda {

using half = c10::Half;
using bfloat16 = c10::BFloat16;

template <class T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}

constexpr int kVectorBytes = 16;

// 16 bytes of elements, loaded and stored at once.
template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / int(sizeof(T));
  T values[kSize];
};

__device__ __forceinline__ bool is_finite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

}  // namespace vosops::cuda
