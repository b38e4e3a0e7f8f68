// The gradient of a line convolution's bfloat16 weights by the matrix engine: for every tap a product of two
// matrices, the pixels their inner dimension.
//
// Maps are copied once, channel by channel, as one line of pixels with zeros where a tap would leave the map:
// beside every row for taps along the width, below every image for taps along the height. So a tap is a shift
// of the whole line, and 32 pixels of 16 input channels are a tile of A that begins at any pixel: rows as far
// apart as the lines, loaded where they lie. Gradients are B panels of 16 output channels.
//
//   x       [input channel][pixel], 2 bytes        gradients  [output tile][step of 32 pixels][tile]
//   sums    [output tile][input channel][tap][16 output channels] of 32 x 32 channels
//
// A task owns the taps of 32 input and 32 output channels: four tiles of sums at a time, over all pixels,
// while two lines of tiles (2 KB a step each) are in the first or second level. Its sums are transposed to
// rows of weights, the only thing that is written. An odd shift makes every row of A cross a cache line: two
// loads of 16 rows, twice two accesses each, still fit beside four products of 16 cycles.
#include <cstdint>

#include "cpu/global_conv_amx.h"

#if defined(VOSOPS_AMX)
#include "cpu/amx_conv.h"
#endif

namespace vosops::cpu::global_conv {

#if defined(VOSOPS_AMX)

namespace {

using namespace amx;

Counter by_engine("global_conv.weights");

constexpr int64_t kChannels = 2 * kRows;  // of a task, on either side

// Where pixels lie in a line, and what a tap is.
struct PixelLine {
  int64_t images, height, width, taps;
  bool along_width;

  int64_t reach() const { return taps / 2; }
  int64_t row_pitch() const { return along_width ? width + reach() : width; }
  int64_t image_pitch() const { return (along_width ? height : height + reach()) * row_pitch(); }
  int64_t shift() const { return along_width ? 1 : row_pitch(); }  // of a tap
  int64_t lead() const { return reach() * shift(); }               // zeros before the first pixel
  int64_t steps() const { return ceil_div(images * image_pitch(), kStep); }
  // bfloat16 from one channel to the next: an odd number of cache lines, that they do not compete for sets.
  int64_t pitch() const { return (ceil_div(2 * lead() + steps() * kStep, 2 * kStep) * 2 + 1) * kStep; }
};

// Copies a channel of a dense map to the line, which begins `lead` zeros before its first pixel.
void copy_line(const PixelLine& line, const uint16_t* channel, int64_t image_stride, int64_t lead,
               uint16_t* to) {
  std::fill_n(to, line.pitch(), uint16_t{0});
  for (int64_t n = 0; n < line.images; ++n)
    for (int64_t y = 0; y < line.height; ++y)
      std::copy_n(channel + n * image_stride + y * line.width, line.width,
                  to + lead + n * line.image_pitch() + y * line.row_pitch());
}

class WeightSums {
 public:
  WeightSums(const PixelLine& line, const Tensor& x, const Tensor& grad, Tensor& weight)
      : line_(line),
        inputs_(x.size(1)),
        outputs_(grad.size(1)),
        weight_(weight.mutable_data_ptr<BFloat16>()),
        lines_(padded(inputs_) * line.pitch()),
        panels_(padded(outputs_) * line.steps() * kStep) {
    pack(static_cast<const uint16_t*>(x.const_data_ptr()),
         static_cast<const uint16_t*>(grad.const_data_ptr()));
  }

  void run() {
    const int64_t across = padded(outputs_) / kChannels;
    parallel_tasks(padded(inputs_) / kChannels * across, [&] {
      return [&, region = Region(), sums = Workspace<float>(2 * tile_sums())](int64_t task) mutable {
        const int64_t input = task / across * kChannels, output = task % across * kChannels;
        multiply(input, output, sums.data());
        for (int64_t tile = 0; tile < 2; ++tile)
          write(input, output + tile * kRows, sums.data() + tile * tile_sums());
      };
    });
  }

 private:
  static int64_t padded(int64_t channels) { return ceil_div(channels, kChannels) * kChannels; }
  int64_t tile_sums() const { return kChannels * line_.taps * kRows; }
  Piece panel(int64_t output) const { return panels_.data() + output * line_.steps() * kStep; }

