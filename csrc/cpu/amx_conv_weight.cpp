// The gradient of a convolution's bfloat16 weights by the matrix engine: for every tap a product of two
// matrices, the pixels their inner dimension.
//
// Maps are copied once, channel by channel, as one line of pixels with zeros where a tap would leave the map:
// beside every row as far as the taps reach, and as many rows below every image. So a tap is a shift of the
// whole line, and 32 pixels of 16 input channels are a tile of A that begins at any pixel: rows as far apart
// as the lines, loaded where they lie. Gradients are B panels of 16 output channels.
//
//   x       [input channel][pixel], 2 bytes        gradients  [output tile][step of 32 pixels][tile]
//   sums    [output tile][input channel][tap][16 output channels] of 32 x 32 channels
//
// A task owns the taps of 32 input and 32 output channels: four tiles of sums at a time, over kChunk steps,
// whose two lines of tiles (2 KB a step each) stay in the second level while all taps use them. (Chunks of 16
// steps, for the first level, are a quarter slower: sums pass more often than operands would.) Its sums are
// transposed to rows of weights, the only thing that is written. An odd shift makes every row of A cross a
// cache line: two loads of 16 rows, twice two accesses each, still fit beside four products of 16 cycles.
// Images whose maps are all zero in the first places (a state before the first step) are left out.
#include "cpu/amx_conv.h"

#if defined(VOSOPS_AMX)

namespace vosops::cpu::amx {
namespace {

constexpr int64_t kChunk = 256;  // steps of 32 pixels

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
int64_t padded(int64_t channels) {
  return ceil_div(channels, kGroup) * kGroup;
}

// Where the pixels of a channel's images lie in its line.
struct PixelLine {
  int64_t images, height, width, reach_y, reach_x;

  int64_t row_pitch() const { return width + reach_x; }
  int64_t image_pitch() const { return (height + reach_y) * row_pitch(); }
  int64_t lead() const { return reach_y * row_pitch() + reach_x; }  // zeros before the first pixel
  int64_t steps() const { return ceil_div(images * image_pitch(), kStep); }
  // bfloat16 from one channel to the next: an odd number of cache lines, that they do not compete for sets.
  int64_t pitch() const { return (ceil_div(2 * lead() + steps() * kStep, 2 * kStep) * 2 + 1) * kStep; }
};

// Copies a channel to its line, which begins `lead` zeros before its first pixel; returns how many images at
// the beginning are zero.
int64_t copy_line(const PixelLine& line, const ConvPlaneOf& plane, int64_t channel, int64_t lead,
                  uint16_t* to) {
  std::fill_n(to, line.pitch(), uint16_t{0});
  int64_t silent = line.images;
  for (int64_t n = 0; n < line.images; ++n) {
    const uint16_t* from = plane(n, channel);
    if (from == nullptr) continue;
    silent = std::min(silent, n);
    for (int64_t y = 0; y < line.height; ++y)
      std::copy_n(from + y * line.width, line.width,
                  to + lead + n * line.image_pitch() + y * line.row_pitch());
  }
  return silent;
}

// The lines and panels of some images.
class Packed {
 public:
  Packed(const ConvWeightSizes& sizes, int64_t images, const ConvPlaneOf& input, const ConvPlaneOf& grad)
      : line{images, sizes.height, sizes.width, sizes.kernel_height / 2, sizes.kernel_width / 2},
        lines_(padded(sizes.inputs) * line.pitch()),
        panels_(padded(sizes.outputs) * line.steps() * kStep),
        silent_(padded(sizes.inputs), images) {
    parallel_tasks(padded(sizes.inputs), [&] {
      return [&](int64_t c) {
        uint16_t* to = lines_.data() + c * line.pitch();
        if (c < sizes.inputs) {
          silent_[c] = copy_line(line, input, c, line.lead(), to);
        } else {
          std::fill_n(to, line.pitch(), uint16_t{0});
        }
      };
    });
    parallel_tasks(padded(sizes.outputs) / kRows, [&] {
      return [&, lines = Workspace<uint16_t>(kRows * line.pitch())](int64_t tile) mutable {
        const int64_t first = tile * kRows, count = std::clamp<int64_t>(sizes.outputs - first, 0, kRows);
        for (int64_t m = 0; m < count; ++m)
          copy_line(line, grad, first + m, 0, lines.data() + m * line.pitch());
        std::fill_n(lines.data() + count * line.pitch(), (kRows - count) * line.pitch(), uint16_t{0});
        uint16_t* to = panels_.data() + first * line.steps() * kStep;
        for (int64_t s = 0; s < line.steps(); ++s, to += kTile) {
          Bits rows[kRows];
          for (int64_t m = 0; m < kRows; ++m)
            std::memcpy(&rows[m], lines.data() + m * line.pitch() + s * kStep, sizeof(Bits));
          transpose_pairs(rows);
          std::memcpy(to, rows, sizeof rows);
        }
      };
    });
  }

