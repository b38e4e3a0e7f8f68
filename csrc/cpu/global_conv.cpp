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
// Where the values of all channel blocks take less memory than the products of all panels, as in the gradient
// of an input of many channels, all values are made first, and a task keeps the products of its panel only.
// That gradient is a line convolution too: it reads the same weights with inputs and outputs exchanged and
// the taps backwards, from where they lie.
//
// Maps are read and written channels last; others are transposed first and at the end. What is float64,
// and kernels or maps that Winograd does not help, go to PyTorch's convolution.
#include "cpu/global_conv.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "common/checks.h"
#include "cpu/global_conv_amx.h"

namespace vosops::cpu {
namespace {

using namespace global_conv;

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

// The weights of a line convolution, read in place: of output m and input c at data + m * output_stride + c *
// input_stride. The weights of the gradient of another one's input are its own with outputs and inputs
// exchanged and the taps reversed.
template <class S>
struct LineWeight {
  const S* data;
  const S* end;  // after the last one
  int64_t outputs, inputs, output_stride, input_stride, tap_stride;
  bool reversed;
};

// One "same" line convolution of a map whose channels are a multiple of kLanes, to the first channels of
// `out`.
template <class S>
struct Line {
  Lines lines;
  PixelMap<const float> x;
  LineWeight<S> weight;
  PixelMap<float> out;
  const float* bias;  // of the outputs, or null
  bool add;           // to what is in `out`
};

template <class W, class S>
class WinogradLine {
 public:
  explicit WinogradLine(const Line<S>& line)
      : line_(line),
        tiles_(line.lines),
        block_tiles_(ceil_div(ceil_div(tiles_.count, ceil_div(tiles_.count, kBlockTiles)), kKeyPanel) *
                     kKeyPanel),
        panels_(ceil_div(weight_.outputs, kPanel)),
        blocks_(ceil_div(weight_.inputs, kBlockChannels)),
        block_(ceil_div(ceil_div(weight_.inputs, blocks_), kLanes) * kLanes),
        at_once_(blocks_ * kRowStride <= panels_ * kPanel + kRowStride),
        values_((at_once_ ? blocks_ : 1) * block_values()),
        products_(at_once_ ? 0 : panels_ * panel_products()) {}

  void run() {
    for (int64_t tile = 0; tile < tiles_.count; tile += block_tiles_) {
      for (int64_t first = 0; first < blocks_; first += at_once_ ? blocks_ : 1) {
        const int64_t end = at_once_ ? blocks_ : first + 1;
        for (int64_t block = first; block < end; ++block)
          transform_input(tile, block, values_.data() + (block - first) * block_values());
        multiply_panels(tile, first, end);
      }
    }
  }

 private:
  int64_t block_values() const { return W::kPoints * block_tiles_ * kRowStride; }
  int64_t panel_products() const { return W::kPoints * block_tiles_ * kPanel; }
  int64_t channels(int64_t block) const { return std::min(block_, weight_.inputs - block * block_); }

  // The values of all tiles of a block in a block of channels, zeros around the map and after the last tile.
  void transform_input(int64_t first_tile, int64_t block, float* values) {
    const int64_t channel = block * block_, padded = ceil_div(channels(block), kLanes) * kLanes;
    parallel_tasks(block_tiles_ / kKeyPanel, [&] {
      return [&](int64_t task) {
        const int64_t begin = task * kKeyPanel;
        for (int64_t t = begin; t < begin + kKeyPanel; ++t) {
          const float* sources[W::kPoints];
          tiles_.pixels(first_tile + t, W::kTaps / 2, line_.x, channel, kZeros, sources);
          float* to = values + t * kRowStride;
          for (int64_t c = 0; c < padded; c += kLanes) {
            typename V::Reg inputs[W::kPoints], points[W::kPoints];
#pragma GCC unroll 16
            for (int j = 0; j < W::kPoints; ++j) inputs[j] = V::load(sources[j] + c);
            W::template transform_input<V>(inputs, points);
#pragma GCC unroll 16
            for (int p = 0; p < W::kPoints; ++p) V::store(to + p * block_tiles_ * kRowStride + c, points[p]);
          }
        }
      };
    });
  }

