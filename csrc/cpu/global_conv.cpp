// The line convolutions of a global convolution on the CPU.
//
// Winograd arithmetic in float32 (winograd_line.h), one line convolution after the other. Tiles of kOut
// pixels along the lines are taken in blocks, channels in blocks of kBlockChannels:
//
//   values   [point][tile][channel]         the block's input, transformed; lanes are channels
//   weights  [point][channel][kLanePanel]   the weights of a panel of output channels, transformed
//   products [panel][point][tile][lane]     sums over the channel blocks so far
//
// A task owns a panel of output channels: per channel block it transforms its weights (they are read once, so
// that nothing is kept from call to call), then multiplies them point by point with all tiles in register
// tiles of kKeyPanel tiles by kLanePanel channels, and after the last block transforms its products to
// pixels. Weights of one point (16 KB) stay in the first-level cache, values and products (2 + 4 MB) stream
// from the third-level cache at some bytes per cycle. The multiplications are 2 / 7 of the plain sum's for
// F(6, 7), and take 85 % of the time.
//
// Maps are read and written channels last; others are transposed first and at the end. What is not float32,
// and kernels or maps that Winograd does not help, go to PyTorch's convolution.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "common/checks.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"
#include "cpu/winograd_line.h"

namespace vosops::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::stable::detail::from;
using torch::stable::detail::to;
using MaybeTensor = std::optional<Tensor>;

// Calls `name`.`overload` of PyTorch, which returns one tensor.
template <class... Args>
Tensor call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor add(const Tensor& a, const Tensor& b) {
  return torch::stable::subtract(a, b, -1.0);  // the stable interface has no addition
}

// A "same" convolution with stride 1 of any number of channels.
Tensor line_conv(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const std::array<int64_t, 2> ones{1, 1}, zeros{0, 0}, padding{weight.size(2) / 2, weight.size(3) / 2};
  const IntHeaderOnlyArrayRef stride(ones.data(), 2), pad(padding.data(), 2), none(zeros.data(), 2);
  if (x.size(1) > 0)
    return call_aten("aten::convolution", "", x, weight, bias, stride, pad, stride, false, none, int64_t{1});
  const std::array<int64_t, 4> sizes{x.size(0), weight.size(0), x.size(2), x.size(3)};
  const Tensor zero = torch::stable::new_zeros(x, IntHeaderOnlyArrayRef(sizes.data(), 4));
  if (!bias.has_value()) return zero;
  const std::array<int64_t, 3> shape{bias->size(0), 1, 1};
  return add(zero, torch::stable::reshape(*bias, IntHeaderOnlyArrayRef(shape.data(), 3)));
}

using V = Vec<float, kRegisterBytes>;
using Element = FloatElement<V>;
constexpr int kLanes = V::kLanes, kPanel = kLanePanel<V>;
constexpr int64_t kBlockChannels = 128;  // summed in registers at a time
constexpr int64_t kRowStride =
    kBlockChannels + 16;  // of values, so that tiles fall into different cache sets
constexpr int64_t kBlockTiles = 24 * kKeyPanel;
constexpr int64_t kBlockPixels = 128;  // transposed at a time

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// to[c][r] = from[r][c] of a matrix with `rows` rows; rows of `to` are padded with zeros to `padded`.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
               int64_t to_stride, int64_t padded) {
  const int64_t full_rows = rows / kLanes * kLanes, full_columns = columns / kLanes * kLanes;
  for (int64_t r = 0; r < full_rows; r += kLanes)
    for (int64_t c = 0; c < full_columns; c += kLanes)
      transpose_lanes<V>(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = c < full_columns ? full_rows : 0; r < rows; ++r)
      to[c * to_stride + r] = from[r * from_stride + c];
    std::fill(to + c * to_stride + rows, to + c * to_stride + padded, 0.f);
  }
}

// Loops that become vector code.
template <class S>
void widen_row(const S* __restrict from, int64_t count, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}
template <class S>
void narrow_row(const float* __restrict from, int64_t count, S* __restrict to) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, 4);
      const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = 0x7fc0;
      to[i].x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(from[i]);
  }
}

