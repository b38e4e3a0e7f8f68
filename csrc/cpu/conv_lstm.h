// The cell of the convolutional LSTM on a register of lanes: activations, update and their derivatives.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/strided.h"
#include "cpu/vec_math.h"

namespace vosops::cpu {

constexpr int kGates = 4;  // input, forget, new input, output

// The first `count` entries at p, at most a register of them, and zeros.
template <class V, class S>
typename V::Reg load_lanes(const S* p, int64_t count) {
  if constexpr (std::is_same_v<S, typename V::T>) {
    if (count >= V::kLanes) return V::load(p);
  }
  typename V::T values[V::kLanes] = {};
  if (count >= V::kLanes) {
    for (int i = 0; i < V::kLanes; ++i) values[i] = widen(p[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = widen(p[i]);
  }
  return V::load(values);
}

// Writes the first `count` lanes.
template <class V, class S>
void store_lanes(S* p, typename V::Reg value, int64_t count) {
  if constexpr (std::is_same_v<S, typename V::T>) {
    if (count >= V::kLanes) return V::store(p, value);
  }
  typename V::T values[V::kLanes];
  V::store(values, value);
  for (int64_t i = 0; i < std::min<int64_t>(count, V::kLanes); ++i) p[i] = static_cast<S>(values[i]);
}

// e^-|x|, in (0, 1].
template <class V>
typename V::Reg exp_of_minus_abs(typename V::Reg x) {
  using T = typename V::T;
  constexpr T kLog2E = static_cast<T>(1.4426950408889634074);
  return exp2_of_negative<V>((x < 0 ? x : -x) * kLog2E);
}

template <class V>
typename V::Reg sigmoid(typename V::Reg x) {
  const typename V::Reg e = exp_of_minus_abs<V>(x);
  const typename V::Reg of_magnitude = 1 / (1 + e);
  return x < 0 ? e * of_magnitude : x >= 0 ? of_magnitude : x;  // NaN stays NaN
}

template <class V>
typename V::Reg tanh(typename V::Reg x) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < V::kLanes; ++i) x[i] = std::tanh(x[i]);
    return x;
  } else {
    // Near zero the quotient below cancels; there the Taylor series is exact to float32.
    constexpr float kSmall = 0.3f;
    const Reg e = exp_of_minus_abs<V>(2 * x);
    const Reg of_magnitude = (1 - e) / (1 + e);
    const Reg square = x * x;
    Reg series = V::set1(-1382.f / 155925);
    for (float c : {62.f / 2835, -17.f / 315, 2.f / 15, -1.f / 3, 1.f})
      series = V::fma(series, square, V::set1(c));
    const Reg small = x * series;
    const Reg large = x < 0 ? -of_magnitude : of_magnitude;
    return ((x > -kSmall) & (x < kSmall)) ? small : x == x ? large : x;
  }
}

// The gates of a register of lanes after activation, and the cell's update.
template <class V>
struct CellGates {
  using Reg = typename V::Reg;
  Reg i, f, g, o;

  static CellGates activate(Reg i, Reg f, Reg g, Reg o, typename V::T forget_bias) {
    return {sigmoid<V>(i), sigmoid<V>(f + forget_bias), tanh<V>(g), sigmoid<V>(o)};
  }
  Reg update(Reg cell) const { return V::fma(f, cell, i * g); }
  Reg hidden(Reg new_cell) const { return o * tanh<V>(new_cell); }
};

// The gradients of the gates before activation and of the previous cell.
template <class V>
struct CellGrads {
  using Reg = typename V::Reg;
  Reg i, f, g, o, cell;

  static CellGrads of(const CellGates<V>& gates, Reg cell, Reg new_cell, Reg grad_hidden, Reg grad_cell) {
    const Reg squashed = tanh<V>(new_cell);
    const Reg total = grad_cell + grad_hidden * gates.o * (1 - squashed * squashed);
    return {total * gates.g * gates.i * (1 - gates.i), total * cell * gates.f * (1 - gates.f),
            total * gates.i * (1 - gates.g * gates.g), grad_hidden * squashed * gates.o * (1 - gates.o),
            total * gates.f};
  }
};

}  // namespace vosops::cpu
