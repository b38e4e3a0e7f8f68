// Comparisons that are counted, and random numbers: what the programs of this folder share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

namespace vosops::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
int64_t compared = 0, failed = 0;
std::mt19937 random_bits(0);

inline void expect(bool holds, const char* what, double got, double expected) {
  ++compared;
  if (holds) return;
  if (++failed <= 20) std::printf("%s: got %.9g, expected %.9g\n", what, got, expected);
}

template <class T>
void expect_same(const char* what, T got, T expected) {
  const bool both_nan = got != got && expected != expected;
  expect(both_nan || std::memcmp(&got, &expected, sizeof got) == 0, what, static_cast<double>(got),
         static_cast<double>(expected));
}

inline void expect_near(const char* what, double got, double expected, double error) {
  expect(std::abs(got - expected) <= error, what, got, expected);
}

inline float random_float() {
  return std::uniform_real_distribution<float>(-1, 1)(random_bits);
}

// Mostly ordinary numbers, one in eight a special one.
inline float any_float() {
  constexpr float kSpecial[] = {0.f, -0.f, kInfinity, -kInfinity, kNaN, 1e-40f, 3e38f, 1.f};
  return random_bits() % 8 == 0 ? kSpecial[random_bits() % 8] : random_float();
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace
}  // namespace vosops::cpu