// A map of float32, channels last: pixel (n, h, w) at data + ((n * height + h) * width + w) * stride.
template <class T>
struct PixelMap {
  T* data;
  int64_t stride;
};

// One "same" line convolution of a map whose channels are a multiple of kLanes, to the first channels of
// `out`.
template <class S>
struct Line {
  PixelMap<const float> x;
  int64_t batch, height, width, channels;
  bool along_width;
  const S* weight;  // (outputs, inputs, taps)
  int64_t outputs, inputs, output_stride, input_stride, tap_stride;
  PixelMap<float> out;
  const float* bias;  // of the outputs, or null
  bool add;           // to what is in `out`

  int64_t length() const { return along_width ? width : height; }
  int64_t lines() const { return batch * (along_width ? height : width); }
  int64_t step() const { return along_width ? 1 : width; }  // pixels from one position of a line to the next
  int64_t first_pixel(int64_t line) const {
    return along_width ? line * width : line / width * height * width + line % width;
  }
};

template <class W, class S>
class WinogradLine {
 public:
  explicit WinogradLine(const Line<S>& line)
      : line_(line),
        tiles_per_line_(ceil_div(line.length(), W::kOut)),
        tiles_(line.lines() * tiles_per_line_),
        block_tiles_(ceil_div(ceil_div(tiles_, ceil_div(tiles_, kBlockTiles)), kKeyPanel) * kKeyPanel),
        panels_(ceil_div(line.outputs, kPanel)),
        values_(W::kPoints * block_tiles_ * kRowStride),
        products_(panels_ * panel_products()) {}

  void run() {
    const int64_t blocks = ceil_div(line_.inputs, kBlockChannels);
    const int64_t block = ceil_div(ceil_div(line_.inputs, blocks), kLanes) * kLanes;
    for (int64_t tile = 0; tile < tiles_; tile += block_tiles_) {
      for (int64_t channel = 0; channel < line_.inputs; channel += block) {
        transform_input(tile, channel, std::min(block, line_.channels - channel));
        multiply_panels(tile, channel, std::min(block, line_.inputs - channel));
      }
    }
  }

 private:
  int64_t panel_products() const { return W::kPoints * block_tiles_ * kPanel; }

  // The values of all tiles of a block in `channels` channels, zeros around the map and after the last tile.
  void transform_input(int64_t first_tile, int64_t channel, int64_t channels) {
    parallel_tasks(block_tiles_ / kKeyPanel, [&] {
      return [&](int64_t task) {
        alignas(64) static constexpr float kZeros[kBlockChannels] = {};
        const int64_t begin = task * kKeyPanel;
        for (int64_t t = begin; t < begin + kKeyPanel; ++t) {
          const int64_t tile = first_tile + t;
          const int64_t line = tile / tiles_per_line_,
                        first = tile % tiles_per_line_ * W::kOut - W::kTaps / 2;
          const int64_t base = tile < tiles_ ? line_.first_pixel(line) : 0;
          const float* sources[W::kPoints];
          for (int j = 0; j < W::kPoints; ++j) {
            const int64_t at = first + j;
            const bool inside = tile < tiles_ && at >= 0 && at < line_.length();
            sources[j] =
                inside ? line_.x.data + (base + at * line_.step()) * line_.x.stride + channel : kZeros;
          }
          float* to = values_.data() + t * kRowStride;
          for (int64_t c = 0; c < channels; c += kLanes) {
            typename V::Reg inputs[W::kPoints], values[W::kPoints];
#pragma GCC unroll 16
            for (int j = 0; j < W::kPoints; ++j) inputs[j] = V::load(sources[j] + c);
            W::template transform_input<V>(inputs, values);
#pragma GCC unroll 16
            for (int p = 0; p < W::kPoints; ++p) V::store(to + p * block_tiles_ * kRowStride + c, values[p]);
          }
        }
      };
    });
  }