  void pack(const uint16_t* x, const uint16_t* grad) {
    const int64_t plane = line_.height * line_.width;
    parallel_tasks(padded(inputs_), [&] {
      return [&](int64_t c) {
        uint16_t* to = lines_.data() + c * line_.pitch();
        if (c >= inputs_) {
          std::fill_n(to, line_.pitch(), uint16_t{0});
        } else {
          copy_line(line_, x + c * plane, inputs_ * plane, line_.lead(), to);
        }
      };
    });
    parallel_tasks(padded(outputs_) / kRows, [&] {
      return [&, lines = Workspace<uint16_t>(kRows * line_.pitch())](int64_t tile) mutable {
        const int64_t first = tile * kRows, count = std::clamp<int64_t>(outputs_ - first, 0, kRows);
        for (int64_t m = 0; m < count; ++m)
          copy_line(line_, grad + (first + m) * plane, outputs_ * plane, 0, lines.data() + m * line_.pitch());
        Extent extent;
        const Region region;
        const StridedMatrix matrix{lines.data(), ScalarType::BFloat16, line_.steps() * kStep, 1,
                                   line_.pitch()};
        pack_panel<1, true>(matrix, 0, count, line_.steps(), panels_.data() + first * line_.steps() * kStep,
                            extent);
      };
    });
  }

  // The sums of 32 x 32 channels.
  void multiply(int64_t input, int64_t output, float* sums) const {
    const int64_t bytes = line_.pitch() * sizeof(uint16_t), row = line_.taps * kRows * sizeof(float);
    const Piece b0 = panel(output), b1 = panel(output + kRows);
    float* other = sums + tile_sums();
    for (int64_t tap = 0; tap < line_.taps; ++tap) {
      const uint16_t* a0 = lines_.data() + input * line_.pitch() + tap * line_.shift();
      const uint16_t* a1 = a0 + kRows * line_.pitch();
      zero_sums();
      for (int64_t s = 0; s < line_.steps(); ++s) {
        tile_load<6>(b0 + s * kTile);
        tile_load_rows<4>(a0 + s * kStep, bytes);
        tile_dot<0, 4, 6>();
        tile_load<7>(b1 + s * kTile);
        tile_dot<1, 4, 7>();
        tile_load_rows<5>(a1 + s * kStep, bytes);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
      }
      tile_store_rows<0>(sums + tap * kRows, row);
      tile_store_rows<1>(other + tap * kRows, row);
      tile_store_rows<2>(sums + kRows * line_.taps * kRows + tap * kRows, row);
      tile_store_rows<3>(other + kRows * line_.taps * kRows + tap * kRows, row);
    }
  }

  // Writes the weights of 16 outputs and 32 inputs.
  void write(int64_t input, int64_t output, const float* sums) const {
    const int64_t length = std::min(kChannels, inputs_ - input) * line_.taps;
    const int64_t count = std::min<int64_t>(kRows, outputs_ - output);
    for (int64_t i = 0; i < length; i += kRows) {
      Reg rows[kRows];
      by_channel(sums + i * kRows, rows);
      const uint32_t lanes = length - i >= kRows ? 0xffffu : (1u << (length - i)) - 1;
      for (int64_t m = 0; m < count; ++m)
        store_some(weight_ + ((output + m) * inputs_ + input) * line_.taps + i, rows[m], lanes);
    }
  }

  const PixelLine line_;
  const int64_t inputs_, outputs_;
  BFloat16* const weight_;
  Workspace<uint16_t> lines_, panels_;
};

}  // namespace

bool amx_weights(const Tensor& x, const Tensor& grad, Tensor& weight) {
  if (x.scalar_type() != ScalarType::BFloat16 || std::min(x.size(1), grad.size(1)) < kLeastChannels ||
      !ready())
    return false;
  const bool along_width = weight.size(2) == 1;
  const PixelLine line{x.size(0), x.size(2), x.size(3), weight.size(along_width ? 3 : 2), along_width};
  WeightSums(line, torch::stable::contiguous(x), torch::stable::contiguous(grad), weight).run();
  ++by_engine;
  return true;
}

#else

bool amx_weights(const Tensor&, const Tensor&, Tensor&) {
  return false;
}

#endif

}  // namespace vosops::cpu::global_conv
