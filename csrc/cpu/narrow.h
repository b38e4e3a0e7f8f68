// Rounding rows of sums to the element type of a result.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/strided.h"

namespace vosops::cpu {

// Rounds `count` sums to S, in a loop that becomes vector code.
template <class S>
void narrow_row(const Accumulator<S>* __restrict from, int64_t count, S* __restrict to) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, 4);
      const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = 0x7fc0;
      to[i].x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
    }
#if defined(VOSOPS_NATIVE_HALF)
  } else if constexpr (std::is_same_v<S, Half>) {
    for (int64_t i = 0; i < count; ++i) {
      const NativeHalf half = static_cast<NativeHalf>(from[i]);
      std::memcpy(to + i, &half, sizeof half);
    }
#endif
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(from[i]);
  }
}

}  // namespace vosops::cpu