  void multiply_panels(int64_t first_tile, int64_t channel, int64_t channels) {
    parallel_tasks(panels_, [&] {
      return [&, weights = Workspace<float>(W::kPoints * kBlockChannels * kPanel),
              scratch = Workspace<float>(kLanes * kLanes * W::kTaps)](int64_t panel) mutable {
        for (int64_t lane = 0; lane < kPanel; lane += kLanes)
          transform_weights(panel * kPanel + lane, channel, channels, scratch.data(), weights.data() + lane);
        float* products = products_.data() + panel * panel_products();
        for (int p = 0; p < W::kPoints; ++p) {
          const float* panel_weights = weights.data() + p * kBlockChannels * kPanel;
          for (int64_t t = 0; t < block_tiles_; t += kKeyPanel) {
            const int64_t at = p * block_tiles_ + t;
            multiply_tile(panel_weights, values_.data() + at * kRowStride, channels, channel > 0,
                          products + at * kPanel);
          }
        }
        if (channel + channels == line_.inputs) transform_output(first_tile, panel, products);
      };
    });
  }

  // The transformed weights of kLanes output channels from `output` on, zero after the last one.
  void transform_weights(int64_t output, int64_t channel, int64_t channels, float* scratch, float* to) {
    const int64_t outputs = std::clamp<int64_t>(line_.outputs - output, 0, kLanes);
    const bool packed = outputs == kLanes && line_.input_stride == W::kTaps && line_.tap_stride == 1;
    const S* from = line_.weight + output * line_.output_stride + channel * line_.input_stride;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, channels - c);
      const S* source = from + c * line_.input_stride;
      if (packed && count == kLanes) {
        transpose_weights(source, scratch);
      } else {
        std::fill_n(scratch, kLanes * kLanes * W::kTaps, 0.f);
        for (int64_t i = 0; i < outputs; ++i)
          for (int64_t e = 0; e < count; ++e)
            for (int64_t tap = 0; tap < W::kTaps; ++tap)
              scratch[(e * W::kTaps + tap) * kLanes + i] =
                  widen(source[i * line_.output_stride + e * line_.input_stride + tap * line_.tap_stride]);
      }
      for (int64_t e = 0; e < count; ++e) {
        typename V::Reg taps[W::kTaps], values[W::kPoints];
#pragma GCC unroll 16
        for (int tap = 0; tap < W::kTaps; ++tap) taps[tap] = V::load(scratch + (e * W::kTaps + tap) * kLanes);
        W::template transform_weight<V>(taps, values);
#pragma GCC unroll 16
        for (int p = 0; p < W::kPoints; ++p) V::store(to + (p * kBlockChannels + c + e) * kPanel, values[p]);
      }
    }
  }

  // scratch (kLanes * taps,kLanes) from the adjacent weights of kLanes input channels, output by output.
  void transpose_weights(const S* source, float* scratch) {
    constexpr int64_t kRow = kLanes * W::kTaps;
    const float* rows;
    int64_t stride = line_.output_stride;
    float wide[kLanes * kRow];
    if constexpr (std::is_same_v<S, float>) {
      rows = source;
    } else {
      for (int64_t i = 0; i < kLanes; ++i) widen_row(source + i * stride, kRow, wide + i * kRow);
      rows = wide;
      stride = kRow;
    }
    for (int64_t i = 0; i < W::kTaps; ++i)
      transpose_lanes<V>(rows + i * kLanes, stride, scratch + i * kLanes * kLanes, kLanes);
  }

  // products (kKeyPanel,kPanel) = or += values (kKeyPanel,channels) times weights (channels,kPanel). Every
  // block's sum begins at zero: one long sum over all channels would lose several times as much.
  static void multiply_tile(const float* weights, const float* values, int64_t channels, bool add,
                            float* products) {
    std::array<const float*, kKeyPanel> rows;
    for (int j = 0; j < kKeyPanel; ++j) rows[j] = values + j * kRowStride;
    multiply_rows<Element>(weights, rows, channels, [&](const TileSums<Element>& sums) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeyPanel; ++j) {
#pragma GCC unroll 16
        for (int r = 0; r < kTileRegisters; ++r) {
          float* to = products + j * kPanel + r * kLanes;
          V::store(to, add ? V::load(to) + sums[j][r] : sums[j][r]);
        }
      }
    });
  }

  // Writes, or adds, the pixels of a block's tiles in a panel of output channels.
  void transform_output(int64_t first_tile, int64_t panel, const float* products) {
    const int64_t end = std::min(block_tiles_, tiles_ - first_tile);
    for (int64_t t = 0; t < end; ++t) {
      const int64_t tile = first_tile + t, position = tile % tiles_per_line_ * W::kOut;
      const int64_t pixel = line_.first_pixel(tile / tiles_per_line_) + position * line_.step();
      const int64_t count = std::min<int64_t>(W::kOut, line_.length() - position);
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const int64_t output = panel * kPanel + lane;
        const int64_t lanes = std::min<int64_t>(kLanes, line_.outputs - output);
        if (lanes <= 0) break;
        typename V::Reg points[W::kPoints], outputs[W::kOut];
#pragma GCC unroll 16
        for (int p = 0; p < W::kPoints; ++p)
          points[p] = V::load(products + (p * block_tiles_ + t) * kPanel + lane);
        W::template transform_output<V>(points, outputs);
        for (int64_t i = 0; i < count; ++i)
          store(line_.out.data + (pixel + i * line_.step()) * line_.out.stride + output, outputs[i], output,
                lanes);
      }
    }
  }

  // Finishes `lanes` output channels of a pixel from `output` on.
  void store(float* to, typename V::Reg value, int64_t output, int64_t lanes) {
    if (lanes == kLanes) {
      if (line_.bias != nullptr) value += V::load(line_.bias + output);
      if (line_.add) value += V::load(to);
      V::store(to, value);
      return;
    }
    for (int64_t i = 0; i < lanes; ++i) {
      const float biased = line_.bias == nullptr ? value[i] : value[i] + line_.bias[output + i];
      to[i] = line_.add ? to[i] + biased : biased;
    }
  }

  const Line<S> line_;
  const int64_t tiles_per_line_, tiles_, block_tiles_, panels_;
  Workspace<float> values_, products_;
};

