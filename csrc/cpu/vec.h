// One register of lanes, the same few operations on every instruction set. Each CPU library is compiled from
// the same sources with other flags; nothing here is shared between two of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace vosops::cpu {

// kBytes bytes of lanes of T (float or double) in GCC's vector extension.
template <class T_, int kBytes>
struct Vec {
  using T = T_;
  using Code = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as a lane
  static constexpr int kLanes = kBytes / sizeof(T);
  typedef T Reg __attribute__((vector_size(kBytes)));
  typedef Code CodeReg __attribute__((vector_size(kBytes)));

  static Reg set1(T value) { return value - Reg{}; }
  static Reg load(const T* p) {
    Reg r;
    std::memcpy(&r, p, kBytes);
    return r;
  }
  static void store(T* p, Reg r) { std::memcpy(p, &r, kBytes); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }

  // Keeps a loaded register out of the following instructions' memory operands: folding one unaligned load
  // into each of several FMAs halves their rate.
  static void pin(Reg& r) {
#if defined(__AVX512F__)
    if constexpr (kBytes <= 64) asm("" : "+v"(r));
#elif defined(__AVX2__)
    if constexpr (kBytes <= 32) asm("" : "+x"(r));
#elif defined(__ARM_NEON)
    if constexpr (kBytes <= 16) asm("" : "+w"(r));
#endif
  }

  // The same of one number, which Arm multiplies by where it lies in a register.
  static void pin_number(T& value) {
#if defined(__ARM_NEON)
    asm("" : "+w"(value));
#endif
  }

  static CodeReg load_code(const Code* p) {
    CodeReg r;
    std::memcpy(&r, p, kBytes);
    return r;
  }
  static void store_code(Code* p, CodeReg r) { std::memcpy(p, &r, kBytes); }

  // In every lane whose bit is set in `lanes` and whose value is below best: best = value, code = candidate.
  // A NaN is below nothing.
  static void take_less(Reg& best, CodeReg& code, Reg value, uint32_t lanes, CodeReg candidate) {
#if defined(__AVX512VL__)
    if constexpr (sizeof(T) == 4 && kBytes == 64) {
      const __mmask16 less = _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(lanes), value, best, _CMP_LT_OQ);
      best = _mm512_mask_mov_ps(best, less, value);
      code = (CodeReg)_mm512_mask_mov_epi32((__m512i)code, less, (__m512i)candidate);
      return;
    } else if constexpr (sizeof(T) == 4 && kBytes == 32) {
      const __mmask8 less = _mm256_mask_cmp_ps_mask(static_cast<__mmask8>(lanes), value, best, _CMP_LT_OQ);
      best = _mm256_mask_mov_ps(best, less, value);
      code = (CodeReg)_mm256_mask_mov_epi32((__m256i)code, less, (__m256i)candidate);
      return;
    }
#endif
    CodeReg bit;
    for (int i = 0; i < kLanes; ++i) bit[i] = Code{1} << i;
    const CodeReg less = (((static_cast<Code>(lanes) - CodeReg{}) & bit) != 0) & (value < best);
    best = less ? value : best;
    code = less ? candidate : code;
  }
};

// The lanes of two registers interleaved: their lower halves (kHigh = 0) or upper halves.
template <int kLanes, bool kHigh, class Reg, int... i>
inline Reg interleave(const Reg& a, const Reg& b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 2 + i % 2 * kLanes + (kHigh ? kLanes / 2 : 0))...);
}
template <int kLanes, bool kHigh, class Reg>
inline Reg interleave(const Reg& a, const Reg& b) {
  return interleave<kLanes, kHigh>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Transposes kLanes rows, the first kColumns values of each: to[j * to_stride + i] = from[i * from_stride +
// j]. Whole registers are read.
template <class V, int kColumns = V::kLanes>
void transpose_lanes(const typename V::T* from, int64_t from_stride, typename V::T* to, int64_t to_stride) {
  constexpr int kLanes = V::kLanes;
  typename V::Reg rows[kLanes], next[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = V::load(from + i * from_stride);
#pragma GCC unroll 4
  for (int half = 1; half < kLanes; half *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<kLanes, false>(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave<kLanes, true>(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kColumns; ++i) V::store(to + i * to_stride, rows[i]);
}

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 16;
#endif

// Arm multiplies by one lane of a register; x86 broadcasts from memory at no cost.
#if defined(__ARM_NEON)
constexpr bool kMultipliesByLane = true;
#else
constexpr bool kMultipliesByLane = false;
#endif

// Two bfloat16 side by side in 32 bits, as the dot-product instruction takes them. VOSOPS_BF16_DOT: it was
// compiled; has_bf16_dot(): the processor has it. VOSOPS_BF16_MATRIX: so is the one that multiplies matrices.
#if defined(__AVX512BF16__)
#define VOSOPS_BF16_DOT
inline bool has_bf16_dot() {
  return __builtin_cpu_supports("avx512bf16");
}
inline Vec<float, 64>::Reg bf16_dot(Vec<float, 64>::Reg a, Vec<float, 64>::Reg b, Vec<float, 64>::Reg sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
inline Vec<float, 32>::Reg bf16_dot(Vec<float, 32>::Reg a, Vec<float, 32>::Reg b, Vec<float, 32>::Reg sum) {
  return _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define VOSOPS_BF16_DOT
#define VOSOPS_BF16_MATRIX
inline bool has_bf16_dot() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which old headers do not name
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
// The sums are rounded to odd and denormals are 0, unlike those of fma(). The intrinsics of g++ would have
// the whole library compiled for Armv8.2.
inline Vec<float, 16>::Reg bf16_dot(Vec<float, 16>::Reg a, Vec<float, 16>::Reg b, Vec<float, 16>::Reg sum) {
  asm("bfdot %0.4s, %1.8h, %2.8h" : "+w"(sum) : "w"(a), "w"(b));
  return sum;
}
// a and b hold two rows of four bfloat16: adds row i of a times row j of b to lane 2 i + j.
inline Vec<float, 16>::Reg bf16_matrix(Vec<float, 16>::Reg a, Vec<float, 16>::Reg b,
                                       Vec<float, 16>::Reg sum) {
  asm("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(sum) : "w"(a), "w"(b));
  return sum;
}
#endif

}  // namespace vosops::cpu
