// Winograd's minimal filtering F(kOut, kTaps) in one dimension: kOut results of kTaps taps from kOut + kTaps
// - 1 products, where the plain sum takes kOut * kTaps.
//
// Toom and Cook: inputs and taps are polynomials, evaluated at points and multiplied there. The points are 0
// (or not), pairs +-a and infinity. With pairs of reciprocals around 1 the transforms are far better
// conditioned than with the usual 1/2, 1, 2, 4: the root mean square error of F(6, 7) in float32 is 6e-6 of
// that of the result. A pair shares its work: the even terms' sum plus and minus the odd terms' sum.
#pragma once

#include <array>

namespace vosops::cpu {

// The positive points of n in all: pairs of reciprocals, found by minimising the error.
template <int kPoints>
struct WinogradPoints;
template <>
struct WinogradPoints<8> {
  static constexpr std::array<double, 3> kPositive{0.5, 1.0, 2.0};
};
template <>
struct WinogradPoints<10> {
  static constexpr std::array<double, 4> kPositive{0.416, 0.8, 1.25, 2.4};
};
template <>
struct WinogradPoints<11> {
  static constexpr std::array<double, 5> kPositive{0.194, 0.566, 0.909, 1.354, 2.602};
};
template <>
struct WinogradPoints<12> {
  static constexpr std::array<double, 5> kPositive{0.357, 0.686, 1.0, 1.457, 2.804};
};

// The rows of the transforms: point 0 where the number of points is even, then each positive point (the
// negative one has the same row with the odd terms' signs turned), and infinity last.
template <int kOut_, int kTaps_>
class Winograd {
 public:
  static constexpr int kOut = kOut_, kTaps = kTaps_, kPoints = kOut + kTaps - 1;
  static constexpr bool kHasZero = kPoints % 2 == 0;
  static constexpr int kPairs = (kPoints - 1) / 2, kFirstPair = kHasZero;

  // values[i] at point i from inputs[j]: `Reg` is a register of independent lines.
  template <class V>
  [[gnu::always_inline]] static void transform_input(const typename V::Reg* inputs, typename V::Reg* values) {
    transform<V, kPoints>(kTable.input, inputs, values);
    values[kPoints - 1] = sum<V>(kTable.input[kPairs + kHasZero], inputs, 0, kPoints, 1);
  }

  template <class V>
  [[gnu::always_inline]] static void transform_weight(const typename V::Reg* taps, typename V::Reg* values) {
    transform<V, kTaps>(kTable.weight, taps, values);
    values[kPoints - 1] = taps[kTaps - 1];
  }

  // outputs[i] from the products at all points.
  template <class V>
  [[gnu::always_inline]] static void transform_output(const typename V::Reg* products,
                                                      typename V::Reg* outputs) {
    typename V::Reg even[kPairs], odd[kPairs];
    halves<V>(products, even, odd);
#pragma GCC unroll 16
    for (int i = 0; i < kOut; ++i) {
      typename V::Reg total = sum<V>(kTable.output[i], i % 2 == 0 ? even : odd, 0, kPairs, 1);
      if (kHasZero && i == 0) total += products[0];
      if (i == kOut - 1) total += products[kPoints - 1];
      outputs[i] = total;
    }
  }

  // What transform_output makes of a gradient of its outputs, at all points.
  template <class V>
  [[gnu::always_inline]] static void transform_grad(const typename V::Reg* grads, typename V::Reg* values) {
    if constexpr (kHasZero) values[0] = grads[0];
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) {
      const float* powers = kTable.powers[p];
      const typename V::Reg even = sum<V>(powers, grads, 0, kOut, 2), odd = sum<V>(powers, grads, 1, kOut, 2);
      values[kFirstPair + 2 * p] = even + odd;
      values[kFirstPair + 2 * p + 1] = even - odd;
    }
    values[kPoints - 1] = grads[kOut - 1];
  }

  // The gradient of the taps from the products of transform_grad's and transform_input's values.
  template <class V>
  [[gnu::always_inline]] static void transform_products(const typename V::Reg* products,
                                                        typename V::Reg* taps) {
    typename V::Reg even[kPairs], odd[kPairs];
    halves<V>(products, even, odd);
#pragma GCC unroll 16
    for (int j = 0; j < kTaps; ++j) {
      typename V::Reg total = sum<V>(kTable.tap_weight[j], j % 2 == 0 ? even : odd, 0, kPairs, 1);
      if (kHasZero && j == 0) total += products[0] * kTable.weight[0][0];
      if (j == kTaps - 1) total += products[kPoints - 1];
      taps[j] = total;
    }
  }