  // The products of all panels with the channel blocks [first, end), whose values were made.
  void multiply_panels(int64_t first_tile, int64_t first, int64_t end) {
    parallel_tasks(panels_, [&] {
      return [&, weights = Workspace<float>(W::kPoints * kBlockChannels * kPanel),
              scratch = Workspace<float>(kLanes * kLanes * W::kTaps),
              own = Workspace<float>(at_once_ ? panel_products() : 0)](int64_t panel) mutable {
        float* products = at_once_ ? own.data() : products_.data() + panel * panel_products();
        for (int64_t block = first; block < end; ++block) {
          for (int64_t lane = 0; lane < kPanel; lane += kLanes)
            transform_weights(panel * kPanel + lane, block * block_, channels(block), scratch.data(),
                              weights.data() + lane);
          const float* values = values_.data() + (block - first) * block_values();
          for (int p = 0; p < W::kPoints; ++p) {
            const float* panel_weights = weights.data() + p * kBlockChannels * kPanel;
            for (int64_t t = 0; t < block_tiles_; t += kKeyPanel) {
              const int64_t at = p * block_tiles_ + t;
              multiply_tile(panel_weights, values + at * kRowStride, channels(block), block > 0,
                            products + at * kPanel);
            }
          }
        }
        if (end == blocks_) transform_output(first_tile, panel, products);
      };
    });
  }

  // The transformed weights of kLanes output channels from `output` on, zero after the last one.
  void transform_weights(int64_t output, int64_t channel, int64_t channels, float* scratch, float* to) {
    const int64_t outputs = std::clamp<int64_t>(weight_.outputs - output, 0, kLanes);
    const bool whole = outputs == kLanes && weight_.tap_stride == 1;
    const bool by_input = whole && weight_.input_stride == W::kTaps;
    const bool by_output = whole && weight_.output_stride == W::kTaps;
    const S* from = weight_.data + output * weight_.output_stride + channel * weight_.input_stride;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, channels - c);
      const S* source = from + c * weight_.input_stride;
      if (by_input && count == kLanes) {
        transpose_inputs(source, scratch);
      } else if (by_output) {
        transpose_outputs(source, count, scratch);
      } else {
        std::fill_n(scratch, kLanes * kLanes * W::kTaps, 0.f);
        for (int64_t i = 0; i < outputs; ++i)
          for (int64_t e = 0; e < count; ++e)
            for (int64_t tap = 0; tap < W::kTaps; ++tap)
              scratch[(e * W::kTaps + tap) * kLanes + i] = widen(
                  source[i * weight_.output_stride + e * weight_.input_stride + tap * weight_.tap_stride]);
      }
      const int64_t first = weight_.reversed ? W::kTaps - 1 : 0, step = weight_.reversed ? -1 : 1;
      for (int64_t e = 0; e < count; ++e) {
        const float* row = scratch + (e * W::kTaps + first) * kLanes;
        typename V::Reg taps[W::kTaps], values[W::kPoints];
#pragma GCC unroll 16
        for (int tap = 0; tap < W::kTaps; ++tap) taps[tap] = V::load(row + tap * step * kLanes);
        W::template transform_weight<V>(taps, values);
#pragma GCC unroll 16
        for (int p = 0; p < W::kPoints; ++p) V::store(to + (p * kBlockChannels + c + e) * kPanel, values[p]);
      }
    }
  }

  static constexpr int64_t kRow = kLanes * W::kTaps;  // adjacent weights of kLanes channels

