// What the kernels of the global convolution share: maps with their channels last, lines of pixels cut into
// tiles, and which Winograd algorithm serves a line.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/narrow.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"
#include "cpu/winograd_line.h"

namespace vosops::cpu::global_conv {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::stable::detail::from;
using torch::stable::detail::to;
using MaybeTensor = std::optional<Tensor>;

// Calls `name`.`overload` of PyTorch, which returns one tensor.
template <class... Args>
Tensor call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

enum Gradient { kOfInput, kOfWeight };

// PyTorch's gradient of the input x or the weight of a "same" line convolution, for `grad` of its result.
inline Tensor conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, Gradient which) {
  const std::array<int64_t, 2> ones{1, 1}, zeros{0, 0}, padding{weight.size(2) / 2, weight.size(3) / 2};
  const IntHeaderOnlyArrayRef stride(ones.data(), 2), pad(padding.data(), 2), none(zeros.data(), 2);
  const std::array<bool, 3> wanted{which == kOfInput, which == kOfWeight, false};
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
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor gradients[] = {to<Tensor>(stack[kOfInput]), to<Tensor>(stack[kOfWeight]),
                              to<Tensor>(stack[2])};
  return gradients[which];
}

using V = Vec<float, kRegisterBytes>;
using Element = FloatElement<V>;
constexpr int kLanes = V::kLanes, kPanel = kLanePanel<V>;
constexpr int64_t kBlockChannels = 128;  // summed in registers at a time
constexpr int64_t kRowStride =
    kBlockChannels + 16;  // of values, so that tiles fall into different cache sets
constexpr int64_t kBlockTiles = 24 * kKeyPanel;
constexpr int64_t kBlockPixels = 128;  // transposed at a time

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// to[c][r] = from[r][c] of a matrix with `rows` rows; rows of `to` are padded with zeros to `padded`.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
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

// A loop that becomes vector code; its inverse is narrow_row().
template <class S>
void widen_row(const S* __restrict from, int64_t count, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

// A map of float32, channels last: pixel (n, h, w) at data + ((n * height + h) * width + w) * stride.
template <class T>
struct PixelMap {
  T* data;
  int64_t stride;
};

// The lines of a map of N x `height` x `width` pixels.
struct Lines {
  int64_t batch, height, width;
  bool along_width;

  int64_t length() const { return along_width ? width : height; }
  int64_t count() const { return batch * (along_width ? height : width); }
  int64_t step() const { return along_width ? 1 : width; }  // pixels from one position of a line to the next
  int64_t first_pixel(int64_t line) const {
    return along_width ? line * width : line / width * height * width + line % width;
  }
};

// Lines cut into tiles of W::kOut positions, the last tile of a line reaching beyond its end.
template <class W>
struct Tiles {
  Lines lines;
  int64_t per_line, count;

  explicit Tiles(const Lines& lines)
      : lines(lines), per_line(ceil_div(lines.length(), W::kOut)), count(lines.count() * per_line) {}

  // Where the `size` pixels of a tile from `before` pixels before it on begin at some channel; `zeros` for
  // those outside of the line or of a tile after the last one.
  template <int kSize>
  void pixels(int64_t tile, int before, PixelMap<const float> map, int64_t channel, const float* zeros,
              const float* (&sources)[kSize]) const {
    const bool exists = tile < count;
    const int64_t first = tile % per_line * W::kOut - before;
    const int64_t base = exists ? lines.first_pixel(tile / per_line) : 0;
    for (int j = 0; j < kSize; ++j) {
      const int64_t at = first + j;
      const bool inside = exists && at >= 0 && at < lines.length();
      sources[j] = inside ? map.data + (base + at * lines.step()) * map.stride + channel : zeros;
    }
  }
};

// What is read in place of the channels of a pixel outside of the map.
alignas(64) inline constexpr float kZeros[kBlockChannels] = {};
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
inline int64_t fewest_products(int64_t taps, int64_t length) {
  int64_t fewest = taps * length;
  each_winograd(taps, [&]<class W>(W) { fewest = std::min(fewest, ceil_div(length, W::kOut) * W::kPoints); });
  return fewest;
}

// Calls f with the cheapest of them for a line of `length` positions.
template <class F>
void cheapest_winograd(int64_t taps, int64_t length, const F& f) {
  const int64_t fewest = fewest_products(taps, length);
  bool done = false;
  each_winograd(taps, [&]<class W>(W) {
    if (done || ceil_div(length, W::kOut) * W::kPoints != fewest) return;
    f(W{});
    done = true;
  });
}

// Whether Winograd arithmetic helps a line convolution; one without channels is nothing to compute.
inline bool winograd_helps(int64_t outputs, int64_t inputs, int64_t taps, int64_t length) {
  if (outputs == 0 || inputs == 0) return true;
  return std::min(outputs, inputs) >= kLeastChannels &&
         static_cast<double>(fewest_products(taps, length)) <=
             kWorthwhileShare * static_cast<double>(taps * length);
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

}  // namespace vosops::cpu::global_conv
