// csrc/cpu/amx.h against scalar models: tiles, their products, pieces, packing, exp2_weight, Region.
// test_amx.py compiles this program with csrc/cpu/amx.cpp twice, for the processor's matrix engine and for
// its twin. It ends with the number of comparisons and a sum over the bits of all results, which must be the
// same in both.
#include "cpu/amx.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "expect.h"

namespace vosops::cpu::amx {
namespace {

uint64_t checksum = 0;

uint32_t some_bits() {
  return static_cast<uint32_t>(random_bits());
}

// Adds a result to the sum of bits; the payload of a NaN is not defined.
void note(float value) {
  checksum = checksum * 6364136223846793005u + (std::isnan(value) ? 0x7fc00000u : bits_of(value));
}

template <class T>
void note_bits(const T* values, int count) {
  for (int i = 0; i < count; ++i) checksum = checksum * 6364136223846793005u + values[i];
}

float flushed_model(float x) {
  return std::abs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x;
}

float widened(uint16_t bits) {
  return flushed_model(float_of(static_cast<uint32_t>(bits) << 16));
}

// ---- Tiles

struct Tile {
  alignas(64) uint16_t bits[kTile];
};
struct Sums {
  alignas(64) float values[kSums];
};

// a * b + c rounded once, and zero where the result of 24 bits is less than any normal number, although the
// fewer bits of a denormal might round it to one.
float fused_model(float a, float b, float c) {
  constexpr double kRoundsToLeast = 0x1p-126 - 0x1p-151;
  const float result = std::fma(a, b, c);
  const double exact = static_cast<double>(a) * b + c;
  return std::abs(exact) < kRoundsToLeast ? std::copysign(0.f, result) : flushed_model(result);
}

// One scalar at a time: sums[m][n] += a[m][k] b[k][n], even and odd k in chains of their own.
void dot_model(float* sums, const uint16_t* a, const uint16_t* b) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < 16; ++k) {
        even = fused_model(widened(a[m * 32 + 2 * k]), widened(b[k * 32 + 2 * n]), even);
        odd = fused_model(widened(a[m * 32 + 2 * k + 1]), widened(b[k * 32 + 2 * n + 1]), odd);
      }
      sums[m * 16 + n] = flushed_model(flushed_model(sums[m * 16 + n]) + flushed_model(even + odd));
    }
  }
}

enum Kind {
  kNormal,
  kWideExponents,
  kNearLeast,
  kDenormals,
  kOverflow,
  kInfAndNaN,
  kAnyBits,
  kCancelling,
  kJustBelowLeast,
  kKinds
};

uint16_t draw(int kind) {
  const uint32_t r = some_bits(), s = (r & 1) << 15, m = r >> 1 & 127;
  const uint32_t e = r >> 8 & 1023;
  const auto number = [&](uint32_t exponent) { return static_cast<uint16_t>(s | exponent << 7 | m); };
  switch (kind) {
    case kNormal:
      return number(120 + e % 10);
    case kWideExponents:
      return number(64 + e % 126);
    case kNearLeast:
      return number(60 + e % 8);
    case kDenormals:
      return number(e % 3 != 0 ? 0 : 100 + e % 100);
    case kOverflow:
      return number(180 + e % 20);
    case kInfAndNaN:
      if (e < 10) return static_cast<uint16_t>(s | 255u << 7);
      if (e < 12) return number(255);
      return e < 30 ? static_cast<uint16_t>(s) : number(120 + e % 10);
    case kAnyBits:
      return static_cast<uint16_t>(r >> 16);
    default:
      return static_cast<uint16_t>(s | 127u << 7 | (m & 3));
  }
}

