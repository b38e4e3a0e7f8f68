// Candidates of a search: the order of (score, index) as the order of one integer; the least is the best.
#pragma once

#include <cstdint>

#include "dtypes.cuh"

namespace vosops::cuda {

using Candidate = unsigned long long;
constexpr Candidate kNoCandidate = ~0ull;

// Floats in their order, -inf first. Zero must be positive, NaN must not come.
__device__ __forceinline__ uint32_t ordered(float score) {
  const uint32_t bits = __float_as_uint(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ Candidate candidate(uint32_t ordered_score, uint32_t index) {
  return Candidate{ordered_score} << 32 | index;
}

}  // namespace vosops::cuda
