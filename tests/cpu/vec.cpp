// The operations on registers and panels (csrc/cpu/vec.h, vec_math.h, best.h, element.h, gemm.h) against
// scalar twins: a program that test_vec.py compiles for each instruction set, and tools/test_arm.py for Arm.
// It prints how many comparisons it made, and ends with 1 and the places where one failed.
#include "cpu/vec.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/best.h"
#include "cpu/element.h"
#include "cpu/gemm.h"
#include "cpu/vec_math.h"
#include "expect.h"

namespace vosops::cpu {
namespace {

// ---- Registers

template <class V>
void check_register() {
  using T = typename V::T;
  using Code = typename V::Code;
  constexpr int kLanes = V::kLanes;
  T memory[3 * kLanes + 1], out[kLanes + 2];
  for (T& value : memory) value = any_float();
  const T *a = memory + 1, *b = a + kLanes, *c = b + kLanes;  // not aligned
  const typename V::Reg va = V::load(a), vb = V::load(b), vc = V::load(c);
  out[0] = out[kLanes + 1] = 7;
  V::store(out + 1, va);
  expect_same<T>("store, before", out[0], 7);
  expect_same<T>("store, after", out[kLanes + 1], 7);
  for (int i = 0; i < kLanes; ++i) expect_same<T>("load and store", out[i + 1], a[i]);
  for (int i = 0; i < kLanes; ++i) {
    expect_same<T>("set1", V::set1(a[0])[i], a[0]);
    const T fused = std::fma(a[i], b[i], c[i]), got = V::fma(va, vb, vc)[i];
    volatile T product = a[i] * b[i];
    const T separate = product + c[i];  // where the processor has no fused one
    const bool alike =
        got == fused || got == separate || (got != got && (fused != fused || separate != separate));
    expect(alike, "fma", got, fused);
  }
  typename V::Reg pinned = va;
  T number = a[0];
  V::pin(pinned);
  V::pin_number(number);
  expect_same<T>("pin_number", number, a[0]);
  for (int i = 0; i < kLanes; ++i) expect_same<T>("pin", pinned[i], a[i]);

  const uint32_t lanes = random_bits() & ((1u << kLanes) - 1);
  typename V::Reg best = va;
  typename V::CodeReg code{};
  V::take_less(best, code, vb, lanes, Code{42} - typename V::CodeReg{});
  for (int i = 0; i < kLanes; ++i) {
    const bool taken = (lanes >> i & 1) != 0 && b[i] < a[i];
    expect_same<T>("take_less, value", best[i], taken ? b[i] : a[i]);
    expect_same<Code>("take_less, code", code[i], taken ? 42 : 0);
  }
  const uint32_t reached = lanes_at_least<V>(va, vb);
  for (int i = 0; i < 32; ++i)
    expect_same<int>("lanes_at_least", reached >> i & 1, i < kLanes && a[i] >= b[i]);

  const auto low = interleave<kLanes, false>(va, vb), high = interleave<kLanes, true>(va, vb);
  for (int i = 0; i < kLanes; ++i) {
    const T* source = i % 2 == 0 ? a : b;
    expect_same<T>("interleave, lower", low[i], source[i / 2]);
    expect_same<T>("interleave, upper", high[i], source[kLanes / 2 + i / 2]);
  }
}

template <class V>
void check_transpose() {
  using T = typename V::T;
  constexpr int kLanes = V::kLanes, kStride = kLanes + 3;
  std::vector<T> from(kLanes * kStride), to(kLanes * kStride, T{-5});
  for (T& value : from) value = any_float();
  transpose_lanes<V>(from.data(), kStride, to.data(), kStride);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kStride; ++j) {
      const T expected = j < kLanes ? from[j * kStride + i] : T{-5};
      expect_same<T>("transpose_lanes", to[i * kStride + j], expected);
    }
  }
}

