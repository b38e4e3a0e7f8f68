// Local attention by Intel's matrix engine (amx.h): what its forward and its backward pass are made of.
//
// A task is a row of pixels of one head, taken 16 at a time. What they see in one row of another map lies
// side by side, 16 + 2 reach pixels, so that tiles serve them all:
//
//   band     16 pixels x channels x the pixels of the row: 2 reach + 1 numbers for each of the 16. Tiles go
//   to
//            rows as long as what is seen, where the band of pixel p begins at number p: one unaligned load
//            is one pixel's offsets, with lanes for 16 of them.
//   sums     16 rows of weights, zeros beside the band, x the pixels of the row x channels.
//
// Pixels a multiple of the dilation apart are neighbours: a row is packed as one part for each residue of its
// columns. Maps are packed as B panels of pixels for bands, of channels for sums, once a head; 16 rows of
// both (10 KB a row and piece at 54 x 32 channels) stay in the second-level cache.
//
// Pieces: a bfloat16 is one, a float16 two, a float32 three; weights, which are float32, have two, or three
// for float32 maps. Products of pieces i + j < the greater number are kept. Numbers that pieces do not hold,
// and maps that are not finite where they are summed (a weight of 0 beside the band would make NaN of them),
// are left to the other kernels.
#pragma once

#if defined(VOSOPS_AMX)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <vector>

#include "cpu/amx.h"
#include "cpu/amx_conv.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace vosops::cpu::amx {

constexpr float kLog2 = static_cast<float>(std::numbers::log2e);
constexpr int64_t kUnit = kTile / 2;   // bfloat16 of 16 pixels by 16 channels
constexpr int64_t kTasksOfThread = 4;  // at least, before the next heads are packed

// ---- Geometry

inline int64_t parts_of(int64_t size, int64_t part) {
  return (size + part - 1) / part;
}
inline uint32_t bits_below(int64_t count) {
  return count >= kRows ? 0xffffu : count <= 0 ? 0 : (1u << count) - 1;
}

// The columns first, first + dilation ... of a row: `count` of them, packed as units `unit` to `end`.
struct Phase {
  int64_t first, count, unit, end = 0;
  int64_t blocks() const { return (count + kRows - 1) / kRows; }
};

// The window, and how a row of `width` pixels is packed: in units of 16 pixels of a phase, of which the first
// ones lie `reach` to the left of its first pixel.
struct Window {
  int64_t reach, dilation, height;
  int64_t size;       // offsets in a row of the window, and rows
  int64_t registers;  // with lanes for the offsets of a row
  int64_t tiles;      // of 16 keys, an even number, that 16 queries see in a row
  int64_t units = 0;
  std::vector<Phase> phases;

  Window(int64_t reach_, int64_t dilation_, int64_t height_, int64_t width)
      : reach(reach_),
        dilation(dilation_),
        height(height_),
        size(2 * reach + 1),
        registers(parts_of(size, kRows)),
        tiles(2 * parts_of(kRows + 2 * reach, kStep)) {
    for (int64_t first = 0; first < std::min(dilation, width); ++first) {
      Phase phase{first, (width - first + dilation - 1) / dilation, units};
      units += parts_of(phase.blocks() - 1 + tiles, 2) * 2;
      phase.end = units;
      phases.push_back(phase);
    }
  }
  int64_t pitch() const { return tiles * kRows; }
  // The rows of the window around row y that lie inside the image.
  int64_t first_row(int64_t y) const { return std::max<int64_t>(0, reach - y / dilation); }
  int64_t end_row(int64_t y) const { return std::min(size, reach + (height - 1 - y) / dilation + 1); }
  int64_t row(int64_t y, int64_t i) const { return y + (i - reach) * dilation; }
  // Of register r of a row of the window around pixel x of a phase, the offsets that lie inside the image.
  uint32_t inside(const Phase& phase, int64_t x, int64_t r) const {
    const int64_t first = reach - x - r * kRows;  // the lane of pixel 0
    return bits_below(std::min(phase.count + first, size - r * kRows)) & ~bits_below(first);
  }
  // How many heads are packed together.
  int64_t heads_together(int64_t heads) const {
    const int64_t tasks = kTasksOfThread * torch::stable::get_num_threads();
    return std::clamp<int64_t>(parts_of(tasks, height), 1, heads);
  }
};

