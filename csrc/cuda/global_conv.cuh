// What the kernels of the global convolution share: where operands lie, and the sum over shares of a
// reduction.
//
// Operands are read as rows of contiguous channels, 16 bytes at a time: a row per pixel of a map, a row per
// output channel and tap of a weight. Channel-last memory is read in place; anything else becomes such rows
// first, one pass over it. A reduction that one block in the place of each output could not finish fast
// enough is cut into shares, whose sums go to a workspace and are added in their order: the same result on
// every run.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "rows.cuh"

namespace vosops::cuda {

// A convolution along one axis: weight (M, C, k, 1) or (M, C, 1, k).
struct LineShape {
  int rows, channels, taps;
  bool vertical;
  int half() const { return taps / 2; }
};

inline LineShape line_shape(const char* name, const Tensor& weight, const Tensor& x, int64_t channels) {
  check_shape(name, weight, {kAnySize, channels, kAnySize, kAnySize});
  check_dtype(name, weight, x.scalar_type());
  const int64_t height = weight.size(2), width = weight.size(3);
  STD_TORCH_CHECK((height == 1 || width == 1) && height % 2 == 1 && width % 2 == 1, name,
                  " must have a kernel of (k, 1) or (1, k), k odd");
  STD_TORCH_CHECK(weight.size(0) <= kMostPixels / 4 && channels <= kMostPixels / 4, name, " is too large");
  return {int(weight.size(0)), int(channels), int(height * width), width == 1};
}

inline bool divides_rows(const Tensor& tensor, std::initializer_list<int> dims) {
  const int64_t elements = kVectorBytes / int64_t(tensor.element_size());
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes) return false;
  for (int dim : dims)
    if (tensor.size(dim) > 1 && tensor.stride(dim) % elements) return false;
  return tensor.size(1) == 1 || tensor.stride(1) == 1;
}

// ---- Maps as a row per pixel ----
template <class E>
struct PixelRows {
  const E* data;
  int64_t batch_stride, y_stride, x_stride;
  int channels;
};

// `memory` keeps what the rows lie in.
template <class E>
PixelRows<E> pixel_rows(const Tensor& map, Stream stream, Tensor& memory) {
  const int64_t batch = map.size(0), channels = map.size(1), height = map.size(2), width = map.size(3);
  STD_TORCH_CHECK(channels <= kMostPixels / 4 && height <= kMostPixels / std::max<int64_t>(width, 1),
                  "a batch element is limited to 2^31 - 1 pixels");
  memory = map;
  if (divides_rows(map, {0, 2, 3}))
    return {static_cast<const E*>(map.const_data_ptr()), map.stride(0), map.stride(2), map.stride(3),
            int(channels)};
  const bool flat = width == 1 || height == 1 || map.stride(2) == width * map.stride(3);
  const Tensor source = flat ? map : torch::stable::contiguous(map);
  const int64_t step = height == 1 || width > 1 ? source.stride(3) : source.stride(2);
  const Matrix<E> matrix{static_cast<const E*>(source.const_data_ptr()),
                         source.stride(0),
                         step,
                         source.stride(1),
                         height * width,
                         int(channels)};
  const int row_columns = row_columns_of(channels);
  memory = torch::stable::new_empty(map, std::vector<int64_t>{batch, height * width, row_columns});
  const int64_t blocks =
      batch * ceil_div(height * width, int64_t{kPackRows}) * ceil_div(row_columns, kPackColumns);
  LAUNCH((rows_kernel<E, E>), dim3(checked_blocks(blocks)), dim3(kTileThreads), sizeof(PackRowsSmem), stream,
         matrix, false, row_columns, static_cast<E*>(memory.mutable_data_ptr()));
  return {static_cast<const E*>(memory.const_data_ptr()), height * width * row_columns, width * row_columns,
          row_columns, int(channels)};
}

// ---- Sums over shares ----
// A dense map (N, C, pixels), by channel or by pixel.
struct Layout {
  int64_t batch_stride, channel_stride, pixel_stride;
  __host__ __device__ int64_t at(int64_t n, int channel, int64_t pixel) const {
    return n * batch_stride + channel * channel_stride + pixel * pixel_stride;
  }
};

// What is added to each sum: an entry per channel, and a map.
template <class E>
struct Addends {
  const E *first_bias = nullptr,
          *second_bias = nullptr;  // of channels before `first_channels`, and from there on
  int first_channels = 0;
  const E* map = nullptr;
  Layout map_layout{};