  // scratch (kLanes * taps,kLanes) from the adjacent weights of kLanes input channels, output by output.
  void transpose_inputs(const S* source, float* scratch) {
    const float* rows;
    int64_t stride = weight_.output_stride;
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

  // The same from the adjacent weights of kLanes output channels, input by input for `count` of them.
  void transpose_outputs(const S* source, int64_t count, float* scratch) {
    constexpr int kRest = W::kTaps % kLanes, kWhole = W::kTaps - kRest;
    float wide[kRow + kLanes] = {};  // whole registers are read, beyond the last weight
    for (int64_t e = 0; e < count; ++e, source += weight_.input_stride, scratch += kRow) {
      const float* row = wide;
      if constexpr (std::is_same_v<S, float>) {
        if (source + kRow + kLanes <= weight_.end) row = source;
      }
      if (row == wide) widen_row(source, kRow, wide);
      for (int tap = 0; tap < kWhole; tap += kLanes)
        transpose_lanes<V>(row + tap, W::kTaps, scratch + tap * kLanes, kLanes);
      if constexpr (kRest > 0)
        transpose_lanes<V, kRest>(row + kWhole, W::kTaps, scratch + kWhole * kLanes, kLanes);
    }
  }

  // products (kKeyPanel,kPanel) = or += values (kKeyPanel,channels) times weights (channels,kPanel). Every
  // block's sum begins at zero: one long sum over all channels would lose several times as much.
  static void multiply_tile(const float* weights, const float* values, int64_t channels, bool add,
                            float* products) {
    std::array<const float*, kKeyPanel> rows;
    for (int j = 0; j < kKeyPanel; ++j) rows[j] = values + j * kRowStride;
    const auto store_sums = [&](const TileSums<Element>& sums) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeyPanel; ++j) {
#pragma GCC unroll 16
        for (int r = 0; r < kTileRegisters; ++r) {
          float* to = products + j * kPanel + r * kLanes;
          V::store(to, add ? V::load(to) + sums[j][r] : sums[j][r]);
        }
      }
    };
    const auto ahead = [&](int64_t e) {  // the values and products of the next tiles
      constexpr int64_t kValues = kKeyPanel * kRowStride, kProducts = kKeyPanel * kPanel;
      if (e * kLanes < kValues) prefetch_second(values + kValues + e * kLanes);
      if (e * kLanes < kProducts) prefetch_second(products + kProducts + e * kLanes);
    };
    multiply_rows<Element>(weights, rows, channels, store_sums, ahead);
  }

  // Writes, or adds, the pixels of a block's tiles in a panel of output channels.
  void transform_output(int64_t first_tile, int64_t panel, const float* products) {
    const Lines& lines = tiles_.lines;
    const int64_t end = std::min(block_tiles_, tiles_.count - first_tile);
    for (int64_t t = 0; t < end; ++t) {
      const int64_t tile = first_tile + t, position = tile % tiles_.per_line * W::kOut;
      const int64_t pixel = lines.first_pixel(tile / tiles_.per_line) + position * lines.step();
      const int64_t count = std::min<int64_t>(W::kOut, lines.length() - position);
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const int64_t output = panel * kPanel + lane;
        const int64_t left = std::min<int64_t>(kLanes, weight_.outputs - output);
        if (left <= 0) break;
        typename V::Reg points[W::kPoints], outputs[W::kOut];
#pragma GCC unroll 16
        for (int p = 0; p < W::kPoints; ++p)
          points[p] = V::load(products + (p * block_tiles_ + t) * kPanel + lane);
        W::template transform_output<V>(points, outputs);
        for (int64_t i = 0; i < count; ++i)
          store(line_.out.data + (pixel + i * lines.step()) * line_.out.stride + output, outputs[i], output,
                left);
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
  const LineWeight<S>& weight_ = line_.weight;
  const Tiles<W> tiles_;
  const int64_t block_tiles_, panels_;
  const int64_t blocks_, block_;  // of input channels, and how many channels each but the last has
  const bool at_once_;            // whether a task sums all of them, in less memory than one after the other
  Workspace<float> values_, products_;
};

bool helps(const Tensor& x, const Tensor& weight) {
  const int dim = weight.size(2) == 1 ? 3 : 2;
  return winograd_helps(weight.size(0), weight.size(1), weight.size(dim), x.size(dim));
}

// Whether both of two convolutions of maps like x are faster in Winograd arithmetic.
bool winograd_takes(const Tensor& x, const Tensor& first, const Tensor& second) {
  return x.scalar_type() != ScalarType::Double && helps(x, first) && helps(x, second) &&
         std::max(first.numel(), second.numel()) > 0;
}

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

// Whether a convolution is one of two or the gradient of its input.
enum class Direction { kForward, kInputGradient };

int64_t outputs_of(const Tensor& weight, Direction direction) {
  return weight.size(direction == Direction::kForward ? 0 : 1);
}
int64_t inputs_of(const Tensor& weight, Direction direction) {
  return weight.size(direction == Direction::kForward ? 1 : 0);
}

// One line convolution in Winograd arithmetic, to the channels of `out` from `channel` on.
void winograd_conv(const Tensor& x, const PixelMap<const float>& map, const Tensor& weight,
                   Direction direction, const MaybeTensor& bias, bool add, PixelMap<float> out) {
  const bool along_width = weight.size(2) == 1, forward = direction == Direction::kForward;
  const int tap_dim = along_width ? 3 : 2;
  const int64_t outputs = outputs_of(weight, direction), inputs = inputs_of(weight, direction);
  const int64_t taps = weight.size(tap_dim), tap_stride = weight.stride(tap_dim);
  std::optional<Workspace<float>> biases;
  if (bias.has_value()) biases.emplace(outputs);
  dispatch_low(x.scalar_type(), [&]<class S>(S) {
    for (int64_t i = 0; bias.has_value() && i < outputs; ++i)
      (*biases)[i] = widen(bias->const_data_ptr<S>()[i * bias->stride(0)]);
    const S* data = weight.const_data_ptr<S>();
    const S* end = data + (weight.size(0) - 1) * weight.stride(0) + (weight.size(1) - 1) * weight.stride(1) +
                   (taps - 1) * tap_stride + 1;
    const Line<S> line{{x.size(0), x.size(2), x.size(3), along_width},
                       map,
                       {data, end, outputs, inputs, weight.stride(forward ? 0 : 1),
                        weight.stride(forward ? 1 : 0), tap_stride, !forward},
                       out,
                       bias.has_value() ? biases->data() : nullptr,
                       add};
    cheapest_winograd(taps, line.lines.length(), [&]<class W>(W) { WinogradLine<W, S>(line).run(); });
  });
}

// A map's first channels and its others.
std::array<Tensor, 2> halves_of(const Tensor& x, int64_t middle) {
  Tensor map = x;
  return {torch::stable::narrow(map, 1, 0, middle),
          torch::stable::narrow(map, 1, middle, x.size(1) - middle)};
}

// Two convolutions of one map, side by side, if they are wanted and can be done faster than by PyTorch.
bool fast_split(const std::string& precision, const Tensor& x, const Tensor& first, const Tensor& second,
                Direction direction, const MaybeTensor& first_bias, const MaybeTensor& second_bias,
                Tensor& out) {
  if (precision != "winograd") return false;
  const bool backwards = direction == Direction::kInputGradient;
  const int64_t middle = outputs_of(first, direction), others = outputs_of(second, direction);
  std::array<Tensor, 2> parts = halves_of(out, middle);
  if ((middle == 0 || amx_lines({{x, first, backwards}}, first_bias, parts[0])) &&
      (others == 0 || amx_lines({{x, second, backwards}}, second_bias, parts[1])))
    return true;
  if (!winograd_takes(x, first, second)) return false;
  const ChannelsLastMap map(x);
  Output output(out);
  if (middle > 0) winograd_conv(x, map.map(), first, direction, first_bias, false, output.from_channel(0));
  if (others > 0)
    winograd_conv(x, map.map(), second, direction, second_bias, false, output.from_channel(middle));
  output.finish();
  return true;
}

// The same of the sum of a convolution of a map's first channels and one of its others.
bool fast_merge(const std::string& precision, const std::array<Tensor, 2>& halves, const Tensor& first,
                const Tensor& second, Direction direction, const MaybeTensor& bias, Tensor& out) {
  if (precision != "winograd") return false;
  const bool backwards = direction == Direction::kInputGradient;
  if (amx_lines({{halves[0], first, backwards}, {halves[1], second, backwards}}, bias, out)) return true;
  if (!winograd_takes(out, first, second)) return false;
  Output output(out);
  bool written = false;
  for (const auto& [half, weight] : {std::pair{&halves[0], &first}, {&halves[1], &second}}) {
    if (inputs_of(*weight, direction) == 0) continue;
    const ChannelsLastMap map(*half);
    winograd_conv(*half, map.map(), *weight, direction, written ? std::nullopt : bias, written,
                  output.from_channel(0));
    written = true;
  }
  output.finish();
  return true;
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
  if (fast_split(precision, x, first, second, Direction::kForward, first_bias, second_bias, out)) {
    return addend.has_value() ? torch::stable::copy_(out, add(out, *addend)) : out;
  }
  std::array<Tensor, 2> parts = halves_of(out, first.size(0));
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
  const std::array<Tensor, 2> halves = halves_of(x, first.size(1));
  if (fast_merge(precision, halves, first, second, Direction::kForward, bias, out)) return out;
  const Tensor left = line_conv(halves[0], first, bias), right = line_conv(halves[1], second, {});
  return torch::stable::copy_(out, add(left, right));
}

// PyTorch's gradient of a line convolution's input.
Tensor input_gradient(const Tensor& grad, const Tensor& weight) {
  const std::array<int64_t, 4> sizes{grad.size(0), weight.size(1), grad.size(2), grad.size(3)};
  const IntHeaderOnlyArrayRef shape(sizes.data(), 4);
  if (weight.size(0) == 0) return torch::stable::new_zeros(grad, shape);
  return conv_backward(grad, torch::stable::new_empty(grad, shape), weight, kOfInput);
}

// The gradient of split's x, for `grad` of its result.
Tensor split_input(const Tensor& grad, const Tensor& first, const Tensor& second,
                   const std::string& precision) {
  check_line("first", first, kAnySize, grad.scalar_type());
  check_line("second", second, first.size(1), grad.scalar_type());
  check_shape("grad", grad, {kAnySize, first.size(0) + second.size(0), kAnySize, kAnySize});
  Tensor out = empty_like_map(grad, first.size(1));
  if (out.numel() == 0) return out;
  const std::array<Tensor, 2> halves = halves_of(grad, first.size(0));
  if (fast_merge(precision, halves, first, second, Direction::kInputGradient, {}, out)) return out;
  return torch::stable::copy_(out, add(input_gradient(halves[0], first), input_gradient(halves[1], second)));
}

// The gradient of merge's x, for `grad` of its result.
Tensor merge_input(const Tensor& grad, const Tensor& first, const Tensor& second,
                   const std::string& precision) {
  check_line("first", first, kAnySize, grad.scalar_type());
  check_line("second", second, kAnySize, grad.scalar_type());
  check_shape("second", second, {first.size(0), kAnySize, kAnySize, kAnySize});
  check_shape("grad", grad, {kAnySize, first.size(0), kAnySize, kAnySize});
  Tensor out = empty_like_map(grad, first.size(1) + second.size(1));
  if (out.numel() == 0) return out;
  if (fast_split(precision, grad, first, second, Direction::kInputGradient, {}, {}, out)) return out;
  std::array<Tensor, 2> parts = halves_of(out, first.size(1));
  if (first.size(1) > 0) torch::stable::copy_(parts[0], input_gradient(grad, first));
  if (second.size(1) > 0) torch::stable::copy_(parts[1], input_gradient(grad, second));
  return out;
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("global_conv_split", TORCH_BOX(&vosops::cpu::split));
  m.impl("global_conv_merge", TORCH_BOX(&vosops::cpu::merge));
  m.impl("global_conv_split_input", TORCH_BOX(&vosops::cpu::split_input));
  m.impl("global_conv_merge_input", TORCH_BOX(&vosops::cpu::merge_input));
}
