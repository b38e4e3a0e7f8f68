// How tensor cores add: a part of emulator.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "emulator.h"

namespace emulator {
namespace {

bool hopper_sums = false;

// As Hopper's: every term aligned to the greatest exponent and cut off 25 bits below it, the sum rounded towards
// zero to 24 bits.
float hopper_sum(const double* terms, unsigned count) {
  constexpr int kBits = 25;
  int most = std::numeric_limits<int>::min();
  double plain = 0;
  for (unsigned i = 0; i < count; ++i) {
    plain += terms[i];
    if (terms[i] != 0 && std::isfinite(terms[i])) most = std::max(most, std::ilogb(terms[i]));
  }
  if (!std::isfinite(plain)) return float(plain);
  double sum = 0;
  for (unsigned i = 0; i < count; ++i)
    if (terms[i] != 0) sum += std::ldexp(std::trunc(std::ldexp(terms[i], kBits - most)), most - kBits);
  const float nearest = float(sum);
  return std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafterf(nearest, 0.f) : nearest;
}

bool asks_for_hopper_sums() {
  const char* name = getenv("VOSOPS_EMULATOR_SUMS");
  if (name && std::string(name) != "exact" && std::string(name) != "hopper")
    throw Fault(std::string("VOSOPS_EMULATOR_SUMS must be exact or hopper, not ") + name);
  return name && std::string(name) == "hopper";
}

}  // namespace

float tensor_core_sum(const double* terms, unsigned count) {
  if (hopper_sums) return hopper_sum(terms, count);
  double products = 0;
  for (unsigned i = 0; i + 1 < count; ++i) products += terms[i];
  return float(terms[count - 1] + products);
}

}  // namespace emulator