template <class V>
void check_exp2() {
  using T = typename V::T;
  const double bound = sizeof(T) == 4 ? 2e-7 : 1e-15;
  for (int i = 0; i < 4000; ++i) {
    T x[V::kLanes], out[V::kLanes];
    for (T& value : x) value = -std::exp2(T(12) * std::abs(random_float()) - T(4)) + T(1) / 16;
    for (T& value : x) value = value > 0 ? 0 : value;
    V::store(out, exp2_of_negative<V>(V::load(x)));
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const double expected = std::exp2(static_cast<double>(x[lane]));
      if (sizeof(T) == 4 && x[lane] < -126) {
        expect_same<T>("exp2 of less than -126", out[lane], 0);
      } else {
        expect_near("exp2", out[lane], expected, bound * expected);
      }
    }
  }
  expect_same<T>("exp2(0)", exp2_of_negative<V>(V::set1(0))[0], 1);
  expect_same<T>("exp2(-1)", exp2_of_negative<V>(V::set1(-1))[0], T(0.5));
  expect_same<T>("exp2(-inf)", exp2_of_negative<V>(V::set1(-kInfinity))[0], 0);
  expect_same<T>("exp2(NaN)", exp2_of_negative<V>(V::set1(kNaN))[0], kNaN);
}

// ---- Half precision

// The value of sign, exponent and fraction, in double.
double decoded(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const uint32_t fraction = bits & ((1u << fraction_bits) - 1);
  const int exponent = static_cast<int>(bits >> fraction_bits) & top;
  const double sign = (bits >> (exponent_bits + fraction_bits) & 1) != 0 ? -1 : 1;
  if (exponent == top) return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + (1u << fraction_bits), exponent - bias - fraction_bits);
}

void check_widen() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    Half half;
    BFloat16 bfloat;
    half.x = bfloat.x = static_cast<uint16_t>(bits);
    expect_same<float>("widen float16", widen(half), static_cast<float>(decoded(bits, 5, 10)));
    expect_same<float>("widen bfloat16", widen(bfloat), static_cast<float>(decoded(bits, 8, 7)));
  }
}

#if defined(VOSOPS_BF16_DOT)
// Nearest, ties to even.
uint32_t rounded_twin(float value) {
  const double exact = value;
  const uint32_t down = bits_of(value) >> 16, up = down + 1;
  const double below = std::abs(exact - float_of(down << 16)), above = std::abs(float_of(up << 16) - exact);
  return below < above || (below == above && down % 2 == 0) ? down : up;
}

float flushed(float value) {
  return std::abs(value) < std::numeric_limits<float>::min() ? std::copysign(0.f, value) : value;
}

#if defined(VOSOPS_BF16_MATRIX)
// a + b as Arm's instructions add: towards zero, the last bit set where that is not exact.
float add_to_odd(float a, float b) {
  a = flushed(a);
  b = flushed(b);
  const double x = a, y = b, sum = x + y, back = sum - x;
  double rest = (x - (sum - back)) + (y - back);  // what the sum lacks
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  float result = static_cast<float>(sum);
  if (std::isinf(result)) return result;
  double missing = (sum - result) + rest;
  const bool away = missing != 0 && (missing < 0) == (sum > 0);
  if (away) result = std::nextafter(result, 0.f);
  if (missing != 0) result = float_of(bits_of(result) | 1);
  return flushed(result);
}

float dot_twin(float a0, float b0, float a1, float b1, float sum) {
  const auto product = [](float a, float b) { return flushed(flushed(a) * flushed(b)); };
  return add_to_odd(sum, add_to_odd(product(a0, b0), product(a1, b1)));
}
#else
// The odd pair is added before the even one, each with one rounding; denormals are 0.
float dot_twin(float a0, float b0, float a1, float b1, float sum) {
  sum = flushed(std::fma(flushed(a1), flushed(b1), flushed(sum)));
  return flushed(std::fma(flushed(a0), flushed(b0), sum));
}
#endif

float low_half(float element) {
  return float_of(bits_of(element) << 16);
}
float high_half(float element) {
  return float_of(bits_of(element) & 0xffff0000u);
}

BFloat16 bfloat(float value) {
  BFloat16 result;
  result.x = static_cast<uint16_t>(bits_of(value) >> 16);
  return result;
}