  __device__ float of(int64_t n, int channel, int64_t pixel) const {
    const bool first = channel < first_channels;
    const E* bias = first ? first_bias : second_bias;
    float sum = bias ? to_float(bias[first ? channel : channel - first_channels]) : 0.f;
    if (map) sum += to_float(map[map_layout.at(n, channel, pixel)]);
    return sum;
  }
};

// Where sums go: to `out`, or with several shares to `parts`, each laid out as `out`.
template <class E>
struct Sums {
  E* out;
  Layout layout;
  int64_t batch;
  int channels;
  int64_t pixels;
  Addends<E> addends;
  float* parts = nullptr;
  int shares = 1;

  __host__ __device__ int64_t count() const { return batch * channels * pixels; }
  __device__ void put(int share, int64_t n, int channel, int64_t pixel, float sum) const {
    const int64_t at = layout.at(n, channel, pixel);
    if (shares == 1) {
      VISIT(result, 2);
      out[at] = from_float<E>(sum + addends.of(n, channel, pixel));
    } else {
      VISIT(result_of_share, 2);
      parts[share * count() + at] = sum;
    }
  }
};

// An uninitialised (N, channels, H, W) in the memory format of x.
inline Tensor empty_map_like(const Tensor& x, int64_t channels) {
  const std::array<int64_t, 4> sizes{x.size(0), channels, x.size(2), x.size(3)};
  using torch::headeronly::MemoryFormat;
  const bool last = x.stride(1) == 1 && !x.is_contiguous();
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()),
                              x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Sums into a dense map of either memory format.
template <class E>
Sums<E> sums_into(const Tensor& out) {
  const int64_t channels = out.size(1), pixels = out.size(2) * out.size(3);
  const bool last = !out.is_contiguous();
  const Layout layout{channels * pixels, last ? 1 : pixels, last ? channels : 1};
  return {static_cast<E*>(out.mutable_data_ptr()), layout, out.size(0), int(channels), pixels, {}};
}

constexpr int kSumThreads = 256;

template <class E>
__global__ __launch_bounds__(kSumThreads) void sum_kernel(Sums<E> sums) {
  const int64_t at = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (at >= sums.count()) return;
  float sum = 0;
  for (int share = 0; share < sums.shares; ++share) sum += sums.parts[share * sums.count() + at];
  const int64_t n = at / sums.layout.batch_stride, pixel = at / sums.layout.pixel_stride % sums.pixels;
  const int channel = int(at / sums.layout.channel_stride % sums.channels);
  sums.out[at] = from_float<E>(sum + sums.addends.of(n, channel, pixel));
}

// Cycles of all multiprocessors in which so many sums of one share are written and read again.
inline double cycles_of_sums(int64_t sums) {
  constexpr double kBytesPerCycle = 2000;  // of the second-level cache
  return double(sums) * 2 * sizeof(float) / kBytesPerCycle;
}

// The number of shares that makes the least time of waves of blocks and of the sums over shares, in steps of
// a block: `steps` that all shares walk together, and the steps that it costs to write and read one share's
// sums.
inline int choose_shares(int64_t blocks, int64_t steps, double steps_of_sums) {
  constexpr int kMostShares = 64;
  constexpr double kStart = 0.5;  // steps that pass until a block's pipeline is full
  const int64_t multiprocessors = device_limits().multiprocessors;
  int best = 1;
  double least = 0;
  for (int shares = 1; shares <= std::min<int64_t>(steps, kMostShares); ++shares) {
    const auto waves = double(ceil_div(blocks * shares, multiprocessors));
    const double time = waves * (double(ceil_div(steps, int64_t{shares})) + kStart) +
                        (shares > 1 ? steps_of_sums * shares : 0);
    if (shares == 1 || time < 0.97 * least) {
      best = shares;
      least = time;
    }
  }
  return best;
}

// Chooses the shares, launches `kernel(sums)` and adds them up.
template <class E, class Kernel>
void sum_over_shares(const Tensor& out, Sums<E> sums, int shares, Stream stream, const Kernel& kernel) {
  Tensor parts;
  sums.shares = shares;
  if (shares > 1) {
    parts = torch::stable::new_empty(out, std::vector<int64_t>{shares, sums.count()}, ScalarType::Float);
    sums.parts = parts.mutable_data_ptr<float>();
  }
  kernel(sums);
  if (shares > 1)
    LAUNCH(sum_kernel<E>, dim3(checked_blocks(ceil_div(sums.count(), int64_t{kSumThreads}))),
           dim3(kSumThreads), 0, stream, sums);
}

}  // namespace vosops::cuda