 private:
  static constexpr int kRows = kHasZero + kPairs + 1;
  struct Table {
    float input[kRows][kPoints], weight[kRows][kTaps], tap_weight[kTaps][kPairs];  // of pairs, transposed
    float output[kOut][kPairs], powers[kPairs][kOut];                              // output transposed
  };

  static constexpr Table make_table() {
    constexpr auto& positive = WinogradPoints<kPoints>::kPositive;
    double points[kPoints - 1] = {};
    for (int p = 0; p < kPairs; ++p) {
      points[kFirstPair + 2 * p] = positive[p];
      points[kFirstPair + 2 * p + 1] = -positive[p];
    }
    Table table{};
    for (int row = 0; row < kRows; ++row) {
      const bool infinity = row == kRows - 1;
      const int left_out = infinity ? kPoints : row < kFirstPair ? row : kFirstPair + 2 * (row - kFirstPair);
      // The polynomial that is zero at every other point, and its value at this one.
      double polynomial[kPoints] = {1.0}, norm = 1.0;
      int degree = 0;
      for (int i = 0; i < kPoints - 1; ++i) {
        if (i == left_out) continue;
        ++degree;
        for (int j = degree; j >= 0; --j)
          polynomial[j] = (j > 0 ? polynomial[j - 1] : 0.0) - points[i] * (j < degree ? polynomial[j] : 0.0);
        if (!infinity) norm *= points[left_out] - points[i];
      }
      for (int j = 0; j < kPoints; ++j) table.input[row][j] = static_cast<float>(polynomial[j]);
      double power = 1.0;
      for (int j = 0; j < kTaps && !infinity; ++j) {
        table.weight[row][j] = static_cast<float>(power / norm);
        power *= points[left_out];
      }
    }
    for (int p = 0; p < kPairs; ++p)
      for (int j = 0; j < kTaps; ++j) table.tap_weight[j][p] = table.weight[kHasZero + p][j];
    for (int p = 0; p < kPairs; ++p) {
      double power = 1.0;
      for (int i = 0; i < kOut; ++i) {
        table.output[i][p] = table.powers[p][i] = static_cast<float>(power);
        power *= positive[p];
      }
    }
    return table;
  }
  static constexpr Table kTable = make_table();

  // What the even and the odd terms of each pair's row are multiplied with.
  template <class V>
  [[gnu::always_inline]] static void halves(const typename V::Reg* products, typename V::Reg* even,
                                            typename V::Reg* odd) {
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) {
      const int at = kFirstPair + 2 * p;
      even[p] = products[at] + products[at + 1];
      odd[p] = products[at] - products[at + 1];
    }
  }

  // The sum of row[j] * terms[j] over j = begin, begin + step ... below end, without the terms that are zero.
  template <class V>
  [[gnu::always_inline]] static typename V::Reg sum(const float* row, const typename V::Reg* terms, int begin,
                                                    int end, int step) {
    typename V::Reg total = {};
    bool empty = true;
#pragma GCC unroll 16
    for (int j = begin; j < end; j += step) {
      if (row[j] == 0) continue;
      total = empty ? terms[j] * row[j] : V::fma(terms[j], V::set1(row[j]), total);
      empty = false;
    }
    return total;
  }

  // The rows of every finite point.
  template <class V, int kTerms>
  [[gnu::always_inline]] static void transform(const float (&rows)[kRows][kTerms],
                                               const typename V::Reg* terms, typename V::Reg* values) {
    if constexpr (kHasZero) values[0] = sum<V>(rows[0], terms, 0, kTerms, 1);
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) {
      const float* row = rows[kFirstPair + p];
      const typename V::Reg even = sum<V>(row, terms, 0, kTerms, 2);
      const typename V::Reg odd = sum<V>(row, terms, 1, kTerms, 2);
      values[kFirstPair + 2 * p] = even + odd;
      values[kFirstPair + 2 * p + 1] = even - odd;
    }
  }
};

}  // namespace vosops::cpu