template <class V>
void check_bf16() {
  using E = Bf16PairElement<V>;
  constexpr int kLanes = V::kLanes;
  for (int round = 0; round < 20000; ++round) {
    float a[kLanes], b[kLanes], sum[kLanes];
    // Magnitudes from denormal to near overflow, where the products stay finite.
    const int scale = static_cast<int>(random_bits() % 120) - 60;
    for (int i = 0; i < kLanes; ++i) {
      const auto draw = [&](int power) { return bfloat(std::ldexp(random_float(), power)); };
      const int power = round % 4 == 0 ? -126 : scale, second = round % 4 == 1 ? -66 : scale;
      a[i] = E::pair(draw(power), draw(power));
      b[i] = E::pair(draw(second), draw(second));
      sum[i] = std::ldexp(random_float(), round % 4 == 0 ? -126 : 2 * scale);
    }
    const typename V::Reg got = E::dot(V::load(a), V::load(b), V::load(sum));
    for (int i = 0; i < kLanes; ++i) {
      const float expected =
          dot_twin(low_half(a[i]), low_half(b[i]), high_half(a[i]), high_half(b[i]), sum[i]);
      expect(got[i] == expected, "bf16_dot", got[i], expected);
      const double low = low_half(a[i]) - low_half(b[i]), high = high_half(a[i]) - high_half(b[i]);
      const double distance = low * low + high * high;
      expect_near("squared_difference", E::squared_difference(a[i], b[i]), distance, 1e-6 * distance + 1e-44);
    }
    float low[kLanes], high[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      low[i] = float_of(static_cast<uint32_t>(random_bits()) & 0xbfffffffu);  // finite, of any exponent
      high[i] = round % 2 == 0 ? float_of((bits_of(random_float()) & 0xffff0000u) | 0x8000u) : random_float();
    }
    const typename V::Reg pair = E::round_pair(V::load(low), V::load(high));
    for (int i = 0; i < kLanes; ++i) {
      expect_same<uint32_t>("round_pair, low", bits_of(pair[i]) & 0xffffu, rounded_twin(low[i]));
      expect_same<uint32_t>("round_pair, high", bits_of(pair[i]) >> 16, rounded_twin(high[i]));
      float cleared = pair[i];
      E::clear(cleared, round % 2);
      expect_same<float>("clear", round % 2 == 0 ? low_half(cleared) : high_half(cleared), 0);
      expect_same<float>("clear, the other", round % 2 == 0 ? high_half(cleared) : low_half(cleared),
                         round % 2 == 0 ? high_half(pair[i]) : low_half(pair[i]));
    }
#if defined(VOSOPS_BF16_MATRIX)
    const typename V::Reg product = bf16_matrix(V::load(a), V::load(b), V::load(sum));
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        float expected = sum[2 * i + j];
        for (int k = 0; k < 2; ++k) {
          const float x = a[2 * i + k], y = b[2 * j + k];
          expected = dot_twin(low_half(x), low_half(y), high_half(x), high_half(y), expected);
        }
        expect(product[2 * i + j] == expected, "bf16_matrix", product[2 * i + j], expected);
      }
    }
#endif
  }
}
#endif

// ---- Panels and their products

template <class S>
S narrow(float value) {
  return S(value);
}

// multiply() over panels packed from matrices of S in either order, the panels' memory NaN before.
template <class E, class S>
void check_multiply(ScalarType dtype, double error) {
  using V = typename E::Lanes;
  using T = typename V::T;
  constexpr int kLanes = kLanePanel<V>;
  for (int64_t channels : {1, 2, 3, 4, 5, 7, 8, 33}) {
    for (int used : {1, kLanes - 1, kLanes}) {
      const int used_keys = used == kLanes ? kKeyPanel : used % kKeyPanel + 1;
      std::vector<S> query(channels * kLanes), key(channels * kKeyPanel);
      for (S& value : query) value = narrow<S>(random_float());
      for (S& value : key) value = narrow<S>(random_float());
      const int64_t elements = elements_of<E>(channels);
      std::vector<T> lanes(elements * kLanes, kNaN), keys(elements * kKeyPanel, kNaN);
      const StridedMatrix queries{query.data(), dtype, channels, kLanes, 1};
      const StridedMatrix key_rows{key.data(), dtype, channels, 1, channels};
      pack_pixels<E, kLanes>(queries, 0, used, lanes.data());
      pack_pixels<E, kKeyPanel>(key_rows, 0, used_keys, keys.data());
      T tile[kKeyPanel * kLanes];
      multiply<E>(
          lanes.data(), keys.data(), elements,
          [](int j, int r) { return V::set1(static_cast<T>(j + 100 * r)); },
          [&](const TileSums<E>& sums) {
            for (int j = 0; j < kKeyPanel; ++j)
              for (int r = 0; r < kTileRegisters; ++r)
                V::store(tile + j * kLanes + r * V::kLanes, sums[j][r]);
          });
      for (int j = 0; j < kKeyPanel; ++j) {
        for (int i = 0; i < kLanes; ++i) {
          double expected = j + 100 * (i / V::kLanes);
          const double magnitude = expected + static_cast<double>(channels);
          for (int64_t c = 0; c < channels && i < used && j < used_keys; ++c)
            expected += static_cast<double>(widen(query[c * kLanes + i])) * widen(key[j * channels + c]);
          expect_near("multiply", tile[j * kLanes + i], expected, error * magnitude);
        }
      }

      // The same through the packing by offsets, with squared lengths.
      int64_t offsets[kLanes];
      for (int i = 0; i < kLanes; ++i) offsets[i] = i;
      std::vector<T> again(lanes.size(), kNaN);
      T norm[kLanes];
      pack_panel<E>(query.data(), offsets, used, int64_t{kLanes}, channels, int64_t{kLanes}, again.data(),
                    norm);
      expect(std::memcmp(again.data(), lanes.data(), lanes.size() * sizeof(T)) == 0, "pack_panel", 0, 0);
      for (int i = 0; i < kLanes; ++i) {
        double length = 0;
        for (int64_t c = 0; c < channels && i < used; ++c) {
          const double value = widen(query[c * kLanes + i]);
          length += value * value;
        }
        expect_near("squared length", norm[i], length, 1e-6 * length);
      }
    }
  }
}

