// The matrix products of every CPU op: register tiles over packed panels.
//
// A lane panel holds kLanePanel pixels side by side, element by element: (elements, kLanePanel). A key panel
// holds kKeyPanel pixels alike: (elements, kKeyPanel). multiply() computes their kKeyPanel x kLanePanel dot
// products in registers: per element it loads the lanes once and broadcasts each key, kKeyPanel x
// kTileRegisters FMAs for kTileRegisters + kKeyPanel loads. What happens to the products (a running best, a
// softmax, a store) is the caller's epilogue, inlined, so that they need never reach memory. A lane panel of
// some hundred channels stays in the first-level cache while key panels stream past it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "cpu/element.h"
#include "cpu/vec.h"

namespace vosops::cpu {

constexpr int kTileRegisters = 2;                     // registers of lanes in a tile
constexpr int kKeyPanel = kRegisters == 32 ? 12 : 6;  // keys in a tile
template <class V>
constexpr int kLanePanel = kTileRegisters * V::kLanes;  // pixels in a lane panel

// A tile of sums: [key][register of lanes].
template <class E, int kColumns = kTileRegisters>
using TileSums = typename E::Lanes::Reg[kKeyPanel][kColumns];

#if defined(VOSOPS_BF16_MATRIX)
// multiply() by the instruction for matrices of bfloat16. A register of sums is of two keys and two pixels:
// the first key's lie in its lower half.
template <class E, class Start, class Finish>
[[gnu::always_inline]] inline void multiply_matrices(const float* lanes, const float* keys, int64_t elements,
                                                     const Start& start, const Finish& finish) {
  using V = typename E::Lanes;
  using Reg = typename V::Reg;
  constexpr int kPixelPairs = kLanePanel<V> / 2, kKeyPairs = kKeyPanel / 2;
  static_assert(V::kLanes == 4 && kPixelPairs == 2 * kTileRegisters);
  const auto lower = [](Reg a, Reg b) -> Reg { return __builtin_shufflevector(a, b, 0, 1, 4, 5); };
  const auto upper = [](Reg a, Reg b) -> Reg { return __builtin_shufflevector(a, b, 2, 3, 6, 7); };
  Reg blocks[kKeyPairs][kPixelPairs];
#pragma GCC unroll 16
  for (int j = 0; j < kKeyPairs; ++j) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRegisters; ++r) {
      const Reg first = start(2 * j, r), second = start(2 * j + 1, r);
      blocks[j][2 * r] = lower(first, second);
      blocks[j][2 * r + 1] = upper(first, second);
    }
  }
  for (int64_t e = 0; e < elements; e += E::kRun) {
    Reg q[kPixelPairs];
#pragma GCC unroll 16
    for (int p = 0; p < kPixelPairs; ++p) q[p] = V::load(lanes + p * V::kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kKeyPairs; ++j) {
      const Reg key = V::load(keys + j * V::kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < kPixelPairs; ++p) blocks[j][p] = bf16_matrix(key, q[p], blocks[j][p]);
    }
    lanes += kPixelPairs * V::kLanes;
    keys += kKeyPairs * V::kLanes;
  }
  TileSums<E> sums;
#pragma GCC unroll 16
  for (int j = 0; j < kKeyPairs; ++j) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRegisters; ++r) {
      sums[2 * j][r] = lower(blocks[j][2 * r], blocks[j][2 * r + 1]);
      sums[2 * j + 1][r] = upper(blocks[j][2 * r], blocks[j][2 * r + 1]);
    }
  }
  finish(sums);
}
#endif

// Processors with AMX wait for the first line of every page that comes from the third-level cache. What will
// be read next is fetched into the second there: any address will do.
#if defined(VOSOPS_AMX)
constexpr bool kPrefetches = true;
#else
constexpr bool kPrefetches = false;
#endif
inline void prefetch_second(const float* from) {
  if constexpr (kPrefetches) __builtin_prefetch(from, 0, 2);
}
struct NothingAhead {
  void operator()(int64_t) const {}
};

// sums[j][r] = start(j, r) + sum over elements of lanes[e][r] * keys[e][j]; then finish(sums). The lanes of
// successive elements are lane_stride apart and their keys key_stride. A panel at the end of a row may be
// kColumns < kTileRegisters wide. ahead(e) is called before element e: a place to prefetch from.
template <class E, int kColumns = kTileRegisters, class Start, class Finish, class Ahead = NothingAhead>
[[gnu::always_inline]] inline void multiply(const typename E::Lanes::T* lanes,
                                            const typename E::Lanes::T* keys, int64_t elements,
                                            const Start& start, const Finish& finish,
                                            int64_t lane_stride = kColumns * E::Lanes::kLanes,
                                            int64_t key_stride = kKeyPanel, const Ahead& ahead = {}) {
  using V = typename E::Lanes;
#if defined(VOSOPS_BF16_MATRIX)
  if constexpr (E::kRun == 2) return multiply_matrices<E>(lanes, keys, elements, start, finish);
#endif
  TileSums<E, kColumns> sums;
#pragma GCC unroll 16
  for (int j = 0; j < kKeyPanel; ++j) {
#pragma GCC unroll 16
    for (int r = 0; r < kColumns; ++r) sums[j][r] = start(j, r);
  }
  for (int64_t e = 0; e < elements; ++e) {
    ahead(e);
    typename V::Reg q[kColumns];
#pragma GCC unroll 16
    for (int r = 0; r < kColumns; ++r) q[r] = V::load(lanes + r * V::kLanes);
    if constexpr (kMultipliesByLane) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeyPanel; j += V::kLanes) {
        typename V::Reg key = V::load(keys + j);
        V::pin(key);
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i)
#pragma GCC unroll 16
          for (int r = 0; r < kColumns; ++r) sums[j + i][r] = E::dot(q[r], V::set1(key[i]), sums[j + i][r]);
      }
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < kKeyPanel; ++j) {
        typename V::Reg key = V::set1(keys[j]);
        V::pin(key);
#pragma GCC unroll 16
        for (int r = 0; r < kColumns; ++r) sums[j][r] = E::dot(q[r], key, sums[j][r]);
      }
    }
    lanes += lane_stride;
    keys += key_stride;
  }
  finish(sums);
}