// Calls f with every Winograd<kOut, kTaps> that is compiled for a number of taps.
template <class F>
void each_winograd(int64_t taps, const F& f) {
  if (taps == 3) f(Winograd<6, 3>{});
  if (taps == 5) f(Winograd<6, 5>{});
  if (taps == 7) f(Winograd<6, 7>{}), f(Winograd<5, 7>{}), f(Winograd<4, 7>{});
  if (taps == 9) f(Winograd<4, 9>{});
}

constexpr int64_t kLeastChannels = 16;     // fewer than these do not fill the registers
constexpr double kWorthwhileShare = 0.75;  // of the plain sum's multiplications that Winograd may need

// The products per line of the cheapest Winograd algorithm.
int64_t fewest_products(int64_t taps, int64_t length) {
  int64_t fewest = taps * length;
  each_winograd(taps, [&]<class W>(W) { fewest = std::min(fewest, ceil_div(length, W::kOut) * W::kPoints); });
  return fewest;
}

// Whether a line convolution is to be computed in Winograd arithmetic; one without channels is nothing to
// compute.
bool winograd_helps(const Tensor& x, const Tensor& weight) {
  if (weight.size(0) == 0 || weight.size(1) == 0) return true;
  const bool along_width = weight.size(2) == 1;
  const int64_t taps = weight.size(along_width ? 3 : 2), length = x.size(along_width ? 3 : 2);
  const auto plain = static_cast<double>(taps * length);
  return std::min(weight.size(0), weight.size(1)) >= kLeastChannels &&
         static_cast<double>(fewest_products(taps, length)) <= kWorthwhileShare * plain;
}

bool takes_winograd(const std::string& precision, const Tensor& x, const Tensor& first,
                    const Tensor& second) {
  return precision == "winograd" && x.scalar_type() != ScalarType::Double && winograd_helps(x, first) &&
         winograd_helps(x, second) && std::max(first.numel(), second.numel()) > 0;
}

template <class S>
void winograd_line(const Line<S>& line, int64_t taps) {
  const int64_t fewest = fewest_products(taps, line.length());
  bool done = false;
  each_winograd(taps, [&]<class W>(W) {
    if (done || ceil_div(line.length(), W::kOut) * W::kPoints != fewest) return;
    WinogradLine<W, S>(line).run();
    done = true;
  });
}