void check_dot() {
  constexpr int kTiles = 400;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (int i = 0; i < kTiles; ++i) {
      Tile a, b;
      Sums got, expected;
      for (uint16_t& x : a.bits) x = draw(kind);
      for (uint16_t& x : b.bits) x = draw(kind);
      for (float& x : got.values) {
        const uint32_t high = draw(kind), bits = high << 16 | (some_bits() & 0xffffu);
        x = float_of(kind == kNearLeast && some_bits() % 2 != 0 ? bits & 0x807fffffu : bits);
        if (kind == kCancelling) x *= 32;
      }
      if (kind == kJustBelowLeast) {
        // 2^-126 less one to four halves of the last place that a number below it would have, in one chain.
        std::fill(std::begin(a.bits), std::end(a.bits), uint16_t{0});
        std::fill(std::begin(b.bits), std::end(b.bits), uint16_t{0});
        std::fill(std::begin(got.values), std::end(got.values), 0.f);
        const auto bf16 = [](float x) { return static_cast<uint16_t>(bits_of(x) >> 16); };
        for (int m = 0; m < 16; ++m) {
          a.bits[m * 32] = a.bits[m * 32 + 2] = bf16(0x1p-63f);
          a.bits[m * 32 + 4] = bf16(std::ldexp(-1.f - static_cast<float>(m % 8) / 4, -76 + m / 8));
        }
        for (int n = 0; n < 16; ++n) b.bits[2 * n] = bf16(0x1p-63f), b.bits[64 + 2 * n] = bf16(0x1p-77f);
      }
      std::memcpy(&expected, &got, sizeof got);
      {
        const Region region;
        tile_load<1>(a.bits);
        tile_load<3>(b.bits);
        tile_load<0>(got.values);
        tile_dot<0, 1, 3>();
        tile_store<0>(got.values);
      }
      dot_model(expected.values, a.bits, b.bits);
      for (int n = 0; n < kSums; ++n) {
        expect_same<float>("tile_dot", got.values[n], expected.values[n]);
        note(got.values[n]);
      }
    }
  }
}

void check_moves() {
  Sums from[4], to[4];
  for (Sums& tile : from)
    for (float& x : tile.values) x = any_float();
  {
    const Region region;
    load_sums(from[0].values);
    store_sums(to[0].values);
  }
  for (int t = 0; t < 4; ++t)
    for (int i = 0; i < kSums; ++i)
      expect_same<float>("load_sums, store_sums", to[t].values[i], from[t].values[i]);
  {
    const Region region;
    load_sums(from[0].values);
    zero_sums();
    store_sums(to[0].values);
  }
  for (const Sums& tile : to)
    for (float x : tile.values) expect_same<float>("zero_sums", x, 0.f);
}

// A product of pieces: of a and of b.
using Product = std::array<int, 2>;

// The products of a step in the order that is documented by multiply_add().
template <int kPieces>
std::vector<Product> order() {
  if constexpr (kPieces == 1) return {{0, 0}};
  if constexpr (kPieces == 2) return {{0, 1}, {0, 0}, {1, 0}};
  return {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {0, 0}, {2, 0}};
}

// [vector][element] packed as panels.
template <int kPieces, bool kB>
std::vector<uint16_t> packed(const std::vector<float>& rows, int64_t steps) {
  std::vector<uint16_t> panel(steps * kPieces * kTile + 32);
  Extent extent;
  const StridedMatrix matrix{rows.data(), ScalarType::Float, steps * kStep, 1, steps * kStep};
  pack_panel<kPieces, kB>(matrix, 0, 16, steps, panel.data(), extent);
  return panel;
}

