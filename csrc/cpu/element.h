// How channels enter a dot product: one by one, or as pairs of bfloat16 where the processor multiplies those.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/strided.h"
#include "cpu/vec.h"

namespace vosops::cpu {

// An element is one channel, in the accumulator's type.
template <class V>
struct FloatElement {
  using Lanes = V;
  static constexpr int kChannels = 1;  // channels in one element
  static constexpr int kRun = 1;       // elements of one pixel side by side in a panel
  static typename V::Reg dot(typename V::Reg q, typename V::Reg k, typename V::Reg sum) {
    return V::fma(q, k, sum);
  }
  static typename V::T squared_difference(typename V::T q, typename V::T k) { return (q - k) * (q - k); }
  static void clear(typename V::T& element, int64_t) { element = 0; }  // its only channel
};

#if defined(VOSOPS_BF16_DOT)
// An element is two bfloat16 channels side by side in 32 bits.
template <class V>
struct Bf16PairElement {
  using Lanes = V;
  static constexpr int kChannels = 2;
  static constexpr int kRun = 1;
  static typename V::Reg dot(typename V::Reg q, typename V::Reg k, typename V::Reg sum) {
    return bf16_dot(q, k, sum);
  }
  static float pair(BFloat16 low, BFloat16 high) {
    const uint32_t bits = static_cast<uint32_t>(low.x) | static_cast<uint32_t>(high.x) << 16;
    float element;
    std::memcpy(&element, &bits, 4);
    return element;
  }
  // Makes one of its channels zero.
  static void clear(float& element, int64_t channel) {
    uint32_t bits;
    std::memcpy(&bits, &element, 4);
    bits &= channel == 0 ? 0xffff0000u : 0x0000ffffu;
    std::memcpy(&element, &bits, 4);
  }
  // Two registers of float32, rounded to nearest even.
  static typename V::Reg round_pair(typename V::Reg low, typename V::Reg high) {
    return (typename V::Reg)((rounded(low) >> 16) | (rounded(high) & 0xffff0000u));
  }
  static float squared_difference(float q, float k) {
    uint32_t a, b;
    std::memcpy(&a, &q, 4);
    std::memcpy(&b, &k, 4);
    const float low = half_of(a << 16) - half_of(b << 16);
    const float high = half_of(a & 0xffff0000u) - half_of(b & 0xffff0000u);
    return low * low + high * high;
  }

 private:
  typedef uint32_t Bits __attribute__((vector_size(sizeof(typename V::Reg))));
  // The register with its upper halves rounded; its lower halves hold what was rounded away.
  static Bits rounded(typename V::Reg value) {
    const Bits bits = (Bits)value;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static float half_of(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
};

// What the products of matrices multiply bfloat16 as.
#if defined(VOSOPS_BF16_MATRIX)
// Two such pairs, four channels of one pixel, lie side by side.
struct Bf16Element : Bf16PairElement<Vec<float, kRegisterBytes>> {
  static constexpr int kRun = 2;
};
#else
using Bf16Element = Bf16PairElement<Vec<float, kRegisterBytes>>;
#endif
#endif

// How many elements hold so many channels: whole runs.
template <class E>
constexpr int64_t elements_of(int64_t channels) {
  constexpr int64_t kRunChannels = E::kRun * E::kChannels;
  return (channels + kRunChannels - 1) / kRunChannels * E::kRun;
}

// Where an element of pixel or key i lies in a panel of `width` of them.
template <class E>
constexpr int64_t panel_at(int64_t element, int64_t i, int64_t width) {
  return (element / E::kRun * width + i) * E::kRun + element % E::kRun;
}

// Packs element `element` of `count` pixels to every kRun-th place of out and adds its square to
// norm[0 .. count). Pixel x lies at base + offset(x).
template <class E, class S, class Offset>
void pack_element(const S* base, const Offset& offset, int64_t channel_stride, int64_t channels,
                  int64_t element, int64_t count, typename E::Lanes::T* out, typename E::Lanes::T* norm) {
  using T = typename E::Lanes::T;
  if constexpr (E::kChannels == 1) {
    const S* source = base + element * channel_stride;
    for (int64_t x = 0; x < count; ++x) {
      const T value = widen(source[offset(x)]);
      out[x] = value;
      norm[x] += value * value;
    }
  } else {
    const S* source = base + 2 * element * channel_stride;
    const bool has_first = E::kRun == 1 || 2 * element < channels, has_second = 2 * element + 1 < channels;
    for (int64_t x = 0; x < count; ++x) {
      const S low = has_first ? source[offset(x)] : S(0.f);
      const S high = has_second ? source[offset(x) + channel_stride] : S(0.f);
      out[x * E::kRun] = E::pair(low, high);
      norm[x] += widen(low) * widen(low) + widen(high) * widen(high);
    }
  }
}

}  // namespace vosops::cpu