// Calls f with a value of a dtype that Winograd arithmetic takes; all of it is float32.
template <class F>
void dispatch_low(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) return f(BFloat16{});
  if (dtype == ScalarType::Half) return f(Half{});
  f(float{});
}

// Maps of any stride with their channels last, in float32, and padded with zeros to whole registers.
class ChannelsLastMap {
 public:
  explicit ChannelsLastMap(const Tensor& x) {
    const int64_t channels = x.size(1), width = x.size(3), pixels = x.size(2) * width;
    const bool whole_rows = x.stride(2) == width * x.stride(3);
    const bool last = x.stride(1) == 1 && whole_rows, planes = x.stride(3) == 1 && whole_rows;
    const bool whole_batch = x.stride(0) == pixels * x.stride(3) || x.size(0) == 1;
    if (last && whole_batch && channels % kLanes == 0 && x.scalar_type() == ScalarType::Float) {
      map_ = {x.const_data_ptr<float>(), x.stride(3)};
      return;
    }
    const Tensor source = last || planes ? x : torch::stable::contiguous(x);
    padded_ = ceil_div(channels, kLanes) * kLanes;
    copy_.emplace(x.size(0) * pixels * padded_);
    dispatch_low(x.scalar_type(), [&]<class S>(S) { last ? copy_rows<S>(source) : copy_planes<S>(source); });
    map_ = {copy_->data(), padded_};
  }
  PixelMap<const float> map() const { return map_; }

 private:
  // Pixel by pixel.
  template <class S>
  void copy_rows(const Tensor& x) {
    const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
    parallel_tasks(x.size(0) * pixels, [&] {
      return [&](int64_t pixel) {
        const S* from = x.const_data_ptr<S>() + pixel / pixels * x.stride(0) + pixel % pixels * x.stride(3);
        float* to = copy_->data() + pixel * padded_;
        widen_row(from, channels, to);
        std::fill(to + channels, to + padded_, 0.f);
      };
    });
  }

  // Blocks of channels and pixels are transposed.
  template <class S>
  void copy_planes(const Tensor& x) {
    const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
    const int64_t blocks = ceil_div(channels, kBlockChannels);
    parallel_tasks(x.size(0) * blocks, [&] {
      return [&, wide = Workspace<float>(kBlockChannels * kBlockPixels)](int64_t task) mutable {
        const int64_t n = task / blocks, begin = task % blocks * kBlockChannels;
        const int64_t count = std::min(kBlockChannels, channels - begin);
        const int64_t padded = std::min(kBlockChannels, padded_ - begin);
        const S* from = x.const_data_ptr<S>() + n * x.stride(0) + begin * x.stride(1);
        float* to = copy_->data() + n * pixels * padded_ + begin;
        for (int64_t p = 0; p < pixels; p += kBlockPixels) {
          const int64_t width = std::min(kBlockPixels, pixels - p);
          if constexpr (std::is_same_v<S, float>) {
            transpose(from + p, x.stride(1), count, width, to + p * padded_, padded_, padded);
          } else {
            for (int64_t c = 0; c < count; ++c)
              widen_row(from + c * x.stride(1) + p, width, wide.data() + c * kBlockPixels);
            transpose(wide.data(), kBlockPixels, count, width, to + p * padded_, padded_, padded);
          }
        }
      };
    });
  }

  int64_t padded_ = 0;
  std::optional<Workspace<float>> copy_;
  PixelMap<const float> map_;
};

// The float32 maps that line convolutions write, channels last; finish() brings them to the tensor.
class Output {
 public:
  explicit Output(Tensor& out)
      : out_(out),
        channels_(out.size(1)),
        pixels_(out.size(2) * out.size(3)),
        last_(out.stride(1) == 1 && (pixels_ == 1 || out.stride(3) == channels_)),
        direct_(last_ && out.scalar_type() == ScalarType::Float) {
    if (!direct_) copy_.emplace(out.numel());
  }
  PixelMap<float> from_channel(int64_t channel) {
    return {(direct_ ? out_.mutable_data_ptr<float>() : copy_->data()) + channel, channels_};
  }
  void finish() {
    if (direct_) return;
    dispatch_low(out_.scalar_type(), [&]<class S>(S) { finish_as<S>(); });
  }

