// Local matching by tiles of Intel's matrix engine: a bfloat16 filter with a strict bound, then a check in
// float32, so that the result is that of float32 for every dtype.
//
// With dilation d, the pixels fall into d * d grids that never meet; each is a problem of dilation 1. A task
// owns 16 columns of queries x kTaskRows rows of a grid and takes two rows at a time: two panels of queries
// (B, in the first-level cache) meet every key panel (A, 16 pixels of a key row) in reach, two by two, and
// the 16 x 16 scores of a pair (h = |k|^2 / 2 - q.k, the first term being the tile's initial value) are
// reduced while the engine multiplies the next. What remains of four keys is, for each query, object and ring
// of radii, the least possible score h - E of its pixels there; the least h + E so far bounds what can still
// win. At the end of a pair of rows every such group whose h - E is within the bound, one or two of some
// hundreds, is computed in float32 from the differences. Nothing overflows: if all are within the bound, all
// are computed.
//
// E covers the rounding to bfloat16 (Cauchy-Schwarz with the norms of what was rounded away, the mean of the
// keys being subtracted from both sides first), the engine's additions, and the rounding of the check itself:
// the pixel that float32 differences call nearest is always checked, and on a tie the first one wins.
//
// Bytes: each key is packed once (for 16 pixels of 100 channels 4 KB of bfloat16, 1 KB of norms and, but for
// bfloat16 itself, a copy of 7 KB); going down the rows, 32 rows x 3 panels stay in the second-level cache. A
// group is checked from 28 cache lines. Floor: of the products 65 % are within a window of radius 15 (31 of
// 48 columns), 78 % of the channels are not padding (100 of 128).
//
// More than 800 lines: packing, filter and check share the layout of a column's panels, which is their own.
#include "cpu/local_matching_amx.h"

#if defined(VOSOPS_AMX)

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/amx.h"
#include "cpu/best.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace vosops::cpu::amx {
namespace {

Counter served("local_matching.filter"), left_out("local_matching.small"),
    out_of_range("local_matching.range");

constexpr float kAbsent = std::numeric_limits<float>::infinity();
constexpr float kFar = 1e38f;       // |k|^2 / 2 of a pixel that no object has
constexpr float kMostNorm = 1e36f;  // of |q|^2 and |k|^2: sums of them stay far below kFar
constexpr float kLeastScore =
    0x1p-96f;  // more than what denormals and squares of less than 2^-63, read as 0, amount to
constexpr float kUnit = 0x1p-24f;  // the relative error of a rounding

// ---- Geometry

// The pixels (y0 + y * dilation, x0 + x * dilation) of a frame.
struct Grid {
  int64_t y0, x0, dilation, height, width, panels;  // panels: of 16 pixels, in a row

  Grid(int64_t y0_, int64_t x0_, int64_t dilation_, int64_t frame_height, int64_t frame_width)
      : y0(y0_),
        x0(x0_),
        dilation(dilation_),
        height((frame_height - y0_ + dilation_ - 1) / dilation_),
        width((frame_width - x0_ + dilation_ - 1) / dilation_),
        panels((width + kRows - 1) / kRows) {}
  int64_t y(int64_t row) const { return y0 + row * dilation; }
  int64_t x(int64_t column) const { return x0 + column * dilation; }
  // The bits of the pixels of a panel that lie inside the frame.
  uint32_t inside(int64_t panel) const {
    const int64_t count = width - panel * kRows;
    return count >= kRows ? 0xffffu : (1u << count) - 1;
  }
};

// The bits first .. last of 16, as far as there are any.
inline uint32_t run(int64_t first, int64_t last) {
  first = std::max<int64_t>(first, 0), last = std::min<int64_t>(last, kRows - 1);
  return first > last ? 0 : (2u << last) - (1u << first);
}

// Which lanes (queries) of a panel reach which of the 16 keys of a panel.
struct Reach {
  alignas(32) uint16_t lanes[kRows];  // by key
  bool none, all;
};

// The window in steps of the dilation, and its rings: the pixels between two nested radii.
class Window {
 public:
  int64_t rings, steps, sides;  // key panels -sides .. sides from a query's panel are in reach

  Window(const std::vector<int64_t>& radius, int64_t dilation, int64_t longest)
      : rings(static_cast<int64_t>(radius.size())) {
    for (int64_t r : radius) steps_.push_back(std::min(r / dilation, longest));
    steps = steps_.back();
    sides = (steps + kRows - 1) / kRows;
    for (int64_t ring = 0; ring < rings; ++ring) {
      for (int64_t side = -sides; side <= sides; ++side) {
        reach_.push_back(reach(ring, side, false));
        reach_.push_back(reach(ring, side, true));
      }
    }
  }

  // The first ring that has a pixel `down` rows above or below.
  int64_t first_ring(int64_t down) const {
    return std::lower_bound(steps_.begin(), steps_.end(), down) - steps_.begin();
  }
  // Of a ring, `down` rows above or below, in the panel `side` panels to the right.
  const Reach& reach_of(int64_t ring, int64_t side, int64_t down) const {
    return reach_[(ring * (2 * sides + 1) + side + sides) * 2 + (has_inner(ring, down) ? 1 : 0)];
  }
  // The keys of that panel which the query in `lane` reaches.
  uint32_t keys(int64_t ring, int64_t side, int64_t down, int64_t lane) const {
    return within(ring, lane - side * kRows, has_inner(ring, down));
  }