template <int kPieces>
void check_products() {
  constexpr int64_t kSteps = 5, kLength = kSteps * kStep, kNext = kPieces * kTile;
  constexpr double kBound[] = {0, 1e-3, 3e-6, 6e-8};  // root mean square, in units of |a| |b|
  double squares = 0;
  int64_t count = 0;
  for (int round = 0; round < 6; ++round) {
    std::vector<float> rows[4];
    for (auto& each : rows) {
      each.resize(16 * kLength);
      for (float& x : each) x = random_float();
    }
    const std::vector<uint16_t> a0 = packed<kPieces, false>(rows[0], kSteps),
                                a1 = packed<kPieces, false>(rows[1], kSteps),
                                b0 = packed<kPieces, true>(rows[2], kSteps),
                                b1 = packed<kPieces, true>(rows[3], kSteps);
    const std::vector<uint16_t>*a[] = {&a0, &a1}, *b[] = {&b0, &b1};
    Sums start[4], got[4], small_first[4];
    for (Sums& tile : start)
      for (float& x : tile.values) x = random_float();
    {
      const Region region;
      load_sums(start[0].values);
      multiply_add<kPieces>(a0.data(), a1.data(), b0.data(), b1.data(), kSteps);
      store_sums(got[0].values);
      multiply_small_first<kPieces>(a0.data(), a1.data(), b0.data(), b1.data(), kSteps);
      store_sums(small_first[0].values);
    }
    for (int t = 0; t < 4; ++t) {
      const auto step = [&](Sums& sums, int64_t s, Product pieces) {
        dot_model(sums.values, a[t / 2]->data() + s * kNext + pieces[0] * kTile,
                  b[t % 2]->data() + s * kNext + pieces[1] * kTile);
      };
      Sums expected = start[t], expected_first{};
      for (int64_t s = 0; s < kSteps; ++s)
        for (Product pieces : order<kPieces>()) step(expected, s, pieces);
      for (int64_t s = 0; s < kSteps; ++s)
        for (Product pieces : order<kPieces>())
          if (pieces != Product{0, 0}) step(expected_first, s, pieces);
      for (int64_t s = 0; s < kSteps; ++s) step(expected_first, s, {0, 0});
      for (int i = 0; i < kSums; ++i) {
        expect_same<float>("multiply_add", got[t].values[i], expected.values[i]);
        expect_same<float>("multiply_small_first", small_first[t].values[i], expected_first.values[i]);
        note(got[t].values[i]);
        double exact = 0, left = 0, right = 0;
        for (int64_t e = 0; e < kLength; ++e) {
          const double x = rows[t / 2][i / 16 * kLength + e], y = rows[2 + t % 2][i % 16 * kLength + e];
          exact += x * y, left += x * x, right += y * y;
        }
        const double error = (small_first[t].values[i] - exact) / std::sqrt(left * right);
        squares += error * error, ++count;
      }
    }
  }
  const double error = std::sqrt(squares / static_cast<double>(count));
  expect(error <= kBound[kPieces], "error of the products", error, kBound[kPieces]);
  // One piece less would not do.
  if (kPieces > 1) expect(kBound[kPieces] < kBound[kPieces - 1] / 20, "bounds", kBound[kPieces], 0);
}

// ---- Pieces

// To nearest, ties to even; denormals to zero, NaN quiet.
uint16_t rounded_model(float x) {
  const uint32_t bits = bits_of(x), down = bits >> 16;
  if (std::isnan(x)) return static_cast<uint16_t>(down | 0x40u);
  if (std::fpclassify(x) == FP_SUBNORMAL) return static_cast<uint16_t>(down & 0x8000u);
  if (std::isinf(x)) return static_cast<uint16_t>(down);
  // In double, in which the number above the greatest is none but twice its half.
  const uint32_t size = down & 0x7fffu;
  const auto value = [](uint32_t b) {
    return b == 0x7f80u ? 0x1p128 : static_cast<double>(float_of(b << 16));
  };
  const double exact = std::abs(static_cast<double>(x)), below = exact - value(size);
  const double above = value(size + 1) - exact;
  const uint32_t near = below < above || (below == above && size % 2 == 0) ? size : size + 1;
  return static_cast<uint16_t>(near | (down & 0x8000u));
}

