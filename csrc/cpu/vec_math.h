// Elementary functions of a register of lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/vec.h"

namespace vosops::cpu {

// 2^x for x <= 0; below the least normal number 0. Relative error of float32 below 2e-7; float64 is
// std::exp2.
template <class V>
typename V::Reg exp2_of_negative(typename V::Reg x) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < V::kLanes; ++i) x[i] = std::exp2(x[i]);
    return x;
  } else {
    constexpr float kLeast = -126;
    // Adding this and taking it away rounds to an integer, which stays in the low bits of the sum.
    constexpr float kRound = 12582912;  // 1.5 * 2^23
    const Reg clamped = x < kLeast ? V::set1(kLeast) : x;
    const Reg sum = clamped + kRound;
    const Reg fraction = clamped - (sum - kRound);  // in [-1/2, 1/2]
    Reg power = V::set1(1.535336188319500e-4f);
    for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                    2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f})
      power = V::fma(power, fraction, V::set1(c));
    typename V::CodeReg bits;
    std::memcpy(&bits, &sum, sizeof bits);
    bits = (bits << 23) + (int32_t{127} << 23);
    Reg scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < kLeast ? Reg{} : power * scale;
  }
}

}  // namespace vosops::cpu