 private:
  template <class S>
  void finish_as() {
    S* out = out_.mutable_data_ptr<S>();
    const int64_t blocks = ceil_div(pixels_, kBlockPixels);
    parallel_tasks(out_.size(0) * blocks, [&] {
      return [&, wide = Workspace<float>(kBlockPixels * channels_)](int64_t task) mutable {
        const int64_t begin = task % blocks * kBlockPixels, plane = task / blocks * pixels_ * channels_;
        const int64_t count = std::min(kBlockPixels, pixels_ - begin);
        const float* from = copy_->data() + plane + begin * channels_;
        if (last_) {
          narrow_row(from, count * channels_, out + plane + begin * channels_);
        } else if constexpr (std::is_same_v<S, float>) {
          transpose(from, channels_, count, channels_, out + plane + begin, pixels_, count);
        } else {
          transpose(from, channels_, count, channels_, wide.data(), kBlockPixels, count);
          for (int64_t c = 0; c < channels_; ++c)
            narrow_row(wide.data() + c * kBlockPixels, count, out + plane + c * pixels_ + begin);
        }
      };
    });
  }

  Tensor& out_;
  const int64_t channels_, pixels_;
  const bool last_, direct_;
  std::optional<Workspace<float>> copy_;
};

// One line convolution in Winograd arithmetic, to the channels of `out` from `channel` on.
void winograd_conv(const Tensor& x, const PixelMap<const float>& map, const Tensor& weight,
                   const MaybeTensor& bias, bool add, PixelMap<float> out) {
  const bool along_width = weight.size(2) == 1;
  const int tap_dim = along_width ? 3 : 2;
  std::optional<Workspace<float>> biases;
  if (bias.has_value()) biases.emplace(weight.size(0));
  dispatch_low(x.scalar_type(), [&]<class S>(S) {
    for (int64_t i = 0; bias.has_value() && i < weight.size(0); ++i)
      (*biases)[i] = widen(bias->const_data_ptr<S>()[i * bias->stride(0)]);
    const Line<S> line{map,
                       x.size(0),
                       x.size(2),
                       x.size(3),
                       ceil_div(x.size(1), kLanes) * kLanes,
                       along_width,
                       weight.const_data_ptr<S>(),
                       weight.size(0),
                       weight.size(1),
                       weight.stride(0),
                       weight.stride(1),
                       weight.stride(tap_dim),
                       out,
                       bias.has_value() ? biases->data() : nullptr,
                       add};
    winograd_line(line, weight.size(tap_dim));
  });
}

void check_line(const char* name, const Tensor& weight, int64_t channels, ScalarType dtype) {
  check_shape(name, weight, {kAnySize, channels, kAnySize, kAnySize});
  check_dtype(name, weight, dtype);
  const int64_t height = weight.size(2), width = weight.size(3);
  STD_TORCH_CHECK((height == 1 || width == 1) && height % 2 == 1 && width % 2 == 1, name,
                  " must have shape (M,C,k,1) or (M,C,1,k) with k odd");
}

void check_line_bias(const char* name, const MaybeTensor& bias, const Tensor& weight) {
  if (!bias.has_value()) return;
  check_shape(name, *bias, {weight.size(0)});
  check_dtype(name, *bias, weight.scalar_type());
}

// An uninitialised (N,channels,H,W) in the memory format of x.
Tensor empty_like_map(const Tensor& x, int64_t channels) {
  const std::array<int64_t, 4> sizes{x.size(0), channels, x.size(2), x.size(3)};
  const bool last = x.stride(1) == 1 && !x.is_contiguous();
  const MemoryFormat format = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(IntHeaderOnlyArrayRef(sizes.data(), 4), x.scalar_type(), std::nullopt,
                              x.device(), std::nullopt, format);
}