void check_rounding(const std::vector<float>& numbers, bool flushing) {
  std::vector<Bits> pairs, in_order;
  {
    const uint32_t control = _mm_getcsr();
    if (flushing) _mm_setcsr(control | 0x8040);
    for (size_t i = 0; i < numbers.size(); i += 32) {
      const Reg low = Lanes::load(&numbers[i]), high = Lanes::load(&numbers[i + 16]);
      pairs.push_back(round_pairs(low, high));
      in_order.push_back(round_in_order(low, high));
    }
    _mm_setcsr(control);
  }
  for (size_t i = 0; i < numbers.size(); i += 32) {
    uint16_t pair[32], order[32];
    std::memcpy(pair, &pairs[i / 32], sizeof pair);
    std::memcpy(order, &in_order[i / 32], sizeof order);
    note_bits(pair, 32);
    for (int j = 0; j < 32; ++j) {
      const uint16_t expected = rounded_model(numbers[i + j]);
      expect_same<int>("round_in_order", order[j], expected);
      expect_same<int>("round_pairs", pair[j % 16 * 2 + j / 16], expected);
    }
  }
}

// Every sign and exponent with fractions that round down, up and to even, up into the next exponent too.
std::vector<float> numbers_to_round() {
  std::vector<float> numbers;
  for (uint32_t top = 0; top < 512; ++top) {
    for (uint32_t fraction : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0x18000u, 0x17fffu, 0x18001u, 0x7f7fffu,
                              0x7f8000u, 0x7f8001u, 0x7fffffu, 0x400000u, 0x3fffffu})
      numbers.push_back(float_of(top << 23 | fraction));
    for (int i = 0; i < 50; ++i) numbers.push_back(float_of(top << 23 | (some_bits() & 0x7fffffu)));
  }
  return numbers;
}

template <int kPieces>
void check_split(bool flushing) {
  for (int round = 0; round < 4000; ++round) {
    float low[16], high[16];
    for (int i = 0; i < 32; ++i) {
      const uint32_t exponent = 25 + some_bits() % 230, bits = some_bits();
      float x = float_of((bits & 0x807fffffu) | exponent << 23);
      if (round % 16 == 0)
        x = std::copysign(i % 3 == 0 ? kLeastExact : i % 3 == 1 ? kMostExact : 0.f, random_float());
      x = std::copysign(std::min(std::abs(x), kMostExact), x);
      (i < 16 ? low[i] : high[i - 16]) = x;
    }
    Bits pieces[kPieces];
    const uint32_t control = _mm_getcsr();
    if (flushing) _mm_setcsr(control | 0x8040);
    split_pairs<kPieces>(Lanes::load(low), Lanes::load(high), pieces);
    _mm_setcsr(control);
    for (int i = 0; i < 32; ++i) {
      const float x = i < 16 ? low[i] : high[i - 16];
      double sum = 0;
      for (const Bits& piece : pieces) {
        const uint32_t pair = piece[i % 16];
        sum += widened(static_cast<uint16_t>(i < 16 ? pair & 0xffffu : pair >> 16));
      }
      const double error = std::abs(sum - x);
      if (kPieces == 3)
        expect(error == 0, "three pieces", sum, x);
      else
        expect_near("pieces", sum, x, std::abs(x) * (kPieces == 2 ? 0x1p-17 : 0x1p-8));
    }
  }
}

// Two pieces hold every float16.
void check_split_half() {
  for (uint32_t bits = 0; bits < 65536; bits += 16) {
    if ((bits >> 10 & 31) == 31) continue;
    float numbers[16];
    for (uint32_t i = 0; i < 16; ++i) {
      Half half;
      half.x = static_cast<uint16_t>(bits + i);
      numbers[i] = widen(half);
    }
    Bits pieces[2];
    split_pairs<2>(Lanes::load(numbers), Lanes::load(numbers), pieces);
    for (int i = 0; i < 16; ++i) {
      const float sum = low_of(pieces[0])[i] + low_of(pieces[1])[i];
      expect(sum == numbers[i], "float16 in two pieces", sum, numbers[i]);
    }
  }
}