// The same from sums of 0 with each key in a row of its own: key j of element e is rows[j][e].
template <class E, class Finish, class Ahead = NothingAhead>
[[gnu::always_inline]] inline void multiply_rows(
    const typename E::Lanes::T* lanes, const std::array<const typename E::Lanes::T*, kKeyPanel>& rows,
    int64_t elements, const Finish& finish, const Ahead& ahead = {}) {
  using V = typename E::Lanes;
  TileSums<E> sums{};
  for (int64_t e = 0; e < elements; ++e) {
    ahead(e);
    typename V::Reg q[kTileRegisters];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRegisters; ++r) q[r] = V::load(lanes + r * V::kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kKeyPanel; ++j) {
      typename V::T number = rows[j][e];
      V::pin_number(number);
      typename V::Reg key = V::set1(number);
      if constexpr (!kMultipliesByLane) V::pin(key);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRegisters; ++r) sums[j][r] = E::dot(q[r], key, sums[j][r]);
    }
    lanes += kLanePanel<V>;
  }
  finish(sums);
}

// Packs `count` pixels at base + offsets[i] into columns of a panel `stride` wide and zeroes the columns
// after them; norm[0 .. stride) becomes the squared length of each column.
template <class E, class S>
void pack_panel(const S* base, const int64_t* offsets, int64_t count, int64_t channel_stride,
                int64_t channels, int64_t stride, typename E::Lanes::T* panel, typename E::Lanes::T* norm) {
  using T = typename E::Lanes::T;
  std::fill_n(norm, stride, T{0});
  for (int64_t e = 0; e < elements_of<E>(channels); ++e) {
    T* out = panel + panel_at<E>(e, 0, stride);
    pack_element<E>(
        base, [offsets](int64_t x) { return offsets[x]; }, channel_stride, channels, e, count, out, norm);
    for (int64_t i = count; i < stride; ++i) out[i * E::kRun] = T{0};
  }
}

// A strided matrix of any floating dtype: entry (c, i) lies at data[c * channel_stride + i * pixel_stride].
struct StridedMatrix {
  const void* data;
  ScalarType dtype;
  int64_t channels, channel_stride, pixel_stride;

  // The channels and pixels of the last two dimensions of `tensor`, behind the first ones at `offset`.
  static StridedMatrix of(const Tensor& tensor, int64_t offset) {
    const int64_t dim = tensor.dim();
    return {static_cast<const char*>(tensor.const_data_ptr()) + offset * tensor.element_size(),
            tensor.scalar_type(), tensor.size(dim - 2), tensor.stride(dim - 2), tensor.stride(dim - 1)};
  }
};

// Copies kWidth pixels of `channels` channels to a panel as wide. Where the pixels or the channels are
// adjacent, a constant stride lets the compiler use wide moves.
template <int kWidth, class T, class S>
void copy_panel(const S* base, int64_t channels, int64_t channel_stride, int64_t pixel_stride, T* panel) {
  const auto copy = [&](auto channel, auto pixel) {
    for (int64_t e = 0; e < channels; ++e) {
#pragma GCC unroll 64
      for (int i = 0; i < kWidth; ++i)
        panel[e * kWidth + i] = static_cast<T>(widen(base[e * channel + i * pixel]));
    }
  };
  constexpr std::integral_constant<int64_t, 1> kAdjacent;
  if (pixel_stride == 1) return copy(channel_stride, kAdjacent);
  if (channel_stride == 1) return copy(kAdjacent, pixel_stride);
  copy(channel_stride, pixel_stride);
}

// Packs pixels [begin, begin + count) of a matrix into columns of a panel kWidth wide, zeroing those after
// them. An element of two channels reads bfloat16 only, an element of one channel every dtype.
template <class E, int kWidth>
void pack_pixels(const StridedMatrix& matrix, int64_t begin, int64_t count, typename E::Lanes::T* panel) {
  using T = typename E::Lanes::T;
  const auto pack = [&]<class S>(S) {
    const S* base = static_cast<const S*>(matrix.data) + begin * matrix.pixel_stride;
    if (E::kChannels == 1 && count == kWidth) {
      return copy_panel<kWidth>(base, matrix.channels, matrix.channel_stride, matrix.pixel_stride, panel);
    }
    for (int64_t e = 0; e < elements_of<E>(matrix.channels); ++e) {
      const S* source = base + e * E::kChannels * matrix.channel_stride;
      T* out = panel + panel_at<E>(e, 0, kWidth);
      for (int64_t i = 0; i < count; ++i, source += matrix.pixel_stride) {
        if constexpr (E::kChannels == 1) {
          out[i] = static_cast<T>(widen(*source));
        } else {
          const bool has_first = E::kRun == 1 || 2 * e < matrix.channels,
                     has_second = 2 * e + 1 < matrix.channels;
          out[i * E::kRun] =
              E::pair(has_first ? source[0] : S(0.f), has_second ? source[matrix.channel_stride] : S(0.f));
        }
      }
      for (int64_t i = count; i < kWidth; ++i) out[i * E::kRun] = T{0};
    }
  };
  if constexpr (E::kChannels == 2) {
    pack(BFloat16{});
  } else {
    dispatch_floating(matrix.dtype, pack);
  }
}

}  // namespace vosops::cpu
