// What the tensor-core kernels of matching share: the arithmetic of one mma step in each precision.
#pragma once

#include "intrinsics.cuh"

namespace vosops::cuda {

constexpr int kStepBytes = 32;  // of a row that one mma takes: 16 channels of 2 bytes or 8 of 4 bytes

// Rows of whole steps in shared memory, 16 bytes apart from a multiple of 32: ldmatrix meets no bank
// conflict.
template <int kSteps>
constexpr int kRowPitch = kSteps * kStepBytes + kVectorBytes;

enum class Arithmetic { kPlain, kSplit };  // kSplit: float as the sum of two TF32 numbers, three products

// A factor's registers as mma takes them: 16-bit elements as they are, float rounded to TF32, or split into
// two TF32 numbers.
template <class T, Arithmetic kArithmetic, int kCount>
__device__ __forceinline__ void prepare(uint32_t (&high)[kCount], uint32_t (&low)[kCount]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float x = __uint_as_float(high[i]);
      high[i] = to_tf32(x);
      if constexpr (kArithmetic == Arithmetic::kSplit) low[i] = to_tf32(x - __uint_as_float(high[i]));
    }
  }
}

// The right factors of two tiles of 8 rows, of which lanes 8i .. 8i+7 name halves (the first tile's first and
// second 16 bytes, then the second tile's): registers 2j and 2j + 1 are tile j's. Without `both` the first
// tile only.
__device__ __forceinline__ void load_tiles(uint32_t (&registers)[4], const void* row, bool both) {
  if (both) {
    load_matrices<4>(registers, row);
  } else {
    uint32_t first[2];
    load_matrices<2>(first, row);
    registers[0] = first[0];
    registers[1] = first[1];
  }
}

// d = c + a b for a tile of 16 x 8.
template <class T, Arithmetic kArithmetic>
__device__ __forceinline__ void step_from(float (&d)[4], const float (&c)[4], const uint32_t (&a)[4],
                                          const uint32_t (&a_low)[4], const uint32_t (&b)[2],
                                          const uint32_t (&b_low)[2]) {
  if constexpr (kArithmetic == Arithmetic::kSplit) {
    multiply_add<T>(d, c, a_low, b);
    multiply_accumulate<T>(d, a, b_low);
    multiply_accumulate<T>(d, a, b);
  } else {
    multiply_add<T>(d, c, a, b);
  }
}

// c += a b.
template <class T, Arithmetic kArithmetic>
__device__ __forceinline__ void step(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&a_low)[4],
                                     const uint32_t (&b)[2], const uint32_t (&b_low)[2]) {
  step_from<T, kArithmetic>(c, c, a, a_low, b, b_low);
}

}  // namespace vosops::cuda