void check_extent() {
  struct Case {
    float value;
    bool outside;
  };
  const Case cases[] = {
      {0.f, false},
      {-0.f, false},
      {1.f, false},
      {kLeastExact, false},
      {std::nextafter(kLeastExact, 0.f), true},
      {kMostExact, false},
      {std::nextafter(kMostExact, kInfinity), true},
      {std::numeric_limits<float>::max(), true},
      {std::numeric_limits<float>::denorm_min(), true},
      {std::numeric_limits<float>::min(), true},
      {kInfinity, true},
      {kNaN, true},
      {float_of(0xffffffffu), true},
      {float_of(0x7f800001u), true},
  };
  expect_same<bool>("nothing seen", Extent{}.outside(), false);
  for (const Case& each : cases) {
    for (float sign : {1.f, -1.f}) {
      for (int lane = 0; lane < 16; ++lane) {
        Extent extent;
        Reg x = Lanes::set1(1);
        extent.see(x);
        x[lane] = std::copysign(each.value, sign);
        extent.see(x);
        extent.see(Reg{});
        expect_same<bool>("outside", extent.outside(), each.outside);
      }
    }
  }
}

// ---- Packing

// Memory that ends, and before which there is, memory that cannot be read.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : page_(sysconf(_SC_PAGESIZE)), size_((bytes + page_ - 1) / page_ * page_) {
    base_ =
        static_cast<char*>(mmap(nullptr, size_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + page_, size_, PROT_READ | PROT_WRITE);
  }
  ~Guarded() { munmap(base_, size_ + 2 * page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  char* at_start() { return base_ + page_; }
  char* at_end(size_t bytes) { return base_ + page_ + size_ - bytes; }

 private:
  size_t page_, size_;
  char* base_ = nullptr;
};

template <class S>
S stored(float x) {
  if constexpr (std::is_same_v<S, float>) {
    return x;
  } else {
    return S(x);
  }
}

template <int kPieces, bool kB, class S>
void check_pack(ScalarType dtype, int64_t pixel_stride, int64_t channel_stride, int64_t pixels,
                int64_t channels, bool at_end, float factor, bool masked, bool spoiled) {
  const int64_t first = pixels > 16 ? some_bits() % (pixels - 15) : 0;
  const int64_t count = std::min<int64_t>(pixels - first, 1 + some_bits() % 16);
  const int64_t steps = (channels + kStep - 1) / kStep + some_bits() % 2;
  const int64_t span = (pixels - 1) * pixel_stride + (channels - 1) * channel_stride + 1;
  Guarded memory(span * sizeof(S));
  S* data = reinterpret_cast<S*>(at_end ? memory.at_end(span * sizeof(S)) : memory.at_start());
  for (int64_t i = 0; i < span; ++i) data[i] = stored<S>(kNaN);  // what must not be read
  const uint32_t vectors = masked ? some_bits() & 0xffffu : 0xffffu;
  std::vector<char> kept(channels, 1);
  if (masked)
    for (char& each : kept) each = some_bits() % 4 != 0;
  bool keep[512];
  std::copy(kept.begin(), kept.end(), keep);
  bool outside = false, any = false;
  std::vector<float> values(16 * steps * kStep, 0.f * factor);
  for (int64_t v = 0; v < 16; ++v) {
    for (int64_t e = 0; e < channels; ++e) {
      if (v >= count || !(vectors >> v & 1) || !keep[e]) continue;
      float x = random_float();
      if (spoiled && some_bits() % (16 * channels) < 4) {
        constexpr float kSpoilers[] = {1e-39f, kInfinity, kNaN, 3.4e38f, 1e-32f};
        x = kSpoilers[some_bits() % 5];
      }
      S& place = data[(first + v) * pixel_stride + e * channel_stride];
      place = stored<S>(x);
      const float exact = widen(place), product = exact * factor;
      for (float size : {std::abs(exact), std::abs(product)})
        outside |= exact != 0 && !(size >= kLeastExact && size <= kMostExact);
      values[v * steps * kStep + e] = product;
      any = true;
    }
  }
  std::vector<uint16_t> got(steps * kPieces * kTile + 1, 0x1234);
  Extent extent;
  {
    const Region region;
    const StridedMatrix matrix{data, dtype, channels, channel_stride, pixel_stride};
    pack_panel<kPieces, kB>(matrix, first, count, steps, got.data(), extent, factor, vectors,
                            masked ? keep : nullptr);
  }
  expect_same<int>("pack_panel, behind", got.back(), 0x1234);
  expect_same<bool>("pack_panel, range", extent.outside(), kPieces > 1 && outside && any);
  note_bits(got.data(), outside ? 0 : static_cast<int>(got.size()));
  for (int64_t v = 0; v < 16; ++v) {
    for (int64_t e = 0; e < steps * kStep; ++e) {
      float rest = values[v * steps * kStep + e];
      const int64_t s = e / kStep, i = e % kStep;
      const int64_t at = kB ? i / 2 * 32 + v * 2 + i % 2 : v * kStep + i;
      for (int n = 0; n < kPieces; ++n) {
        const uint16_t expected = rounded_model(rest);
        const uint16_t piece = got[(s * kPieces + n) * kTile + at];
        // Out of range only the first piece is defined.
        const bool defined = n == 0 || !outside;
        expect(!defined || piece == expected || (std::isnan(rest) && std::isnan(widened(piece))),
               "pack_panel", widened(piece), widened(expected));
        rest -= widened(expected);
      }
    }
  }
}

template <int kPieces, bool kB, class S>
void check_packs(ScalarType dtype) {
  for (int round = 0; round < 48; ++round) {
    const int64_t pixels = 1 + some_bits() % 40, channels = 1 + some_bits() % 100;
    const int64_t gap = some_bits() % 3;
    const bool at_end = round % 2 == 0, masked = round / 2 % 2 == 0, spoiled = round / 4 % 2 == 0;
    const float factor = std::array{1.f, -2.f, 0.5f}[round % 3];
    check_pack<kPieces, kB, S>(dtype, channels + gap, 1, pixels, channels, at_end, factor, masked, spoiled);
    check_pack<kPieces, kB, S>(dtype, 1, pixels + gap, pixels, channels, at_end, factor, masked, spoiled);
    check_pack<kPieces, kB, S>(dtype, 2, 2 * pixels + gap, pixels, channels, at_end, factor, masked, spoiled);
  }
}

template <int kPieces>
void check_packing() {
  check_packs<kPieces, false, float>(ScalarType::Float);
  check_packs<kPieces, true, float>(ScalarType::Float);
  check_packs<kPieces, false, Half>(ScalarType::Half);
  check_packs<kPieces, true, Half>(ScalarType::Half);
  check_packs<kPieces, false, BFloat16>(ScalarType::BFloat16);
  check_packs<kPieces, true, BFloat16>(ScalarType::BFloat16);
}

// ---- Weights

template <int kDegree>
void check_exp2_weight() {
  constexpr double kBound = kDegree == 6 ? 1.5e-7 : 1.1e-4;
  double worst = 0;
  for (int i = 0; i < 20000; ++i) {
    float x[16], got[16];
    for (float& each : x) each = some_bits() % 4 == 0 ? random_float() / 2 : -50 + 60 * random_float();
    Lanes::store(got, exp2_weight<kDegree>(Lanes::load(x)));
    for (int lane = 0; lane < 16; ++lane) {
      if (x[lane] < -100) {
        expect_same<float>("exp2_weight of less than -100", got[lane], 0);
        continue;
      }
      const double expected = std::exp2(static_cast<double>(x[lane]));
      worst = std::max(worst, std::abs(got[lane] / expected - 1));
      expect_near("exp2_weight", got[lane], expected, kBound * expected);
      if (kDegree == 6) note(got[lane]);
    }
  }
  expect(worst > kBound / 4, "a bound that says something", worst, kBound);
  const auto of = [](float x) { return exp2_weight<kDegree>(Lanes::set1(x))[3]; };
  expect_same<float>("exp2_weight below the edge", of(std::nextafter(-100.f, -kInfinity)), 0);
  expect_near("exp2_weight of the edge", of(-100.f), 0x1p-100, kBound * 0x1p-100);
  for (float x : {-127.f, -150.f, -1e10f, -3e38f, -kInfinity})
    expect_same<float>("exp2_weight of very little", of(x), 0);
  for (uint32_t payload = 0; payload < 0x400000u; payload = payload * 2 + 1)
    for (uint32_t sign : {0u, 0x80000000u}) {
      const float x = float_of(sign | 0x7fc00000u | payload);
      expect_same<float>("exp2_weight of NaN", of(x), x);
    }
  if (kDegree == 6) expect_same<float>("exp2_weight of 0", of(0.f), 1.f);
}

// ---- Regions, counters

void check_region() {
  const uint32_t before = _mm_getcsr();
  constexpr uint32_t kTowardsZero = 0x6000, kInexact = 0x20, kDivideByZero = 0x04;
  _mm_setcsr((before & ~uint32_t{0x3f}) | kTowardsZero | kDivideByZero);
  const uint32_t control = _mm_getcsr();
  {
    const Region region;
    expect_same<uint32_t>("MXCSR within", _mm_getcsr(), control | 0x8040);
    volatile float denormal = 1e-40f, three = 3;
    const float product = denormal * three;
    expect_same<float>("a denormal within", product, 0);
    volatile float third = 1 / three;
    (void)third;
  }
  expect_same<uint32_t>("MXCSR after", _mm_getcsr(), control | kInexact);
  try {
    const Region region;
    throw 1;
  } catch (int) {
  }
  expect_same<uint32_t>("MXCSR after an exception", _mm_getcsr(), control | kInexact);
  _mm_setcsr(before);
#if !defined(VOSOPS_AMX_TWIN)
  alignas(64) uint8_t state[64];
  {
    const Region region;
    asm volatile("sttilecfg %0" : "=m"(state));
    expect_same<int>("configured", state[0], 1);
  }
  asm volatile("sttilecfg %0" : "=m"(state));
  expect_same<int>("released", state[0], 0);
#endif
}

Counter first_counter("test.first"), second_counter("test.second");

void check_counters() {
  ++second_counter;
  ++second_counter;
  const std::string text = " " + counts() + " ";
  expect(text.find(" test.first=0 ") != std::string::npos, "counter at 0", 0, 0);
  expect(text.find(" test.second=2 ") != std::string::npos, "counter at 2", 0, 2);
}

int run() {
  check_counters();
  check_extent();
  const std::vector<float> numbers = numbers_to_round();
  for (bool flushing : {false, true}) {
    check_rounding(numbers, flushing);
    check_split<1>(flushing);
    check_split<2>(flushing);
    check_split<3>(flushing);
  }
  check_split_half();
  check_exp2_weight<3>();
  check_exp2_weight<6>();
  if (!ready()) {
    std::printf("%lld comparisons, %lld failed; no tiles: %s\n", static_cast<long long>(compared),
                static_cast<long long>(failed), refusal());
    return failed == 0 ? 0 : 1;
  }
  check_region();
  check_moves();
  check_packing<1>();
  check_packing<2>();
  check_packing<3>();
  check_products<1>();
  check_products<2>();
  check_products<3>();
  check_dot();
  std::printf("%lld comparisons, %lld failed; all bits %016llx\n", static_cast<long long>(compared),
              static_cast<long long>(failed), static_cast<unsigned long long>(checksum));
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace vosops::cpu::amx

int main() {
  return vosops::cpu::amx::run();
}