Tensor split(const Tensor& x, const Tensor& first, const Tensor& second, const MaybeTensor& first_bias,
             const MaybeTensor& second_bias, const MaybeTensor& addend, const std::string& precision) {
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_line("first", first, x.size(1), x.scalar_type());
  check_line("second", second, x.size(1), x.scalar_type());
  check_line_bias("first_bias", first_bias, first);
  check_line_bias("second_bias", second_bias, second);
  Tensor out = empty_like_map(x, first.size(0) + second.size(0));
  if (out.numel() == 0) return out;
  if (takes_winograd(precision, x, first, second)) {
    const ChannelsLastMap map(x);
    Output output(out);
    if (first.size(0) > 0) winograd_conv(x, map.map(), first, first_bias, false, output.from_channel(0));
    if (second.size(0) > 0)
      winograd_conv(x, map.map(), second, second_bias, false, output.from_channel(first.size(0)));
    output.finish();
    return addend.has_value() ? torch::stable::copy_(out, add(out, *addend)) : out;
  }
  Tensor parts[] = {torch::stable::narrow(out, 1, 0, first.size(0)),
                    torch::stable::narrow(out, 1, first.size(0), second.size(0))};
  if (first.size(0) > 0) torch::stable::copy_(parts[0], line_conv(x, first, first_bias));
  if (second.size(0) > 0) torch::stable::copy_(parts[1], line_conv(x, second, second_bias));
  return addend.has_value() ? torch::stable::copy_(out, add(out, *addend)) : out;
}

Tensor merge(const Tensor& x, const Tensor& first, const Tensor& second, const MaybeTensor& bias,
             const std::string& precision) {
  check_shape("x", x, {kAnySize, first.size(1) + second.size(1), kAnySize, kAnySize});
  check_line("first", first, kAnySize, x.scalar_type());
  check_line("second", second, kAnySize, x.scalar_type());
  check_shape("second", second, {first.size(0), kAnySize, kAnySize, kAnySize});
  check_line_bias("bias", bias, first);
  Tensor out = empty_like_map(x, first.size(0));
  if (out.numel() == 0) return out;
  Tensor input = x;
  const Tensor halves[] = {torch::stable::narrow(input, 1, 0, first.size(1)),
                           torch::stable::narrow(input, 1, first.size(1), second.size(1))};
  if (takes_winograd(precision, x, first, second)) {
    Output output(out);
    bool written = false;
    for (const auto& [half, weight] : {std::pair{&halves[0], &first}, {&halves[1], &second}}) {
      if (weight->size(1) == 0) continue;
      const ChannelsLastMap map(*half);
      winograd_conv(*half, map.map(), *weight, written ? std::nullopt : bias, written,
                    output.from_channel(0));
      written = true;
    }
    output.finish();
    return out;
  }
  const Tensor left = line_conv(halves[0], first, bias), right = line_conv(halves[1], second, {});
  return torch::stable::copy_(out, add(left, right));
}

Tensor weight_gradient(const Tensor& x, const Tensor& grad, int64_t kernel_h, int64_t kernel_w,
                       const std::string& precision) {
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("grad", grad, {x.size(0), kAnySize, x.size(2), x.size(3)});
  check_dtype("grad", grad, x.scalar_type());
  const std::array<int64_t, 4> sizes{grad.size(1), x.size(1), kernel_h, kernel_w};
  const IntHeaderOnlyArrayRef shape(sizes.data(), 4);
  if (x.numel() == 0 || grad.numel() == 0) return torch::stable::new_zeros(x, shape);
  const Tensor weight = torch::stable::new_empty(x, shape);
  const std::array<int64_t, 2> ones{1, 1}, zeros{0, 0}, padding{kernel_h / 2, kernel_w / 2};
  const IntHeaderOnlyArrayRef stride(ones.data(), 2), pad(padding.data(), 2), none(zeros.data(), 2);
  const std::array<bool, 3> wanted{false, true, false};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(x),
                                     from(weight),
                                     from(std::optional<IntHeaderOnlyArrayRef>{}),
                                     from(stride),
                                     from(pad),
                                     from(stride),
                                     from(false),
                                     from(none),
                                     from(int64_t{1}),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(to<Tensor>(stack[1]));
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("global_conv_split", TORCH_BOX(&vosops::cpu::split));
  m.impl("global_conv_merge", TORCH_BOX(&vosops::cpu::merge));
  m.impl("global_conv_weight", TORCH_BOX(&vosops::cpu::weight_gradient));
}