template <class V>
void check_multiply_rows(double error) {
  using T = typename V::T;
  constexpr int kLanes = kLanePanel<V>;
  constexpr int64_t kElements = 19;
  std::vector<T> lanes(kElements * kLanes), keys(kElements * kKeyPanel);
  for (T& value : lanes) value = random_float();
  for (T& value : keys) value = random_float();
  std::array<const T*, kKeyPanel> rows;
  for (int j = 0; j < kKeyPanel; ++j) rows[j] = keys.data() + j * kElements;
  multiply_rows<FloatElement<V>>(lanes.data(), rows, kElements, [&](const TileSums<FloatElement<V>>& sums) {
    for (int j = 0; j < kKeyPanel; ++j) {
      for (int i = 0; i < kLanes; ++i) {
        double expected = 0;
        for (int64_t e = 0; e < kElements; ++e)
          expected += static_cast<double>(lanes[e * kLanes + i]) * rows[j][e];
        expect_near("multiply_rows", sums[j][i / V::kLanes][i % V::kLanes], expected, error);
      }
    }
  });
}

template <class V>
void check_lanes() {
  for (int i = 0; i < 2000; ++i) check_register<V>();
  check_transpose<V>();
  check_exp2<V>();
}

int run() {
  using Floats = Vec<float, kRegisterBytes>;
  using Doubles = Vec<double, kRegisterBytes>;
  check_lanes<Floats>();
  check_lanes<Doubles>();
  if constexpr (kRegisterBytes > 16) check_lanes<Vec<float, kRegisterBytes / 2>>();
  check_widen();
  check_multiply<FloatElement<Floats>, float>(ScalarType::Float, 1e-6);
  check_multiply<FloatElement<Floats>, Half>(ScalarType::Half, 1e-6);
  check_multiply<FloatElement<Floats>, BFloat16>(ScalarType::BFloat16, 1e-6);
  check_multiply<FloatElement<Doubles>, double>(ScalarType::Double, 1e-14);
  check_multiply_rows<Floats>(1e-5);
  check_multiply_rows<Doubles>(1e-14);
  const char* bf16 = "not compiled";
#if defined(VOSOPS_BF16_DOT)
  bf16 = "not in this processor";
  if (has_bf16_dot()) {
    bf16 = "checked";
    check_bf16<Floats>();
    if constexpr (kRegisterBytes > 16) check_bf16<Vec<float, kRegisterBytes / 2>>();
    check_multiply<Bf16Element, BFloat16>(ScalarType::BFloat16, 1e-6);
  }
#endif
  std::printf("%lld comparisons, %lld failed; bfloat16 instructions: %s\n", static_cast<long long>(compared),
              static_cast<long long>(failed), bf16);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace vosops::cpu

int main() {
  return vosops::cpu::run();
}