// A map (N, heads * C, H, W). A head is numbered over all images.
struct HeadMaps {
  const char* data;
  ScalarType dtype;
  int64_t heads, channels, itemsize, strides[4];

  HeadMaps(const Tensor& maps, int64_t heads_)
      : data(static_cast<const char*>(maps.const_data_ptr())),
        dtype(maps.scalar_type()),
        heads(heads_),
        channels(maps.size(1) / heads_),
        itemsize(maps.element_size()) {
    for (int i = 0; i < 4; ++i) strides[i] = maps.stride(i);
  }
  // The pixels x, x + dilation ... of row y; x may lie outside.
  StridedMatrix row(int64_t head, int64_t y, int64_t x, int64_t dilation) const {
    const int64_t at =
        head / heads * strides[0] + head % heads * channels * strides[1] + y * strides[2] + x * strides[3];
    return {data + at * itemsize, dtype, channels, strides[1], strides[3] * dilation};
  }
};

// ---- Packing

// Rows as B panels of 16 pixels: [row][unit][step of 32 channels][piece][tile].
template <int kPieces>
class PixelPanels {
 public:
  PixelPanels(const Window& window, int64_t channels, int64_t rows)
      : window_(window), steps_(parts_of(channels, kStep)), data_(rows * row_size()) {}

  int64_t steps() const { return steps_; }
  Piece at(int64_t row, int64_t unit) const { return data_.data() + row * row_size() + unit * unit_size(); }

  void pack(const HeadMaps& maps, int64_t head, int64_t y, int64_t row, Outside& outside) {
    Extent extent;
    for (const Phase& phase : window_.phases) {
      const StridedMatrix matrix = maps.row(head, y, phase.first, window_.dilation);
      for (int64_t unit = phase.unit; unit < phase.end; ++unit) {
        const int64_t first = (unit - phase.unit) * kRows - window_.reach;
        const uint32_t inside = bits_below(phase.count - first) & ~bits_below(-first);
        uint16_t* to = data_.data() + row * row_size() + unit * unit_size();
        if (inside == 0) {
          std::fill_n(to, unit_size(), uint16_t{0});
        } else {
          pack_panel<kPieces, true>(matrix, first, kRows, steps_, to, extent, 1.f, inside);
        }
      }
    }
    outside.note(extent);
  }

 private:
  int64_t unit_size() const { return steps_ * kPieces * kTile; }
  int64_t row_size() const { return window_.units * unit_size(); }

  const Window& window_;
  const int64_t steps_;
  Workspace<uint16_t> data_;
};

// Whether a packed tile has a number that is not finite.
inline bool has_infinite(const uint16_t* tile) {
  constexpr uint16_t kExponent = 0x7f80;
  Halves found{};
  for (int i = 0; i < kRows; ++i) {
    Halves row;
    std::memcpy(&row, tile + i * kStep, sizeof row);
    found |= (Halves)((row & kExponent) == kExponent);
  }
  uint16_t any = 0;
  for (int i = 0; i < kStep; ++i) any |= found[i];
  return any != 0;
}

// Rows as B panels of 16 channels: [row][tile of channels][piece][unit][pixel / 2][channel][pixel % 2]; a
// tile begins at any unit. The tiles of channels are an even number.
template <int kPieces>
class ChannelPanels {
 public:
  ChannelPanels(const Window& window, int64_t channels, int64_t rows)
      : window_(window),
        channels_(channels),
        tiles_(parts_of(channels, kStep) * 2),
        data_(rows * row_size()) {}

  int64_t tiles() const { return tiles_; }
  int64_t piece() const { return window_.units * kUnit; }  // from one piece to the next
  Piece at(int64_t row, int64_t tile, int64_t unit) const {
    return data_.data() + row * row_size() + tile * kPieces * piece() + unit * kUnit;
  }