 private:
  bool has_inner(int64_t ring, int64_t down) const { return ring > 0 && down <= steps_[ring - 1]; }
  uint32_t within(int64_t ring, int64_t at, bool without_inner) const {
    const uint32_t bits = run(at - steps_[ring], at + steps_[ring]);
    return without_inner ? bits & ~run(at - steps_[ring - 1], at + steps_[ring - 1]) : bits;
  }
  Reach reach(int64_t ring, int64_t side, bool inner) const {
    Reach r{.lanes = {}, .none = true, .all = true};
    if (ring == 0 && inner) return r;
    for (int64_t key = 0; key < kRows; ++key) {
      r.lanes[key] = static_cast<uint16_t>(within(ring, side * kRows + key, inner));
      r.none &= r.lanes[key] == 0;
      r.all &= r.lanes[key] == 0xffffu;
    }
    return r;
  }

  std::vector<int64_t> steps_;  // of each radius
  std::vector<Reach> reach_;    // (rings, 2 * sides + 1, 2)
};

// ---- Registers

inline Reg least(Reg a, Reg b) {
#if defined(__AVX512F__)
  return (Reg)_mm512_mask_min_ps((__m512)a, 0xffff, (__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}
inline Reg least_where(uint32_t lanes, Reg a, Reg b) {
#if defined(__AVX512F__)
  return (Reg)_mm512_mask_min_ps((__m512)a, static_cast<__mmask16>(lanes), (__m512)a, (__m512)b);
#else
  for (int i = 0; i < kRows; ++i)
    if (lanes >> i & 1) a[i] = std::min(a[i], b[i]);
  return a;
#endif
}
inline Reg only(Reg x, uint32_t lanes) {
#if defined(__AVX512F__)
  return (Reg)_mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), (__m512)x);
#else
  for (int i = 0; i < kRows; ++i)
    if (!(lanes >> i & 1)) x[i] = 0;
  return x;
#endif
}
inline Reg only_or_absent(Reg x, uint32_t lanes) {
#if defined(__AVX512F__)
  return (Reg)_mm512_mask_mov_ps(_mm512_set1_ps(kAbsent), static_cast<__mmask16>(lanes), (__m512)x);
#else
  for (int i = 0; i < kRows; ++i)
    if (!(lanes >> i & 1)) x[i] = kAbsent;
  return x;
#endif
}
inline Reg square_root(Reg x) {
#if defined(__AVX512F__)
  return (Reg)_mm512_mask_sqrt_ps((__m512)x, 0xffff, (__m512)x);
#else
  for (int i = 0; i < kRows; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
inline float greatest(Reg x) {
  float value = x[0];
  for (int i = 1; i < kRows; ++i) value = std::max(value, x[i]);
  return value;
}

// The least of the lanes whose bit is set, and the first of them that holds it.
struct Least {
  float value;
  int lane;
};
inline Least first_least(Reg x, uint32_t lanes) {
  const Reg some = only_or_absent(x, lanes);
  Reg all =
      least(some, __builtin_shufflevector(some, some, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  all = least(all, __builtin_shufflevector(all, all, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  all = least(all, __builtin_shufflevector(all, all, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  all = least(all, __builtin_shufflevector(all, all, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
  return {all[0], std::countr_zero(lanes_at_least<Lanes>(all, some))};
}

constexpr int kGroups = 4;  // of the 16 keys of a panel: key i is in group i % 4

// The least of each lane over the keys of each group in a tile of scores.
inline void group_least(const float* tile, Reg (&group)[kGroups]) {
#pragma GCC unroll 4
  for (int i = 0; i < kGroups; ++i) group[i] = Lanes::load(tile + i * kRows);
#pragma GCC unroll 16
  for (int i = kGroups; i < kRows; ++i)
    group[i % kGroups] = least(group[i % kGroups], Lanes::load(tile + i * kRows));
}

// The same over the keys whose bit is set in `keys`, each in the lanes that reach it; kFar where there is
// none.
inline void group_least(const float* tile, const Reach& reach, uint32_t keys, Reg (&group)[kGroups]) {
  alignas(32) uint16_t lanes[kRows];
#if defined(__AVX512VL__) && defined(__AVX512BW__)
  const __m256i every = _mm256_load_si256(reinterpret_cast<const __m256i*>(reach.lanes));
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes),
                     _mm256_maskz_mov_epi16(static_cast<__mmask16>(keys), every));
#else
  for (int i = 0; i < kRows; ++i) lanes[i] = keys >> i & 1 ? reach.lanes[i] : 0;
#endif
#pragma GCC unroll 4
  for (int i = 0; i < kGroups; ++i) group[i] = Lanes::set1(kFar);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
    group[i % kGroups] = least_where(lanes[i], group[i % kGroups], Lanes::load(tile + i * kRows));
}

// The sum of the lanes of each of four registers: that of register i in lanes 4 i to 4 i + 3.
inline Reg lane_sums(const Reg (&x)[4]) {
  const auto halves = [](Reg a, Reg b) -> Reg {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const Reg a = halves(x[0], x[1]), b = halves(x[2], x[3]);
  Reg sum = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
            __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return sum + __builtin_shufflevector(sum, sum, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

// ---- Packing

// Reads `channels` channels of the pixels of a panel whose bits are set, the others as 0, as (channels, 16)
// float32. What is read next lies `ahead` numbers behind: channels are far apart, and no processor sees that
// coming.
template <class S>
void read_pixels(const S* from, int64_t channel_stride, int64_t pixel_stride, uint32_t pixels,
                 int64_t channels, int64_t ahead, float* to) {
  if (pixel_stride == 1) {
    for (int64_t c = 0; c < channels; ++c, from += channel_stride) {
      __builtin_prefetch(from + ahead);
      Lanes::store(to + c * kRows, load_some(from, pixels));
    }
  } else if (channel_stride == 1) {
    for (int64_t c = 0; c < channels; c += kRows) {
      const int64_t count = std::min<int64_t>(channels - c, kRows);
      const uint32_t some = count == kRows ? 0xffffu : (1u << count) - 1;
      alignas(64) float rows[kRows * kRows], columns[kRows * kRows];
      for (int i = 0; i < kRows; ++i)
        Lanes::store(rows + i * kRows, load_some(from + i * pixel_stride + c, pixels >> i & 1 ? some : 0));
      float* out = count == kRows ? to + c * kRows : columns;
      transpose_lanes<Lanes>(rows, kRows, out, kRows);
      if (count < kRows) std::copy_n(columns, count * kRows, to + c * kRows);
    }
#if defined(__AVX512F__)
  } else if (std::is_same_v<S, float> && pixel_stride < (1 << 24)) {
    const Bits lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const auto offsets = (__m512i)(lanes * static_cast<uint32_t>(pixel_stride));
    for (int64_t c = 0; c < channels; ++c, from += channel_stride) {
      __builtin_prefetch(from + ahead);
      _mm512_store_ps(
          to + c * kRows,
          _mm512_mask_i32gather_ps(_mm512_setzero_ps(), static_cast<__mmask16>(pixels), offsets, from, 4));
    }
#endif
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int i = 0; i < kRows; ++i)
        to[c * kRows + i] = pixels >> i & 1 ? widen(from[c * channel_stride + i * pixel_stride]) : 0.f;
  }
}

// Of 16 pixels: |x - mean|^2, and the squared norm of what rounding takes away from x - mean.
struct Norms {
  Reg whole, lost;
};

// Packs (steps * 32, 16) float32 less the mean as a panel: keys as A, queries negated as B.
template <bool kB>
Norms pack_pixels(const float* from, const float* mean, int64_t steps, uint32_t pixels, uint16_t* to) {
  Reg whole[4] = {}, lost[4] = {};
  for (int64_t s = 0; s < steps; ++s, to += kTile) {
    alignas(64) Bits rows[kRows];
    const auto pack = [&](int i, int chain) {
      const Reg low = only(Lanes::load(from) - mean[0], pixels);
      const Reg high = only(Lanes::load(from + kRows) - mean[1], pixels);
      const Bits pairs = round_pairs(low, high);
      const Reg low_lost = low - low_of(pairs), high_lost = high - high_of(pairs);
      whole[chain] = Lanes::fma(low, low, whole[chain]);
      whole[chain + 1] = Lanes::fma(high, high, whole[chain + 1]);
      lost[chain] = Lanes::fma(low_lost, low_lost, lost[chain]);
      lost[chain + 1] = Lanes::fma(high_lost, high_lost, lost[chain + 1]);
      rows[i] = kB ? pairs ^ 0x80008000u : pairs;
      from += 2 * kRows;
      mean += 2;
    };
    for (int i = 0; i < kRows; i += 2) {
      pack(i, 0);
      pack(i + 1, 2);
    }
    if constexpr (!kB) transpose_pairs(rows);
    std::memcpy(to, rows, sizeof rows);
  }
  return {(whole[0] + whole[1]) + (whole[2] + whole[3]), (lost[0] + lost[1]) + (lost[2] + lost[3])};
}

// A pixel's channels lie `channel` apart, the pixels of a row of a grid `pixel`, the rows `row`.
struct Strides {
  int64_t channel, row, pixel;
};

// From (channels, 16) to 16 rows of `row` channels, a multiple of 16: what lies past the channels is 0 in
// both.
inline void transpose_pixels(const float* from, int64_t row, float* to) {
  for (int64_t c = 0; c < row; c += kRows) transpose_lanes<Lanes>(from + c * kRows, kRows, to + c, row);
}

// One grid of one batch element as panels of keys. Panel (y, i) has index y * grid.panels + i. Of bfloat16
// the tiles are the keys themselves, and there are no copies.
template <class S>
struct PackedKeys {
  static constexpr bool kCopies = !std::is_same_v<S, BFloat16>;
  const Grid& grid;
  int64_t channels, steps, row, objects;  // row: the channels of a pixel with padding
  Workspace<uint16_t> tiles;              // (panels, steps, kTile)
  Workspace<float> norms;          // (panels, 16, 16): |k|^2 / 2 in every lane, kFar for no object's pixels
  Workspace<float> copies;         // (panels, 16, row)
  Workspace<float> longest, lost;  // (panels): the greatest norms of a pixel and of what rounding took away
  Workspace<uint16_t> objects_of;  // (panels, objects): the bits of each object's pixels
  Workspace<uint16_t> any;         // (panels): of any object's
  std::atomic<bool> outside{false};

  PackedKeys(const Grid& grid_, int64_t channels_, int64_t objects_)
      : grid(grid_),
        channels(channels_),
        steps((channels_ + kStep - 1) / kStep),
        row(kCopies ? (channels_ + kRows - 1) / kRows * kRows : steps * kStep),
        objects(objects_),
        tiles(panels() * steps * kTile),
        norms(panels() * kSums),
        copies(kCopies ? panels() * kRows * row : 0),
        longest(panels()),
        lost(panels()),
        objects_of(panels() * objects),
        any(panels()) {}
  int64_t panels() const { return grid.height * grid.panels; }
  const uint16_t* panel(int64_t i) const { return tiles.data() + i * steps * kTile; }

  // |q - k|^2 of a query of `row` channels and the four keys of a group: that of key 4 i + group in lanes 4 i
  // on.
  Reg distances(const float* query, int64_t panel, int group) const {
    Reg sum[4] = {};
    for (int64_t c = 0; c < row; c += kRows) {
      const Reg q = Lanes::load(query + c);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Reg difference = q - key(panel, 4 * i + group, c);
        sum[i] = Lanes::fma(difference, difference, sum[i]);
      }
    }
    return lane_sums(sum);
  }
  void prefetch(int64_t panel, int group) const {
    constexpr int64_t kLine = 64 / sizeof(float);
    if constexpr (kCopies) {
      for (int i = 0; i < 4; ++i) {
        const float* from = copies.data() + (panel * kRows + 4 * i + group) * row;
        for (int64_t c = 0; c < row; c += kLine) __builtin_prefetch(from + c);
      }
    } else {
      for (int i = 0; i < 4; ++i)
        for (int64_t s = 0; s < steps; ++s)
          __builtin_prefetch(this->panel(panel) + s * kTile + (4 * i + group) * kStep);
    }
  }

 private:
  // 16 channels of a key.
  Reg key(int64_t panel, int64_t i, int64_t channel) const {
    if constexpr (kCopies) return Lanes::load(copies.data() + (panel * kRows + i) * row + channel);
    const uint16_t* tile = this->panel(panel) + channel / kStep * kTile;
    return load_some(reinterpret_cast<const BFloat16*>(tile + i * kStep + channel % kStep), 0xffffu);
  }
};

// The bits of a row of 16 bool, `stride` apart.
inline uint32_t bits_of(const bool* from, int64_t stride, uint32_t inside) {
  uint32_t bits = 0;
  for (int i = 0; i < kRows && inside >> i; ++i) bits |= static_cast<uint32_t>(from[i * stride]) << i;
  return bits;
}

struct Masks {
  const bool* data;
  int64_t object, row, pixel;  // strides
};

template <class S>
void pack_keys(const S* from, const Strides& stride, const Masks& masks, const float* mean,
               PackedKeys<S>& keys) {
  const Grid& grid = keys.grid;
  torch::stable::parallel_for(0, grid.height, 1, [&](int64_t begin, int64_t end) {
    bool outside = false;
    Workspace<float> pixels(keys.steps * kStep * kRows);
    std::fill_n(pixels.data(), keys.steps * kStep * kRows, 0.f);
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t i = 0; i < grid.panels; ++i) {
        const int64_t panel = y * grid.panels + i;
        uint32_t any = 0;
        for (int64_t o = 0; o < keys.objects; ++o) {
          const bool* row = masks.data + o * masks.object + y * masks.row + i * kRows * masks.pixel;
          const uint32_t bits = bits_of(row, masks.pixel, grid.inside(i));
          keys.objects_of[panel * keys.objects + o] = static_cast<uint16_t>(bits);
          any |= bits;
        }
        keys.any[panel] = static_cast<uint16_t>(any);
        if (any == 0) continue;
        read_pixels(from + y * stride.row + i * kRows * stride.pixel, stride.channel, stride.pixel, any,
                    keys.channels, 2 * kRows, pixels.data());
        if constexpr (PackedKeys<S>::kCopies)
          transpose_pixels(pixels.data(), keys.row, keys.copies.data() + panel * kRows * keys.row);
        const Norms norms = pack_pixels<false>(pixels.data(), mean, keys.steps, any,
                                               keys.tiles.data() + panel * keys.steps * kTile);
        float* out = keys.norms.data() + panel * kSums;
        for (int k = 0; k < kRows; ++k)
          Lanes::store(out + k * kRows, Lanes::set1(any >> k & 1 ? norms.whole[k] / 2 : kFar));
        const float longest = greatest(norms.whole);
        outside |= lanes_at_least<Lanes>(Lanes::set1(kMostNorm), norms.whole) != 0xffffu;
        keys.longest[panel] = std::sqrt(longest);
        keys.lost[panel] = std::sqrt(greatest(norms.lost));
      }
    }
    if (outside) keys.outside = true;
  });
}

// About the mean of the keys, of a few hundred of them; zero where that is not finite. Any vector would do.
template <class S>
void sample_mean(const S* from, const Strides& stride, const Grid& grid, int64_t channels, float* mean) {
  constexpr int64_t kSampledRows = 8, kSampledColumns = 4;
  const int64_t down = std::max<int64_t>(1, grid.height / kSampledRows);
  const int64_t across = std::max<int64_t>(1, grid.panels / kSampledColumns) * kRows;
  alignas(64) float values[kStep * kRows];
  for (int64_t first = 0; first < channels; first += kStep) {
    const int64_t count = std::min<int64_t>(channels - first, kStep);
    Reg sum[kStep] = {};
    int64_t pixels = 0;
    for (int64_t y = down / 2; y < grid.height; y += down) {
      for (int64_t x = 0; x < grid.width; x += across) {
        const uint32_t inside = grid.inside(x / kRows);
        read_pixels(from + first * stride.channel + y * stride.row + x * stride.pixel, stride.channel,
                    stride.pixel, inside, count, across, values);
        for (int64_t c = 0; c < count; ++c) sum[c] += Lanes::load(values + c * kRows);
        pixels += std::popcount(inside);
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      float total = 0;
      for (int i = 0; i < kRows; ++i) total += sum[c][i];
      total /= static_cast<float>(pixels);
      mean[first + c] = std::isfinite(total) ? total : 0.f;
    }
  }
}

// ---- Matching

// What the tasks of a grid read and write.
template <class S>
struct Problem {
  const S* query;
  Strides query_stride;
  const bool* query_mask;  // null where every query is wanted
  int64_t query_mask_row, query_mask_pixel;
  const Grid& grid;
  const Window& window;
  const PackedKeys<S>& keys;
  const float* mean;
  int64_t frame_width;
  float* distance;  // (objects, rings, frame height, frame width)
  int64_t* index;
  int64_t frame;  // pixels of it
  std::atomic<bool>& outside;
};

constexpr int64_t kTaskRows = 32;

// One thread: takes tasks of 16 columns x kTaskRows rows.
template <class S>
class Worker {
 public:
  explicit Worker(const Problem<S>& problem)
      : p_(problem),
        keys_(problem.keys),
        slots_(2 * keys_.objects * p_.window.rings),
        pixels_(keys_.steps * kStep * kRows),
        queries_(2 * kRows * keys_.row),
        panels_(2 * keys_.steps * kTile),
        sums_(2 * 4 * kSums),
        lower_(kEntries * kRows),
        upper_(slots_ * kRows),
        best_(slots_ * kRows),
        index_(slots_ * kRows) {
    std::fill_n(pixels_.data(), keys_.steps * kStep * kRows, 0.f);
  }

  void operator()(int64_t task) {
    const int64_t panels = p_.grid.panels, chunks = (p_.grid.height + kTaskRows - 1) / kTaskRows;
    panel_ = task / chunks;
    const int64_t begin = task % chunks * kTaskRows, end = std::min(begin + kTaskRows, p_.grid.height);
    first_panel_ = std::max<int64_t>(panel_ - p_.window.sides, 0);
    last_panel_ = std::min(panel_ + p_.window.sides, panels - 1);
    for (int64_t y = begin; y < end; y += 2) match_rows(y, static_cast<int>(std::min<int64_t>(2, end - y)));
  }

 private:
  static constexpr int64_t kEntries = 2048;

  // Four keys that may hold the nearest pixel of some of 16 queries: their least possible scores are in
  // lower_.
  struct Entry {
    int32_t panel, slot;
    uint16_t keys;  // of the panel, that are the object's
    int16_t ring;
    int8_t row, group;
  };

  // Slots are (object, ring, row), 16 lanes each.
  int64_t slot(int64_t object, int64_t ring, int64_t row) const {
    return (object * p_.window.rings + ring) * 2 + row;
  }

  void match_rows(int64_t y, int rows) {
    y_ = y;
    rows_ = rows;
    bool any_wanted = false;
    for (int r = 0; r < 2; ++r) {
      wanted_[r] = r < rows ? wanted(y + r) : 0;
      any_wanted |= wanted_[r] != 0;
    }
    std::fill_n(best_.data(), slots_ * kRows, kAbsent);
    std::fill_n(index_.data(), slots_ * kRows, int64_t{-1});
    if (any_wanted && list_keys()) {
      std::fill_n(upper_.data(), slots_ * kRows, kFar / 2);  // below the scores of what no object has
      pack_queries();
      search();
      check();
    }
    write();
  }

  uint32_t wanted(int64_t y) const {
    const uint32_t inside = p_.grid.inside(panel_);
    if (p_.query_mask == nullptr) return inside;
    const bool* row = p_.query_mask + y * p_.query_mask_row + panel_ * kRows * p_.query_mask_pixel;
    return bits_of(row, p_.query_mask_pixel, inside);
  }

  // The key panels in reach of either row that hold a pixel of any object. The nearest rows come
  // first, so that the bounds are soon close.
  bool list_keys() {
    list_.clear();
    for (int64_t i = 0; i < 2 * p_.window.steps + 2; ++i) {  // y_, y_ + 1, y_ - 1, y_ + 2, ...
      const int64_t y = i & 1 ? y_ + (i + 1) / 2 : y_ - i / 2;
      if (y < 0 || y >= p_.grid.height || y > y_ + rows_ - 1 + p_.window.steps) continue;
      for (int64_t i = first_panel_; i <= last_panel_; ++i) {
        if (keys_.any.data()[y * p_.grid.panels + i] != 0) list_.push_back({y, i});
      }
    }
    return !list_.empty();
  }

  void pack_queries() {
    // Relative errors of sums in four chains and in the engine's chains, twice what they are at most.
    const float chains = static_cast<float>(keys_.channels) / 2 + static_cast<float>(keys_.steps) + 32;
    rounding_ = 1.1f * kUnit * chains;
    for (int r = 0; r < rows_; ++r) {
      const S* from = p_.query + (y_ + r) * p_.query_stride.row + panel_ * kRows * p_.query_stride.pixel;
      read_pixels(from, p_.query_stride.channel, p_.query_stride.pixel, wanted_[r], keys_.channels,
                  2 * p_.query_stride.row, pixels_.data());
      transpose_pixels(pixels_.data(), keys_.row, queries_.data() + r * kRows * keys_.row);
      const Norms norms = pack_pixels<true>(pixels_.data(), p_.mean, keys_.steps, wanted_[r],
                                            panels_.data() + r * keys_.steps * kTile);
      if (lanes_at_least<Lanes>(Lanes::set1(kMostNorm), norms.whole) != 0xffffu) p_.outside = true;
      const float more = 1 + 4 * rounding_;
      query_length_[r] = square_root(norms.whole) * more;
      query_lost_[r] = square_root(norms.lost) * more;
      query_error_[r] = norms.whole * (rounding_ * more) + kLeastScore;
    }
  }

  // Multiplies the listed key panels two by two with both rows, and takes in the products of the pair before.
  void search() {
    const int64_t count = static_cast<int64_t>(list_.size()), steps = keys_.steps;
    const uint16_t *b0 = panels_.data(), *b1 = rows_ == 2 ? b0 + steps * kTile : b0;
    for (int64_t i = 0; i < count + 2; i += 2) {
      float* const sums = sums_.data() + (i & 2) * 2 * kSums;
      if (i < count) {
        const int64_t first = index_of(list_[i]), second = index_of(list_[std::min(i + 1, count - 1)]);
        const float *n0 = keys_.norms.data() + first * kSums, *n1 = keys_.norms.data() + second * kSums;
        tile_load<0>(n0);
        tile_load<1>(n0);
        tile_load<2>(n1);
        tile_load<3>(n1);
        multiply_add<1>(keys_.panel(first), keys_.panel(second), b0, b1, steps);
        store_sums(sums);
      }
      if (i == 0) continue;
      const float* before = sums_.data() + ((i & 2) ^ 2) * 2 * kSums;
      for (int64_t j = i - 2; j < std::min(i, count); ++j, before += 2 * kSums) {
        for (int r = 0; r < rows_; ++r) take(list_[j], r, before + r * kSums);
      }
    }
  }

  struct Place {
    int64_t y, panel;
  };
  int64_t index_of(const Place& place) const { return place.y * p_.grid.panels + place.panel; }

  // Takes in the scores of 16 keys and the queries of a row.
  void take(const Place& place, int row, const float* scores) {
    const Window& w = p_.window;
    const int64_t down = std::abs(place.y - y_ - row), side = place.panel - panel_;
    if (down > w.steps || wanted_[row] == 0) return;
    const int64_t panel = index_of(place);
    const float longest = keys_.longest.data()[panel];
    const Reg error = Lanes::fma(Lanes::set1(longest), query_lost_[row],
                                 Lanes::fma(Lanes::set1(keys_.lost.data()[panel]), query_length_[row],
                                            query_error_[row] + longest * longest * rounding_));
    const uint16_t* const objects = keys_.objects_of.data() + panel * keys_.objects;
    for (int64_t o = 0; o < keys_.objects; ++o) {
      if (objects[o] == 0) continue;
      for (int64_t ring = w.first_ring(down); ring < w.rings; ++ring) {
        const Reach& reach = w.reach_of(ring, side, down);
        if (reach.none) continue;
        const bool all = reach.all && objects[o] == keys_.any.data()[panel];
        Reg score[kGroups];
        if (all) {
          group_least(scores, score);
        } else {
          group_least(scores, reach, objects[o], score);
        }
        // What a ring holds must be nearer than what the rings within it hold.
        const int64_t slot = this->slot(o, ring, row);
        float* const upper = upper_.data() + slot * kRows;
        Reg bound = least(least(score[0], score[1]), least(score[2], score[3])) + error;
        bound = least(bound, Lanes::load(upper));
        if (ring > 0) bound = least(bound, Lanes::load(upper - 2 * kRows));
        Lanes::store(upper, bound);
        const Reg most = bound + error;
#pragma GCC unroll 4
        for (int i = 0; i < kGroups; ++i) {
          if ((lanes_at_least<Lanes>(most, score[i]) & wanted_[row]) == 0) continue;
          Lanes::store(lower_.data() + entries_.size() * kRows, score[i] - error);
          entries_.push_back({static_cast<int32_t>(panel), static_cast<int32_t>(slot), objects[o],
                              static_cast<int16_t>(ring), static_cast<int8_t>(row), static_cast<int8_t>(i)});
          if (entries_.size() == kEntries) check();
        }
      }
    }
  }

  // Computes what the bounds do not exclude of the entries, and forgets them.
  void check() {
    candidates_.clear();
    for (size_t i = 0; i < entries_.size(); ++i) {
      const Entry& entry = entries_[i];
      const Reg upper = Lanes::load(upper_.data() + entry.slot * kRows);
      const Reg lower = Lanes::load(lower_.data() + i * kRows);
      uint32_t lanes = lanes_at_least<Lanes>(upper, lower) & wanted_[entry.row];
      for (; lanes != 0; lanes &= lanes - 1)
        candidates_.push_back({static_cast<int32_t>(i), std::countr_zero(lanes)});
    }
    const uint32_t flushing = _mm_getcsr();
    _mm_setcsr(region_.control());  // distances may be denormal
    constexpr size_t kAhead = 3;
    for (size_t i = 0; i < candidates_.size() + kAhead; ++i) {
      if (i < candidates_.size())
        keys_.prefetch(entries_[candidates_[i].entry].panel, entries_[candidates_[i].entry].group);
      if (i >= kAhead) check(candidates_[i - kAhead]);
    }
    _mm_setcsr(flushing);
    entries_.clear();
  }

  // An entry and a query that it may hold the nearest pixel of.
  struct Candidate {
    int32_t entry, lane;
  };

  void check(const Candidate& candidate) {
    const Entry& entry = entries_[candidate.entry];
    const int64_t y = entry.panel / p_.grid.panels, panel = entry.panel % p_.grid.panels;
    const int64_t down = std::abs(y - y_ - entry.row);
    const uint32_t keys = p_.window.keys(entry.ring, panel - panel_, down, candidate.lane) & entry.keys;
    const uint32_t of_group = keys >> entry.group & 0x1111u;
    if (of_group == 0) return;
    const float* query = queries_.data() + (entry.row * kRows + candidate.lane) * keys_.row;
    const Least nearest = first_least(keys_.distances(query, entry.panel, entry.group), of_group);
    const int64_t key = nearest.lane + entry.group, at = entry.slot * kRows + candidate.lane;
    const int64_t index = p_.grid.y(y) * p_.frame_width + p_.grid.x(panel * kRows + key);
    if (nearest.value < best_[at] || (nearest.value == best_[at] && index < index_[at])) {
      best_[at] = nearest.value;
      index_[at] = index;
    }
  }

  // Makes the best of each ring the best within its radius, and writes the rows.
  void write() {
    const int64_t columns = std::min<int64_t>(kRows, p_.grid.width - panel_ * kRows);
    for (int64_t o = 0; o < keys_.objects; ++o) {
      for (int64_t ring = 0; ring < p_.window.rings; ++ring) {
        for (int r = 0; r < rows_; ++r) {
          float* best = best_.data() + slot(o, ring, r) * kRows;
          int64_t* index = index_.data() + slot(o, ring, r) * kRows;
          if (ring > 0) {
            const float* inner = best - 2 * kRows;
            const int64_t* inner_index = index - 2 * kRows;
            for (int i = 0; i < kRows; ++i) {
              if (inner_index[i] < 0) continue;
              if (inner[i] < best[i] || (inner[i] == best[i] && inner_index[i] < index[i])) {
                best[i] = inner[i];
                index[i] = inner_index[i];
              }
            }
          }
          const int64_t at = (o * p_.window.rings + ring) * p_.frame + p_.grid.y(y_ + r) * p_.frame_width +
                             p_.grid.x(panel_ * kRows);
          for (int64_t i = 0; i < columns; ++i) {
            p_.distance[at + i * p_.grid.dilation] = best[i];
            p_.index[at + i * p_.grid.dilation] = index[i];
          }
        }
      }
    }
  }

  const Problem<S>& p_;
  const PackedKeys<S>& keys_;
  const Region region_;
  const int64_t slots_;
  int64_t y_ = 0, panel_ = 0, first_panel_ = 0, last_panel_ = 0;
  int rows_ = 0;
  uint32_t wanted_[2] = {};
  float rounding_ = 0;
  Reg query_length_[2], query_lost_[2], query_error_[2];
  Workspace<float> pixels_;     // (steps * 32, 16)
  Workspace<float> queries_;    // (2, 16, keys_.row)
  Workspace<uint16_t> panels_;  // (2, steps, kTile)
  Workspace<float> sums_;       // (2, 4, 16, 16): of the pair that is multiplied and of the one before
  std::vector<Place> list_;
  std::vector<Entry> entries_;
  std::vector<Candidate> candidates_;
  Workspace<float> lower_;  // (entries, 16): h - E
  Workspace<float> upper_;  // (slots, 16): the least h + E
  Workspace<float> best_;
  Workspace<int64_t> index_;
};

template <class S>
bool match_grid(const Tensor& query, const Tensor& key, const Tensor& mask,
                const std::optional<Tensor>& query_mask, int64_t n, const Grid& grid, const Window& window,
                float* distance, int64_t* index) {
  const int64_t channels = query.size(1);
  const auto strides_of = [&](const Tensor& t) {
    return Strides{t.stride(1), t.stride(2) * grid.dilation, t.stride(3) * grid.dilation};
  };
  const auto start_of = [&](const Tensor& t, const auto* data) {
    const int64_t d = t.dim();
    return data + n * t.stride(0) + grid.y0 * t.stride(d - 2) + grid.x0 * t.stride(d - 1);
  };
  const S* keys_at = start_of(key, key.const_data_ptr<S>());
  const int64_t padded = (channels + kStep - 1) / kStep * kStep;
  Workspace<float> mean(padded);
  std::fill_n(mean.data(), padded, 0.f);
  if constexpr (!std::is_same_v<S, BFloat16>) {  // whose numbers are not to be rounded
    sample_mean(keys_at, strides_of(key), grid, channels, mean.data());
  }
  PackedKeys<S> keys(grid, channels, mask.size(1));
  pack_keys(keys_at, strides_of(key),
            {start_of(mask, mask.const_data_ptr<bool>()), mask.stride(1), mask.stride(2) * grid.dilation,
             mask.stride(3) * grid.dilation},
            mean.data(), keys);
  if (keys.outside) return false;
  std::atomic<bool> outside{false};
  const Problem<S> problem{
      .query = start_of(query, query.const_data_ptr<S>()),
      .query_stride = strides_of(query),
      .query_mask = query_mask ? start_of(*query_mask, query_mask->const_data_ptr<bool>()) : nullptr,
      .query_mask_row = query_mask ? query_mask->stride(1) * grid.dilation : 0,
      .query_mask_pixel = query_mask ? query_mask->stride(2) * grid.dilation : 0,
      .grid = grid,
      .window = window,
      .keys = keys,
      .mean = mean.data(),
      .frame_width = query.size(3),
      .distance = distance,
      .index = index,
      .frame = query.size(2) * query.size(3),
      .outside = outside};
  const int64_t chunks = (grid.height + kTaskRows - 1) / kTaskRows;
  parallel_tasks(grid.panels * chunks, [&] { return Worker<S>(problem); });
  return !outside;
}

template <class S>
bool match_batch(const Tensor& query, const Tensor& key, const Tensor& mask,
                 const std::optional<Tensor>& query_mask, const std::vector<int64_t>& radius,
                 int64_t dilation, Tensor& distance, Tensor& index) {
  const int64_t height = query.size(2), width = query.size(3);
  const Window window(radius, dilation, std::max(height, width));
  const int64_t frame = mask.size(1) * window.rings * height * width;
  for (int64_t n = 0; n < query.size(0); ++n) {
    for (int64_t y = 0; y < std::min(dilation, height); ++y) {
      for (int64_t x = 0; x < std::min(dilation, width); ++x) {
        const Grid grid(y, x, dilation, height, width);
        if (!match_grid<S>(query, key, mask, query_mask, n, grid, window,
                           distance.mutable_data_ptr<float>() + n * frame,
                           index.mutable_data_ptr<int64_t>() + n * frame)) {
          return false;
        }
      }
    }
  }
  return true;
}

// Whether tiles are faster: products of a query in its window, against the slots that each have a check of
// their own and, with a dilation, pixels that are not adjacent. Measured at 60 x 107 and 120 x 214 with 4 to
// 256 channels, radii 0 to 15, 1 to 18 slots and masks of 1 to 100 % of the frame, on an Intel Xeon (family
// 6, model 207) whose engine other programs slowed down: tiles gain 1.0 to 1.1x at the limit. The twin, which
// is for tests, takes everything.
bool worthwhile(const Tensor& query, const Tensor& mask, const std::vector<int64_t>& radius,
                int64_t dilation) {
#if defined(VOSOPS_AMX_TWIN)
  return true;
#else
  constexpr int64_t kLeastProducts = 24000, kLeastProductsBf16 = 8000;
  const int64_t across = 2 * (std::min<int64_t>(radius.back(), 1 << 20) / dilation) + 1;
  const int64_t pixels = std::min(across, query.size(2)) * std::min(across, query.size(3));
  const int64_t slots = mask.size(1) * static_cast<int64_t>(radius.size());
  const int64_t least = query.scalar_type() == ScalarType::BFloat16 ? kLeastProductsBf16 : kLeastProducts;
  return 2 * pixels * query.size(1) >= least * std::max<int64_t>(slots, 2) * (dilation > 1 ? 2 : 1);
#endif
}

}  // namespace

bool match_locally(const Tensor& query, const Tensor& key, const Tensor& mask,
                   const std::optional<Tensor>& query_mask, const std::vector<int64_t>& radius,
                   int64_t dilation, Tensor& distance, Tensor& index) {
  if (query.scalar_type() == ScalarType::Double) return false;
  if (!worthwhile(query, mask, radius, dilation)) {
    ++left_out;
    return false;
  }
  if (!ready()) return false;
  bool done = false;
  dispatch_floating(query.scalar_type(), [&]<class S>(S) {
    if constexpr (!std::is_same_v<S, double>)
      done = match_batch<S>(query, key, mask, query_mask, radius, dilation, distance, index);
  });
  ++(done ? served : out_of_range);
  return done;
}

}  // namespace vosops::cpu::amx

#endif
