// Convolutions of maps by the matrix engine (amx.h): direct sums, stride 1, zeros around, any small kernel.
//
// A map's pixels are the rows of A tiles, its channels their elements: packed as
//
//   [image][step of 32 channels][piece][pixel of the padded plane][32]
//
// with zeros between and around the rows, so that 16 pixels that follow each other, shifted by any tap, are
// one tile of 1 KB, aligned, without a copy for each tap. Weights are B panels of 16 output channels:
//
//   [output tile][step][tap][piece][tile]
//
// A group is 32 pixels by 32 output channels, four tiles of sums over all steps and taps. What becomes of the
// sums is the caller's: finish() gets them while they are in the first-level cache.
//
// Channels are taken in chunks whose weights for 32 outputs stay in the second-level cache, pixels in blocks
// whose share of a chunk does so too. A chunk is packed when it is needed, maps and weights once a call
// (weights that do not change, once for good). Sums of a chunk but the last wait in a buffer.
//
// Floor: 2 taps C M P / (products of pieces) operations of the engine, P with the zeros beside each row.
// Bytes: maps and weights once, packed maps once a 32 outputs from the second level.
#pragma once

#if defined(VOSOPS_AMX)

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "cpu/amx.h"
#include "cpu/parallel.h"

namespace vosops::cpu::amx {

constexpr int kGroup = 2 * kRows;  // pixels, and output channels, of a group of sums

// The plane of the results, and how far the taps reach beyond it.
struct ConvPlane {
  int64_t height, width, reach_y, reach_x;

  int64_t pitch() const { return width + reach_x; }
  int64_t before() const { return reach_y * pitch() + reach_x; }   // pixel (0,0) of the padded plane
  int64_t span() const { return (height - 1) * pitch() + width; }  // from the first pixel to the last
  int64_t groups() const { return (span() + kGroup - 1) / kGroup; }
  int64_t padded() const { return 2 * before() + groups() * kGroup; }  // pixels that are packed
};

// Channels of some images: entry (n, c, y, x) at data + n * image_stride + c * channel_stride + y *
// row_stride
// + x * column_stride, zeros outside of `rows` rows. Row y of the results is centred on row y + above.
struct ConvMap {
  const void* data;
  ScalarType dtype;
  int64_t channels, image_stride, channel_stride, row_stride, column_stride, rows, above = 0;

  static ConvMap of(const Tensor& x) {
    return {x.const_data_ptr(), x.scalar_type(), x.size(1),   x.stride(0),
            x.stride(1),        x.stride(2),     x.stride(3), x.size(2)};
  }
  int64_t steps() const { return (channels + kStep - 1) / kStep; }
};

// Weights with `height` x `width` taps: of output m, input c and tap t (row by row) at data + m *
// output_stride
// + c * input_stride + t * tap_stride; reversed: tap t is the last but t.
struct ConvWeight {
  const void* data;
  ScalarType dtype;
  int64_t outputs, inputs, output_stride, input_stride, tap_stride, height, width;
  bool reversed = false;
  int64_t gates = 1;  // more: outputs are rows of so many gates, tile t is of gate t % gates

  int64_t taps() const { return height * width; }
  int64_t steps() const { return (inputs + kStep - 1) / kStep; }
  // Tiles of 16 outputs; a whole number of panels.
  int64_t tiles() const {
    const int64_t each = outputs / gates, tiles = (each + kRows - 1) / kRows * gates;
    return (tiles + 1) / 2 * 2;
  }
  // The first output of a tile, and how many there are.
  int64_t first_output(int64_t tile) const { return tile % gates * (outputs / gates) + tile / gates * kRows; }
  int64_t count(int64_t tile) const {
    return std::clamp<int64_t>(outputs / gates - tile / gates * kRows, 0, kRows);
  }
};

// uint16_t of the panels of `steps` steps of all output tiles.
inline int64_t weight_size(const ConvWeight& weight, int64_t steps, int pieces) {
  return weight.tiles() * steps * weight.taps() * pieces * kTile;
}

// Packs steps [first, end) of all output tiles; false where a number is out of range of more than one piece.
bool pack_weights(const ConvWeight& weight, int64_t first, int64_t end, int pieces, uint16_t* to);

// One of the convolutions whose results are added. `packed`: all weights, by pack_weights(), or null.
struct ConvTerm {
  ConvMap map;
  ConvWeight weight;
  const uint16_t* packed = nullptr;
};

// The sums of a group of pixels and a panel of 2 or 4 output tiles: tile (pixels i, outputs j) of 16 x 16 at
// at(i, j), a row for each pixel.
struct ConvSums {
  const float* data;
  const float* at(int i, int j) const { return data + ((j / 2 * 2 + i) * 2 + j % 2) * kSums; }
};

// Computes the sum of `terms` for all images and calls finish(image, first pixel of the span, panel, sums)
// for each group and panel of `panel_tiles` (2 or 4) output tiles, on any thread. False, and nothing
// finished, where a number is out of the range of more than one piece.
using ConvFinish = std::function<void(int64_t image, int64_t first, int64_t panel, const ConvSums& sums)>;
bool convolve(const ConvPlane& plane, int64_t images, const std::vector<ConvTerm>& terms, int pieces,
              int panel_tiles, const ConvFinish& finish);

// ---- What becomes of sums

// The pixels of 16 of the span: parts of rows, without the zeros between them.
class ConvPixels {
 public:
  ConvPixels(const ConvPlane& plane, int64_t first) {
    int64_t row = first / plane.pitch(), x = first % plane.pitch();
    for (int lane = 0; lane < kRows && row < plane.height; ++row, x = 0) {
      const int64_t inside = std::clamp<int64_t>(plane.width - x, 0, kRows - lane);
      if (inside > 0) {
        const uint32_t lanes = ((1u << inside) - 1) << lane;
        parts_[count_++] = {row, x, lane, static_cast<int>(inside), lanes};
      }
      lane += static_cast<int>(std::min<int64_t>(plane.pitch() - x, kRows - lane));
    }
  }
  struct Part {
    int64_t row, x;  // of the first pixel
    int lane, count;
    uint32_t lanes;  // bits
  };
  const Part* begin() const { return parts_; }
  const Part* end() const { return parts_ + count_; }

 private:
  int count_ = 0;
  Part parts_[kRows];
};

// A tile of sums with a register for each output channel, pixels in its lanes.
inline void by_channel(const float* tile, Reg (&channels)[kRows]) {
  transpose_lanes<Lanes>(tile, kRows, reinterpret_cast<float*>(channels), kRows);
}

// ---- The gradient of weights

// Gradients of bfloat16 weights, dense (M,C,height,width) of odd sides: sums over images and pixels. Every
// plane is dense, height x width, or null where it is zero.
struct ConvWeightSizes {
  int64_t height, width;  // of the planes
  int64_t outputs, inputs, kernel_height, kernel_width;

  int64_t taps() const { return kernel_height * kernel_width; }
};
using ConvPlaneOf = std::function<const uint16_t*(int64_t image, int64_t channel)>;

class ConvWeightGradient {
 public:
  explicit ConvWeightGradient(const ConvWeightSizes& sizes) : sizes_(sizes) {}

  // Adds the share of some images: maps input(image, channel), gradients grad(image, output). `first`: there
  // are no sums yet; `weight`: where all sums go after these images, or null if there are more to come.
  void add(int64_t images, const ConvPlaneOf& input, const ConvPlaneOf& grad, bool first, BFloat16* weight);

 private:
  const ConvWeightSizes sizes_;
  std::optional<Workspace<float>> held_;  // the sums between calls
};

}  // namespace vosops::cpu::amx

#endif