  void pack(const HeadMaps& maps, int64_t head, int64_t y, int64_t row, Outside& outside) {
    Extent extent;
    for (const Phase& phase : window_.phases) {
      for (int64_t unit = phase.unit; unit < phase.end; unit += 2) {
        const int64_t first = (unit - phase.unit) * kRows - window_.reach;
        const int64_t inside = std::clamp<int64_t>(phase.count - first, 0, kStep);
        bool keep[kStep];
        for (int i = 0; i < kStep; ++i) keep[i] = first + i >= 0;
        const StridedMatrix pixels =
            maps.row(head, y, phase.first + first * window_.dilation, window_.dilation);
        const StridedMatrix matrix{pixels.data, pixels.dtype, inside, pixels.pixel_stride,
                                   pixels.channel_stride};
        for (int64_t tile = 0; tile < tiles_; ++tile) {
          alignas(64) uint16_t packed[kPieces * kTile];
          const int64_t count = std::clamp<int64_t>(channels_ - tile * kRows, 0, kRows);
          pack_panel<kPieces, true>(matrix, tile * kRows, count, 1, packed, extent, 1.f, 0xffffu, keep);
          outside.note(kPieces == 1 && has_infinite(packed));
          uint16_t* to = data_.data() + row * row_size() + tile * kPieces * piece() + unit * kUnit;
          for (int i = 0; i < kPieces; ++i) std::copy_n(packed + i * kTile, kTile, to + i * piece());
        }
      }
    }
    outside.note(extent);
  }

 private:
  int64_t row_size() const { return tiles_ * kPieces * piece(); }

  const Window& window_;
  const int64_t channels_, tiles_;
  Workspace<uint16_t> data_;
};

// ---- Products

// Calls f(i, j) for the products of piece i of A and j of B that are kept, the smallest first.
template <int kA, int kB, class F>
[[gnu::always_inline]] inline void each_product(const F& f) {
  constexpr int kKept = std::max(kA, kB);
#pragma GCC unroll 3
  for (int sum = kKept - 1; sum >= 0; --sum) {
#pragma GCC unroll 3
    for (int i = 0; i < kA; ++i)
      if (sum - i >= 0 && sum - i < kB) f(i, sum - i);
  }
}

// Sums 0 to 3 = the products of A panel a with four B panels of so many steps.
template <int kA, int kB>
[[gnu::always_inline]] inline void multiply_four(Piece a, Piece b0, Piece b1, Piece b2, Piece b3,
                                                 int64_t steps) {
  zero_sums();
  for (int64_t s = 0; s < steps; ++s) {
    each_product<kA, kB>([&](int i, int j) {
      const int64_t at = (s * kB + j) * kTile;
      tile_load<4>(a + (s * kA + i) * kTile);
      tile_load<5>(b0 + at);
      tile_dot<0, 4, 5>();
      tile_load<6>(b1 + at);
      tile_dot<1, 4, 6>();
      tile_load<7>(b2 + at);
      tile_dot<2, 4, 7>();
      tile_load<5>(b3 + at);
      tile_dot<3, 4, 5>();
    });
  }
}

// ---- Registers

inline Reg only(Reg x, uint32_t lanes) {
#if defined(__AVX512F__)
  return (Reg)_mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), (__m512)x);
#else
  for (int i = 0; i < kRows; ++i)
    if (!(lanes >> i & 1)) x[i] = 0;
  return x;
#endif
}
// The greater of the lanes whose bit is set, elsewhere `best`. A NaN is greater than nothing.
inline Reg greater_where(uint32_t lanes, Reg best, Reg x) {
#if defined(__AVX512F__)
  return (Reg)_mm512_mask_max_ps((__m512)best, static_cast<__mmask16>(lanes), (__m512)x, (__m512)best);
#else
  for (int i = 0; i < kRows; ++i)
    if (lanes >> i & 1) best[i] = x[i] > best[i] ? x[i] : best[i];
  return best;
#endif
}

// kPieces pieces of 16 numbers, `distance` apart, where the bits are set.
template <int kPieces>
[[gnu::always_inline]] inline void store_pieces(Reg x, uint32_t lanes, uint16_t* to, int64_t distance) {
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i, to += distance) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m256i piece = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(lanes), piece);
    if (i + 1 < kPieces) x -= (Reg)((Bits)_mm512_maskz_cvtepu16_epi32(0xffff, piece) << 16);
#else
    const Bits piece = rounded(x);
    for (int lane = 0; lane < kRows; ++lane)
      if (lanes >> lane & 1) to[lane] = static_cast<uint16_t>(piece[lane] >> 16);
    x -= (Reg)piece;
