// The weight gradient of a line convolution on the GPU: for each tap a matrix product of the output's
// gradient and the shifted x over all pixels.
//
// A block owns 64 output channels x 32 channels x 8 taps, a warp one tap (64 x 32 sums, 64 a thread), and
// walks squares of 8 x 8 pixels: 64 rows of the gradient and the rows of x with the halo of the taps, which
// every warp reads at its own shift; two stages of cp.async, zeros outside the image. By mma the factors lie
// as they are needed transposed (ldmatrix does that for 16 bits, words are read one by one for TF32, at
// pitches without bank conflicts); by FMA a thread multiplies 8 x 8. A square of bf16 brings 17 KB for 0.9 M
// multiply-adds, 820 cycles at the rate of mma.sync. At the end the sums pass through shared memory, so that
// the taps of a channel are written side by side. Where tiles make fewer blocks than there are
// multiprocessors, the squares are cut into shares.
#include "global_conv.cuh"

namespace vosops::cuda {
namespace {

constexpr int kThreads = kTileThreads, kWarps = kThreads / kWarp;
constexpr int kTileRows = 64, kTileChannels = 32;  // of the gradient and of x
constexpr int kSide = 8, kPixels = kSide * kSide;
constexpr int kTaps = kWarps;  // of a block
constexpr int kStages = 2;
constexpr int kOwn = 8;  // a thread holds 8 x 8 sums

// Rows in shared memory: float at pitches of 8 words more than a multiple of 32 banks, 16 bits one vector
// more.
template <class E, int kColumns>
constexpr int kPitchBytes = kColumns * int(sizeof(E)) + (sizeof(E) == 4 ? 2 : 1) * kVectorBytes;

template <class E>
struct Problem {
  PixelRows<E> x, grad;
  int64_t batch;
  int height, width, taps;
  bool vertical;
  int tap_groups, row_tiles, channel_tiles, squares_y, squares_x;
  Sums<E> sums;  // (1, M, C * taps)