  // The first step of 32 input channels that is not zero.
  int64_t first_step(int64_t input) const {
    const auto first = silent_.begin() + input;
    return *std::min_element(first, first + kGroup) * line.image_pitch() / kStep;
  }
  const uint16_t* map(int64_t input, int64_t pixel) const {
    return lines_.data() + input * line.pitch() + pixel;
  }
  Piece grad(int64_t output, int64_t step) const {
    return panels_.data() + (output * line.steps() + step * kRows) * kStep;
  }

  const PixelLine line;

 private:
  Workspace<uint16_t> lines_, panels_;
  std::vector<int64_t> silent_;
};

// One task's weights.
class Block {
 public:
  Block(const ConvWeightSizes& sizes, int64_t input, int64_t output, float* sums)
      : sizes_(sizes), taps_(sizes.taps()), input_(input), output_(output), sums_(sums) {}

  static int64_t size(const ConvWeightSizes& sizes) { return kGroup * kGroup * sizes.taps(); }

  void add(const Packed& packed, bool first) const {
    const int64_t steps = packed.line.steps(), first_step = packed.first_step(input_);
    if (first_step >= steps) {
      if (first) std::fill_n(sums_, size(sizes_), 0.f);
      return;
    }
    for (int64_t begin = first_step; begin < steps; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, steps);
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t shift = tap / sizes_.kernel_width * packed.line.row_pitch() + tap % sizes_.kernel_width;
        load(tap, first && begin == first_step);
        multiply(packed, begin, end, shift);
        store(tap);
      }
    }
  }

  void write(BFloat16* weight) const {
    const int64_t length = std::min<int64_t>(kGroup, sizes_.inputs - input_) * taps_;
    const int64_t outputs = std::min<int64_t>(kGroup, sizes_.outputs - output_);
    for (int64_t tile = 0; tile < outputs; tile += kRows) {
      for (int64_t i = 0; i < length; i += kRows) {
        Reg rows[kRows];
        by_channel(sums_ + (tile / kRows * kGroup * taps_ + i) * kRows, rows);
        for (int64_t m = 0; m < std::min<int64_t>(kRows, outputs - tile); ++m)
          store_first(weight + ((output_ + tile + m) * sizes_.inputs + input_) * taps_ + i, rows[m],
                      length - i);
      }
    }
  }

 private:
  // The sums of a tap: of 16 inputs and 16 outputs, rows of inputs.
  float* at(int64_t tap, int64_t input_tile, int64_t output_tile) const {
    return sums_ + ((output_tile * kGroup + input_tile * kRows) * taps_ + tap) * kRows;
  }
  void load(int64_t tap, bool first) const {
    if (first) return zero_sums();
    const int64_t row = taps_ * kRows * static_cast<int64_t>(sizeof(float));
    tile_load_rows<0>(at(tap, 0, 0), row);
    tile_load_rows<1>(at(tap, 0, 1), row);
    tile_load_rows<2>(at(tap, 1, 0), row);
    tile_load_rows<3>(at(tap, 1, 1), row);
  }
  void store(int64_t tap) const {
    const int64_t row = taps_ * kRows * static_cast<int64_t>(sizeof(float));
    tile_store_rows<0>(at(tap, 0, 0), row);
    tile_store_rows<1>(at(tap, 0, 1), row);
    tile_store_rows<2>(at(tap, 1, 0), row);
    tile_store_rows<3>(at(tap, 1, 1), row);
  }
  void multiply(const Packed& packed, int64_t begin, int64_t end, int64_t shift) const {
    const int64_t bytes = packed.line.pitch() * static_cast<int64_t>(sizeof(uint16_t));
    const uint16_t* a0 = packed.map(input_, shift);
    const uint16_t* a1 = packed.map(input_ + kRows, shift);
    const Piece b0 = packed.grad(output_, 0), b1 = packed.grad(output_ + kRows, 0);
    for (int64_t s = begin; s < end; ++s) {
      tile_load<6>(b0 + s * kTile);
      tile_load_rows<4>(a0 + s * kStep, bytes);
      tile_dot<0, 4, 6>();
      tile_load<7>(b1 + s * kTile);
      tile_dot<1, 4, 7>();
      tile_load_rows<5>(a1 + s * kStep, bytes);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    }
  }

  const ConvWeightSizes& sizes_;
  const int64_t taps_, input_, output_;
  float* sums_;
};

}  // namespace

void ConvWeightGradient::add(int64_t images, const ConvPlaneOf& input, const ConvPlaneOf& grad, bool first,
                             BFloat16* weight) {
  const int64_t across = padded(sizes_.outputs) / kGroup, tasks = padded(sizes_.inputs) / kGroup * across;
  const int64_t size = Block::size(sizes_);
  const bool holds = !first || weight == nullptr;
  if (holds && !held_) held_.emplace(tasks * size);
  const Packed packed(sizes_, images, input, grad);
  parallel_tasks(tasks, [&] {
    return [&, region = Region(), scratch = Workspace<float>(holds ? 0 : size)](int64_t task) mutable {
      float* sums = holds ? held_->data() + task * size : scratch.data();
      const Block block(sizes_, task / across * kGroup, task % across * kGroup, sums);
      block.add(packed, first);
      if (weight != nullptr) block.write(weight);
    };
  });
}

}  // namespace vosops::cpu::amx

#endif