#endif
  }
}

// One number for each of 16 registers: what f makes of its lanes, two by two.
template <class F>
inline Reg across(const Reg (&rows)[kRows], const F& f) {
  Reg lanes[kRows];
  transpose_lanes<Lanes>(reinterpret_cast<const float*>(rows), kRows, reinterpret_cast<float*>(lanes), kRows);
  for (int half = kRows / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = f(lanes[i], lanes[i + half]);
  return lanes[0];
}

// ---- Bands and sums

// One thread's: the 16 pixels from `first` on of a phase of row y, whose neighbours' rows are packed from
// `packed_row` on. kMaps: pieces of maps, kWeights: of weights.
template <int kMaps, int kWeights, class S>
class Band {
 public:
  explicit Band(const Window& window)
      : window_(window),
        pitch_(window.pitch()),
        registers_(static_cast<int>(window.registers)),
        band_size_(window.size * kRows * pitch_ + registers_ * kRows),
        weights_size_(window.size * row_size()) {}

 protected:
  // Calls f(phase) for every 16 pixels of a row.
  template <class F>
  void each_block(int64_t y, int64_t packed_row, const F& f) {
    y_ = y, packed_row_ = packed_row;
    first_row_ = window_.first_row(y), end_row_ = window_.end_row(y);
    for (const Phase& phase : window_.phases) {
      for (int64_t block = 0; block < phase.blocks(); ++block) {
        first_ = block * kRows, unit_ = phase.unit + block;
        count_ = static_cast<int>(std::min<int64_t>(kRows, phase.count - first_));
        for (int r = 0; r < registers_; ++r)
          for (int p = 0; p < count_; ++p) inside_[r * kRows + p] = window_.inside(phase, first_ + p, r);
        f(phase);
      }
    }
  }

  // The registers of a band (in all, and of row i and pixel p), and the weights that belong to them.
  float* band_at(float* band, int64_t i, int64_t p) const { return band + (i * kRows + p) * pitch_; }
  const float* band_at(const float* band, int64_t i, int64_t p) const {
    return band + (i * kRows + p) * pitch_;
  }
  int64_t band_size() const { return band_size_; }
  int64_t weights_size() const { return weights_size_; }
  uint32_t inside(int r, int p) const { return inside_[r * kRows + p]; }

  // Calls f(row of the window, pixel, register, lanes inside the image) for every register of the bands.
  template <class F>
  [[gnu::always_inline]] void each_register(const F& f) const {
    for (int r = 0; r < registers_; ++r)
      for (int64_t i = first_row_; i < end_row_; ++i)
        for (int p = 0; p < count_; ++p) f(i, p, r, inside(r, p));
  }

  void pack_pixels(const HeadMaps& maps, int64_t head, const Phase& phase, uint16_t* to,
                   Outside& outside) const {
    Extent extent;
    pack_panel<kMaps, false>(maps.row(head, y_, phase.first, window_.dilation), first_, count_,
                             parts_of(maps.channels, kStep), to, extent);
    outside.note(extent);
  }

  // The products of 16 pixels, an A panel, with all pixels that one of them sees.
  void multiply(const uint16_t* pixels, const PixelPanels<kMaps>& others, float* band) const {
    const int64_t bytes = pitch_ * sizeof(float);
    for (int64_t i = first_row_; i < end_row_; i += 2) {
      const int64_t next = std::min(i + 1, end_row_ - 1);
      const int64_t rows[2] = {packed_row_ + window_.row(y_, i), packed_row_ + window_.row(y_, next)};
      for (int64_t tile = 0; tile < window_.tiles; tile += 2) {
        const int64_t at = unit_ + tile;
        multiply_four<kMaps, kMaps>(pixels, others.at(rows[0], at), others.at(rows[0], at + 1),
                                    others.at(rows[1], at), others.at(rows[1], at + 1), others.steps());
        tile_store_rows<0>(band_at(band, i, 0) + tile * kRows, bytes);
        tile_store_rows<1>(band_at(band, i, 0) + (tile + 1) * kRows, bytes);
        tile_store_rows<2>(band_at(band, next, 0) + tile * kRows, bytes);
        tile_store_rows<3>(band_at(band, next, 0) + (tile + 1) * kRows, bytes);
      }
    }
  }

  // The numbers of a register of a band.
  Reg load(const float* band, int64_t i, int p, int r) const {
    return Lanes::load(band_at(band, i, p) + p + r * kRows);
  }
  // Weights of a register; zero outside the image.
  [[gnu::always_inline]] void store(Reg weights, uint16_t* to, int64_t i, int p, int r) const {
    store_pieces<kWeights>(weights, bits_below(window_.size - r * kRows),
                           to + i * row_size() + p * pitch_ + p + r * kRows, kRows * pitch_);
  }

  // Writes the sums of a map by weights, times a factor for each pixel, to `out` (N,heads * C,H,W).
  // more(tile) adds to sums 0 and 1, two tiles of 16 channels.
  template <class More>
  void add_up(const uint16_t* weights, const ChannelPanels<kMaps>& maps, Reg factor, Tensor& out,
              int64_t head, int64_t channels, const Phase& phase, const More& more) const {
    const int64_t height = window_.height, width = out.size(3);
    S* to = out.mutable_data_ptr<S>() + (head * channels * height + y_) * width + phase.first +
            first_ * window_.dilation;
    for (int64_t tile = 0; tile < maps.tiles(); tile += 2) {
      alignas(64) float sums[4 * kSums];
      zero_sums();
      for (int64_t i = first_row_; i < end_row_; i += 2) {
        for (int64_t step = 0; step < window_.tiles / 2; ++step) {
          add_row<0>(weights, maps, i, tile, step);
          if (i + 1 < end_row_) add_row<2>(weights, maps, i + 1, tile, step);
        }
      }
      more(tile);
      store_sums(sums);
      for (int half = 0; half < 2; ++half) {
        const int64_t begin = (tile + half) * kRows, count = std::min<int64_t>(kRows, channels - begin);
        if (count <= 0) break;
        Reg pixels[kRows], lanes[kRows];
        for (int p = 0; p < kRows; ++p)
          pixels[p] = Lanes::load(sums + half * kSums + p * kRows) +
                      Lanes::load(sums + (2 + half) * kSums + p * kRows);
        by_channel(reinterpret_cast<const float*>(pixels), lanes);
        for (int64_t c = 0; c < count; ++c)
          store_pixels(lanes[c] * factor, to + (begin + c) * height * width);
      }
    }
  }

  const Window& window_;
  const int64_t pitch_;
  const int registers_;
  int64_t y_ = 0, first_row_ = 0, end_row_ = 0;  // of the window
  int64_t first_ = 0, unit_ = 0;
  int count_ = 0;  // of the 16 pixels

 private:
  int64_t row_size() const { return kWeights * kRows * pitch_; }  // weights of a row of the window

  // Sums kFirst and kFirst + 1 += the weights of 32 pixels of a row x the pixels' channels.
  template <int kFirst>
  [[gnu::always_inline]] void add_row(const uint16_t* weights, const ChannelPanels<kMaps>& maps, int64_t i,
                                      int64_t tile, int64_t step) const {
    constexpr int kA = 4 + kFirst / 2;
    const int64_t row = packed_row_ + window_.row(y_, i), at = unit_ + 2 * step;
    const uint16_t* from = weights + i * row_size() + step * kStep;
    const Piece one = maps.at(row, tile, at), other = maps.at(row, tile + 1, at);
    each_product<kWeights, kMaps>([&](int w, int m) {
      tile_load_rows<kA>(from + w * kRows * pitch_, pitch_ * sizeof(uint16_t));
      tile_load<6>(one + m * maps.piece());
      tile_dot<kFirst, kA, 6>();
      tile_load<7>(other + m * maps.piece());
      tile_dot<kFirst + 1, kA, 7>();
    });
  }

  void store_pixels(Reg value, S* to) const {
    const uint32_t lanes = bits_below(count_);
    if (window_.dilation == 1) return store_some(to, value, lanes);
    S pixels[kRows];
    store_some(pixels, value, lanes);
    for (int p = 0; p < count_; ++p) to[p * window_.dilation] = pixels[p];
  }

  const int64_t band_size_, weights_size_;
  int64_t packed_row_ = 0;
  std::vector<uint32_t> inside_ = std::vector<uint32_t>(registers_ * kRows);
};

}  // namespace vosops::cpu::amx

#endif