  __host__ __device__ int halo_rows() const { return kPixels + 2 * (taps / 2) * kSide; }
  __host__ __device__ int pitch() const {
    return vertical ? kSide : kSide + 2 * (taps / 2);
  }  // of x, in rows
  __host__ __device__ int tap_rows() const { return vertical ? kSide : 1; }
};

template <class E>
using GradRow = unsigned char[kPitchBytes<E, kTileRows>];
template <class E>
using Row = unsigned char[kPitchBytes<E, kTileChannels>];

// ---- The products of a square: `grad` and `x` are its rows, x's at this warp's shift ----
template <class E, Arithmetic kArithmetic>
struct ByTensorCores {
  using Element = E;
  static constexpr int kTilesRows = kTileRows / 16, kTilesChannels = kTileChannels / 8;
  static constexpr int kDepth = kStepBytes / int(sizeof(E)), kSteps = kPixels / kDepth;  // pixels of a step
  float c[kTilesRows][kTilesChannels][4] = {};

  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int row(int i) { return i / 2 * 16 + i % 2 * 8 + lane() / 4; }
  static __device__ __forceinline__ int channel(int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; }
  __device__ __forceinline__ float sum(int i, int j) const { return c[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  static __device__ __forceinline__ uint32_t word(const unsigned char* row, int column) {
    return *reinterpret_cast<const uint32_t*>(row + column * int(sizeof(E)));
  }

  __device__ __forceinline__ void add(const GradRow<E>* grad, const Row<E>* x, int pitch) {
    const int g = lane() / 4, t = lane() % 4;
    const auto x_row = [&](int pixel) { return x[pixel / kSide * pitch + pixel % kSide]; };
#pragma unroll 1
    for (int k = 0; k < kSteps; ++k) {
      VISIT(step, 1);
      uint32_t a[kTilesRows][4], a_low[kTilesRows][4] = {};
#pragma unroll
      for (int m = 0; m < kTilesRows; ++m) {
        if constexpr (sizeof(E) == 2) {
          load_matrices<4, true>(a[m], grad[k * kDepth + lane() % 8 + lane() / 16 * 8] +
                                           (16 * m + lane() / 8 % 2 * 8) * int(sizeof(E)));
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[m][i] = word(grad[k * kDepth + t + i / 2 * 4], 16 * m + g + i % 2 * 8);
        }
        prepare<E, kArithmetic>(a[m], a_low[m]);
      }
#pragma unroll
      for (int pair = 0; pair < kTilesChannels; pair += 2) {
        uint32_t loaded[4];
        if constexpr (sizeof(E) == 2) {
          load_matrices<4, true>(
              loaded, x_row(k * kDepth + lane() % 16) + (8 * pair + lane() / 16 * 8) * int(sizeof(E)));
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            loaded[i] = word(x_row(k * kDepth + t + i % 2 * 4), 8 * (pair + i / 2) + g);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t b[2] = {loaded[2 * j], loaded[2 * j + 1]}, b_low[2] = {};
          prepare<E, kArithmetic>(b, b_low);
#pragma unroll
          for (int m = 0; m < kTilesRows; ++m) step<E, kArithmetic>(c[m][pair + j], a[m], a_low[m], b, b_low);
        }
      }
    }
  }
};

struct ByFma {
  using Element = float;
  static constexpr int kLanesChannels = 4;  // 8 x 4 lanes; a thread's rows and channels in fours
  float c[kOwn][kOwn] = {};

  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int row(int i) {
    return i / 4 * (kTileRows / 2) + lane() / kLanesChannels * 4 + i % 4;
  }
  static __device__ __forceinline__ int channel(int j) {
    return j / 4 * (kTileChannels / 2) + lane() % kLanesChannels * 4 + j % 4;
  }
  __device__ __forceinline__ float sum(int i, int j) const { return c[i][j]; }

  __device__ __forceinline__ void add(const GradRow<float>* grad, const Row<float>* x, int pitch) {
#pragma unroll 2
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      float a[kOwn], b[kOwn];
      const auto* x_row = x[pixel / kSide * pitch + pixel % kSide];
#pragma unroll
      for (int part = 0; part < kOwn; part += 4) {
        *reinterpret_cast<float4*>(a + part) = *reinterpret_cast<const float4*>(grad[pixel] + row(part) * 4);
        *reinterpret_cast<float4*>(b + part) = *reinterpret_cast<const float4*>(x_row + channel(part) * 4);
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < kOwn; ++j) c[i][j] = fmaf(a[i], b[j], c[i][j]);
    }
  }
};

// ---- The kernel ----
template <class E>
struct Smem {
  alignas(16) GradRow<E> grad[kStages][kPixels];
  // Behind it: kStages times halo_rows() rows of x. At the end the sums lie over all of it.
};
constexpr int kSumPitch = kTileChannels * kTaps + 1;
constexpr size_t kSumBytes = sizeof(float) * kTileRows * kSumPitch;

template <class Products>
__global__ __launch_bounds__(kThreads, 1) void kernel(Problem<typename Products::Element> in) {
  using E = typename Products::Element;
  using Shared = Smem<E>;
  constexpr int kGradVectors = kTileRows * int(sizeof(E)) / kVectorBytes,
                kVectors = kTileChannels * int(sizeof(E)) / kVectorBytes;
  DYNAMIC_SHARED(Shared, s);
  auto* x_rows = reinterpret_cast<Row<E>*>(&s + 1);
  const int thread = int(threadIdx.x), warp = thread / kWarp;

  int64_t block = blockIdx.x;
  const int share = int(block % in.sums.shares);
  block /= in.sums.shares;
  const int first_tap = int(block % in.tap_groups) * kTaps;
  block /= in.tap_groups;
  const int first_row = int(block % in.row_tiles) * kTileRows;
  const int first_channel = int(block / in.row_tiles) * kTileChannels;
  const int halo = in.taps / 2, halo_y = in.vertical ? halo : 0, halo_x = in.vertical ? 0 : halo;
  const int own_tap = first_tap + warp;
  const int64_t squares = in.batch * in.squares_y * in.squares_x;
  const int64_t begin = squares * share / in.sums.shares, end = squares * (share + 1) / in.sums.shares;

  const auto copy = [&](unsigned char* to, const PixelRows<E>& from, int64_t n, int y, int column,
                        int channel) {
    const bool inside =
        y >= 0 && y < in.height && column >= 0 && column < in.width && channel < from.channels;
    const int bytes = inside ? min((from.channels - channel) * int(sizeof(E)), kVectorBytes) : 0;
    const int64_t at =
        inside ? n * from.batch_stride + y * from.y_stride + column * from.x_stride + channel : 0;
    copy_async<16>(to, from.data + at, bytes);
  };
  const auto stage = [&](int64_t square) {
    if (square < end) {
      const int number = int((square - begin) % kStages);
      const int x0 = int(square % in.squares_x) * kSide,
                y0 = int(square / in.squares_x % in.squares_y) * kSide;
      const int64_t n = square / in.squares_x / in.squares_y;
      for (int i = thread; i < kPixels * kGradVectors; i += kThreads) {
        VISIT_LOADS(grad_copy, 1);
        const int pixel = i / kGradVectors, at = i % kGradVectors * kVectorBytes;
        copy(s.grad[number][pixel] + at, in.grad, n, y0 + pixel / kSide, x0 + pixel % kSide,
             first_row + at / int(sizeof(E)));
      }
      for (int i = thread; i < in.halo_rows() * kVectors; i += kThreads) {
        VISIT_LOADS(x_copy, 1);
        const int row = i / kVectors, at = i % kVectors * kVectorBytes;
        copy(x_rows[number * in.halo_rows() + row] + at, in.x, n, y0 + row / in.pitch() - halo_y,
             x0 + row % in.pitch() - halo_x, first_channel + at / int(sizeof(E)));
      }
    }
    copy_async_commit();
  };

  Products products;
  stage(begin);
  for (int64_t square = begin; square < end; ++square) {
    VISIT(tile, 1);
    copy_async_wait<0>();
    __syncthreads();
    stage(square + 1);
    const int number = int((square - begin) % kStages);
    if (own_tap < in.taps)
      products.add(s.grad[number], x_rows + number * in.halo_rows() + own_tap * in.tap_rows(), in.pitch());
  }
  copy_async_wait<0>();
  __syncthreads();

  // Sums go through shared memory, where the taps of a channel become neighbours.
  auto* sums = reinterpret_cast<float*>(&s);
  const int taps = min(in.taps - first_tap, kTaps);
  if (warp < taps)
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        sums[Products::row(i) * kSumPitch + Products::channel(j) * taps + warp] = products.sum(i, j);
  __syncthreads();
  const int channels = min(in.x.channels - first_channel, kTileChannels), columns = channels * taps;
  for (int i = thread; i < kTileRows * columns; i += kThreads) {
    VISIT(sum_store, 1);
    const int row = i / columns, column = i % columns;
    if (first_row + row >= in.grad.channels) break;
    const int64_t to = int64_t{first_channel + column / taps} * in.taps + first_tap + column % taps;
    in.sums.put(share, 0, first_row + row, to, sums[row * kSumPitch + column]);
  }
}

template <class Products>
void launch(Problem<typename Products::Element> in, int64_t batch, const Tensor& out, Stream stream) {
  using E = typename Products::Element;
  in.tap_groups = ceil_div(in.taps, kTaps);
  in.row_tiles = ceil_div(in.grad.channels, kTileRows);
  in.channel_tiles = ceil_div(in.x.channels, kTileChannels);
  in.squares_y = ceil_div(in.height, kSide);
  in.squares_x = ceil_div(in.width, kSide);
  in.batch = batch;
  const size_t bytes =
      std::max(sizeof(Smem<E>) + sizeof(Row<E>) * size_t(kStages) * size_t(in.halo_rows()), kSumBytes);
  STD_TORCH_CHECK(bytes <= device_limits().shared_bytes,
                  "the kernel is too long for the device's shared memory");
  const int64_t blocks = int64_t{in.tap_groups} * in.row_tiles * in.channel_tiles;
  const int64_t squares = batch * in.squares_y * in.squares_x;
  constexpr double kCyclesOfSquare = 900;
  const double steps_of_sums = cycles_of_sums(in.sums.count()) / kCyclesOfSquare;
  sum_over_shares(out, in.sums, choose_shares(blocks, squares, steps_of_sums), stream, [&](const auto& sums) {
    in.sums = sums;
    LAUNCH(kernel<Products>, dim3(checked_blocks(blocks * sums.shares)), dim3(kThreads), bytes, stream, in);
  });
}

Tensor global_conv_weight(const Tensor& x, const Tensor& grad, int64_t kernel_h, int64_t kernel_w,
                          std::string_view precision_name) {
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  check_shape("grad", grad, {batch, kAnySize, height, width});
  check_dtype("grad", grad, x.scalar_type());
  STD_TORCH_CHECK((kernel_h == 1 || kernel_w == 1) && kernel_h % 2 == 1 && kernel_w % 2 == 1 &&
                      std::max(kernel_h, kernel_w) <= kMostPixels,
                  "kernel_h and kernel_w must be odd, and one of them 1");
  const Precision precision = parse_precision(precision_name);
  Tensor out = torch::stable::new_empty(x, std::vector<int64_t>{grad.size(1), channels, kernel_h, kernel_w});
  if (out.numel() == 0) return out;
  const DeviceScope device(x);
  const Stream stream = device.stream();
  if (x.numel() == 0) return torch::stable::zero_(out);
  dispatch(x.scalar_type(), [&](auto sample) {
    using E = decltype(sample);
    Tensor kept[2];
    Problem<E> in{};
    in.x = pixel_rows<E>(x, stream, kept[0]);
    in.grad = pixel_rows<E>(grad, stream, kept[1]);
    in.height = int(height);
    in.width = int(width);
    in.taps = int(kernel_h * kernel_w);
    in.vertical = kernel_w == 1;
    const int64_t columns = channels * in.taps;
    in.sums = {static_cast<E*>(out.mutable_data_ptr()),
               {out.numel(), columns, 1},
               1,
               int(grad.size(1)),
               columns,
               {}};
    if constexpr (sizeof(E) == 2)
      launch<ByTensorCores<E, Arithmetic::kPlain>>(in, batch, out, stream);
    else if (precision == Precision::kIeee)
      launch<ByFma>(in, batch, out, stream);
    else if (precision == Precision::kTf32)
      launch<ByTensorCores<E, Arithmetic::kPlain>>(in, batch, out, stream);
    else
      launch<ByTensorCores<E, Arithmetic::kSplit>>(in, batch, out, stream);
  });
  return out;
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("global_conv_weight", TORCH_BOX(&vosops::cuda::global_conv_weight));
}
