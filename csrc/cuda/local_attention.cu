// The three linear pieces of local attention on the GPU, with offsets d of a window:
//   dot    out[d,y,x] = sum over channels of a[c,y,x] b[c,(y,x)+d]
//   weigh  out[c,y,x] = sum over d of w[d,y,x] b[c,(y,x)+d]
//   spread out[c,y,x] = sum over d of w[d,(y,x)-d] a[c,(y,x)-d], which is weigh of mirrored weights
// Every result is gathered by one thread in a fixed order. A warp is 32 neighbouring pixels of a row, so that
// any shift reads 32 adjacent floats; with a dilation every phase of it is an image of its own. dot: a block
// owns 32 x 4 pixels times 16 x 16 offsets, a warp one dx, a thread 4 rows times 16 dy (64 sums); 19 x 47
// pixels of b and 4 x 32 of a come 8 channels at a time through two stages (66 KB), 23 reads of shared memory
// for 64 FMAs. weigh: a block owns 32 x 4 pixels times 32 channels, a thread 4 rows times 16 channels (64
// sums) of every 8th dx; rows of 47 pixels come one after the other through two stages (12 KB), weights go
// from global memory to registers a row ahead; 19 reads for 53 FMAs; the sums over dx meet at the end in 32
// KB. Bytes: scores once, maps 4 to 6 times from L2. At 31 x 54, 256 channels, 8 heads, radius 7 (96 MFMA, 12
// MB of scores) an H100 needs 3.6 us for memory, 2.9 us for FMAs and 7 us for either kernel's reads of shared
// memory, which bound both.
#include <algorithm>

#include "host.cuh"
#include "intrinsics.cuh"

namespace vosops::cuda {
namespace {

constexpr int kRows = 4;     // pixels of a thread, one below the other
constexpr int kShifts = 16;  // offsets in x, or in y, of a tile
constexpr int kStagedRows = kRows + kShifts - 1, kStagedColumns = kWarp + kShifts - 1;
constexpr int kThreads = kShifts * kWarp;
constexpr int kMostReach = 1 << 14;

struct Window {
  int height, width;  // of the maps
  int dilation, reach, size;
  int phases_y, phases_x, tiles_y, tiles_x;

  __host__ __device__ int chunks() const { return ceil_div(size, kShifts); }
  __host__ __device__ int64_t offsets() const { return int64_t{size} * size; }
  int64_t tiles() const { return int64_t{phases_y} * phases_x * tiles_y * tiles_x; }
};

// Maps (N, C, H, W) or scores (N, K, H, W) of any strides, in entries.
template <class S>
struct Strided {
  S* data;
  int64_t n, c, y, x;
};

// 4 x 32 pixels of one phase of the dilation, which is an image of its own.
struct Tile {
  int phase_y, phase_x, height, width;  // of the phase
  int y0, x0;
  int64_t n;

  __device__ Tile(const Window& window, int64_t number) {
    x0 = int(number % window.tiles_x) * kWarp;
    number /= window.tiles_x;
    y0 = int(number % window.tiles_y) * kRows;
    number /= window.tiles_y;
    phase_x = int(number % window.phases_x);
    number /= window.phases_x;
    phase_y = int(number % window.phases_y);
    n = number / window.phases_y;
    height = ceil_div(window.height - phase_y, window.dilation);
    width = ceil_div(window.width - phase_x, window.dilation);
  }
  __device__ bool empty() const { return y0 >= height || x0 >= width; }
  __device__ bool contains(int y, int x) const {
    return unsigned(y) < unsigned(height) && unsigned(x) < unsigned(width);
  }
  // The phase within a tensor: pixel (y, x) of it lies at first + y * strides.y + x * strides.x.
  template <class S>
  __device__ Strided<S> of(const Strided<S>& all, int dilation) const {
    return {all.data + n * all.n + phase_y * all.y + phase_x * all.x, all.n, all.c, all.y * dilation,
            all.x * dilation};
  }
};

// Starts to copy a number to shared memory, or zero.
template <class T>
__device__ __forceinline__ void stage(float* to, const T* base, int64_t offset, bool exists) {
  if constexpr (std::is_same_v<T, float>)
    copy_async<4>(to, exists ? base + offset : base, exists ? 4 : 0);
  else
    *to = exists ? to_float(base[offset]) : 0;
}

// ---- dot ----
constexpr int kChunk = 8;  // channels of a stage

struct DotStage {
  float b[kChunk][kStagedRows][kStagedColumns];
  float a[kChunk][kRows][kWarp];
};
struct DotSmem {
  DotStage stages[2];
};

template <class T>
__global__ __launch_bounds__(kThreads, 1) void dot_kernel(Strided<const T> a_maps, Strided<const T> b_maps,
                                                          int channels, Window window, float* out) {
  VISIT(tile, 1);
  DYNAMIC_SHARED(DotSmem, s);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int warps = int(blockDim.x) / kWarp, chunks = window.chunks();
  const int dx0 = int(blockIdx.x % unsigned(chunks)) * kShifts;
  const int dy0 = int(blockIdx.x / unsigned(chunks) % unsigned(chunks)) * kShifts;
  const Tile tile(window, int64_t{blockIdx.x} / chunks / chunks);
  if (tile.empty()) return;
  const auto a = tile.of(a_maps, window.dilation), b = tile.of(b_maps, window.dilation);
  const int top = tile.y0 + dy0 - window.reach, left = tile.x0 + dx0 - window.reach;

  const auto start = [&](int first) {
    DotStage& to = s.stages[first / kChunk % 2];
#pragma unroll 1
    for (int row = warp; row < kChunk * kStagedRows; row += warps) {
      VISIT(b_row, 1);
      const int c = row / kStagedRows, r = row % kStagedRows, y = top + r;
      const int64_t offset = (first + c) * b.c + y * b.y;
      for (int column = lane; column < kStagedColumns; column += kWarp) {
        VISIT_LOADS(b_copy, 1);
        const int x = left + column;
        stage(&to.b[c][r][column], b.data, offset + x * b.x, first + c < channels && tile.contains(y, x));
      }
    }
#pragma unroll 1
    for (int row = warp; row < kChunk * kRows; row += warps) {
      VISIT(a_copy, 1);
      const int c = row / kRows, r = row % kRows, y = tile.y0 + r, x = tile.x0 + lane;
      stage(&to.a[c][r][lane], a.data, (first + c) * a.c + y * a.y + x * a.x,
            first + c < channels && tile.contains(y, x));
    }
    copy_async_commit();
  };

  float sums[kRows][kShifts] = {};
  if (channels > 0) start(0);
  for (int first = 0; first < channels; first += kChunk) {
    VISIT(chunk, 1);
    copy_async_wait<0>();
    __syncthreads();
    if (first + kChunk < channels) start(first + kChunk);
    const DotStage& from = s.stages[first / kChunk % 2];
#pragma unroll 2
    for (int c = 0; c < kChunk; ++c) {
      VISIT(channel, 2);
      float own[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) own[i] = from.a[c][i][lane];
#pragma unroll
      for (int row = 0; row < kStagedRows; ++row) {
        const float other = from.b[c][row][lane + warp];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int j = row - i;
          if (j < 0 || j >= kShifts) continue;
          sums[i][j] = fmaf(own[i], other, sums[i][j]);
        }
      }
    }
  }

  const int x = tile.phase_x + (tile.x0 + lane) * window.dilation, dx = dx0 + warp;
  if (x >= window.width || dx >= window.size) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int y = tile.phase_y + (tile.y0 + i) * window.dilation;
    if (y >= window.height) break;
#pragma unroll
    for (int j = 0; j < kShifts; ++j) {
      if (dy0 + j >= window.size) break;
      const int64_t plane = tile.n * window.offsets() + int64_t{dy0 + j} * window.size + dx;
      out[(plane * window.height + y) * window.width + x] = sums[i][j];
    }
  }
}

// ---- weigh and spread ----
constexpr int kOwnChannels = 16;                                // of a thread
constexpr int kGroups = 2, kChannels = kGroups * kOwnChannels;  // of a block
constexpr int kSlots = kShifts / kGroups;                       // warps that share the offsets in x
constexpr int kOwnShifts = kShifts / kSlots;
static_assert(kSlots * kGroups * kWarp == kThreads && kOwnShifts * kSlots == kShifts);

struct WeighSmem {
  float maps[2][kChannels][kStagedColumns];
  float partial[kSlots * kGroups][kOwnChannels][kWarp];
};

// The weight of offset (i, j) at pixel (y, x): spread takes that of the offset's mirror image at the pixel
// that the offset leads to.
struct Weights {
  Strided<const float> scores;
  bool spread;

  struct InPhase {
    const float* first;
    int64_t i, j, y, x;
  };
  __device__ InPhase of(const Tile& tile, const Window& window) const {
    const auto phase = tile.of(scores, window.dilation);
    const int64_t row = window.size * phase.c, column = phase.c;
    if (!spread) return {phase.data, row, column, phase.y, phase.x};
    const int64_t corner = (window.offsets() - 1) * phase.c - window.reach * (phase.y + phase.x);
    return {phase.data + corner, phase.y - row, phase.x - column, phase.y, phase.x};
  }
};

template <class T>
__global__ __launch_bounds__(kThreads, 1) void weigh_kernel(Weights all_weights, Strided<const T> all_maps,
                                                            int channels, Window window, T* out) {
  DYNAMIC_SHARED(WeighSmem, s);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int group = warp % kGroups, slot = warp / kGroups;
  const int channel_blocks = ceil_div(channels, kChannels);
  const int channel0 = int(blockIdx.x % unsigned(channel_blocks)) * kChannels;
  const Tile tile(window, int64_t{blockIdx.x} / channel_blocks);
  if (tile.empty()) return;
  const auto maps = tile.of(all_maps, window.dilation);
  const auto weights = all_weights.of(tile, window);
  const int first_row = max(0, tile.y0 - window.reach);
  const int rows = min(tile.height, tile.y0 + kRows + window.reach) - first_row;
  const int steps = rows * window.chunks();

  // A step is a row of the maps and 16 offsets in x.
  const auto start = [&](int step) {
    const int y = first_row + step % rows, left = tile.x0 + step / rows * kShifts - window.reach;
#pragma unroll
    for (int c = warp; c < kChannels; c += kThreads / kWarp) {
      const int64_t offset = (channel0 + c) * maps.c + y * maps.y;
#pragma unroll
      for (int column = lane; column < kStagedColumns; column += kWarp) {
        VISIT_LOADS(map_copy, 1);
        const int x = left + column;
        stage(&s.maps[step % 2][c][column], maps.data, offset + x * maps.x,
              channel0 + c < channels && tile.contains(y, x));
      }
    }
    copy_async_commit();
  };
  const auto fetch = [&](int step, float (&to)[kOwnShifts][kRows]) {
    const int x = tile.x0 + lane, i0 = first_row + step % rows - tile.y0 + window.reach;
#pragma unroll
    for (int k = 0; k < kOwnShifts; ++k) {
      const int j = step / rows * kShifts + slot + k * kSlots;
      const bool exists = j < window.size && x < tile.width && tile.contains(tile.y0, x + j - window.reach);
      const int64_t at = i0 * weights.i + j * weights.j + tile.y0 * weights.y + x * weights.x;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool within = unsigned(i0 - i) < unsigned(window.size) && tile.y0 + i < tile.height;
        to[k][i] = exists && within ? weights.first[at + i * (weights.y - weights.i)] : 0;
      }
    }
  };

  float sums[kRows][kOwnChannels] = {};
  float next[kOwnShifts][kRows];
  start(0);
  fetch(0, next);
  for (int step = 0; step < steps; ++step) {
    VISIT(tile, 1);
    float now[kOwnShifts][kRows];
#pragma unroll
    for (int k = 0; k < kOwnShifts; ++k)
#pragma unroll
      for (int i = 0; i < kRows; ++i) now[k][i] = next[k][i];
    copy_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) {
      start(step + 1);
      fetch(step + 1, next);
    }
    const int i0 = first_row + step % rows - tile.y0 + window.reach;
#pragma unroll
    for (int k = 0; k < kOwnShifts; ++k) {
      const int shift = slot + k * kSlots;
      if (step / rows * kShifts + shift < window.size) {
        VISIT(shift, kOwnShifts);
        float own[kOwnChannels];
#pragma unroll
        for (int c = 0; c < kOwnChannels; ++c)
          own[c] = s.maps[step % 2][group * kOwnChannels + c][lane + shift];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          if (unsigned(i0 - i) < unsigned(window.size)) {
            VISIT(shifted_row, kOwnShifts * kRows);
#pragma unroll
            for (int c = 0; c < kOwnChannels; ++c) sums[i][c] = fmaf(now[k][i], own[c], sums[i][c]);
          }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kOwnChannels; ++c) s.partial[warp][c][lane] = sums[i][c];
    __syncthreads();
    const int y = tile.y0 + i, x = tile.x0 + lane;
    if (y >= tile.height) return;
#pragma unroll
    for (int c = warp; c < kChannels; c += kThreads / kWarp) {
      float sum = 0;
#pragma unroll
      for (int part = 0; part < kSlots; ++part)
        sum += s.partial[part * kGroups + c / kOwnChannels][c % kOwnChannels][lane];
      if (x >= tile.width || channel0 + c >= channels) continue;
      const int64_t row =
          ((tile.n * channels + channel0 + c) * window.height + tile.phase_y + int64_t{y} * window.dilation) *
          window.width;
      out[row + tile.phase_x + int64_t{x} * window.dilation] = from_float<T>(sum);
    }
  }
}

// ---- Hosts ----
int64_t offsets_of(int64_t reach, int64_t dilation) {
  STD_TORCH_CHECK(reach >= 0 && reach <= kMostReach && dilation >= 1, "reach must be from 0 to ",
                  std::to_string(kMostReach), " and dilation at least 1");
  return (2 * reach + 1) * (2 * reach + 1);
}

Window window_of(const Tensor& maps, int64_t reach, int64_t dilation) {
  const int64_t height = maps.size(2), width = maps.size(3);
  STD_TORCH_CHECK(height <= kMostPixels / 2 && width <= kMostPixels / 2 && maps.size(1) <= kMostPixels / 2,
                  "the maps are too large");
  // Of a longer dilation no step stays inside.
  const int steps = int(std::min(dilation, std::max(height, width)));
  const auto phases = [&](int64_t size) { return int(std::min<int64_t>(size, steps)); };
  const auto tiles = [&](int64_t size, int tile) { return ceil_div(ceil_div(int(size), steps), tile); };
  return {int(height),   int(width),           steps,
          int(reach),    int(2 * reach + 1),   phases(height),
          phases(width), tiles(height, kRows), tiles(width, kWarp)};
}

template <class T>
Strided<const T> read_from(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Tensor local_attention_dot(const Tensor& a, const Tensor& b, int64_t reach, int64_t dilation) {
  check_shape("a", a, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("b", b, {a.size(0), a.size(1), a.size(2), a.size(3)});
  check_dtype("b", b, a.scalar_type());
  const std::vector<int64_t> sizes{a.size(0), offsets_of(reach, dilation), a.size(2), a.size(3)};
  Tensor out = torch::stable::new_empty(a, sizes, ScalarType::Float);
  if (out.numel() == 0) return out;
  const Window window = window_of(a, reach, dilation);
  const DeviceScope device(a);
  const unsigned blocks = checked_blocks(a.size(0) * window.tiles() * window.chunks() * window.chunks());
  const int threads = std::min(window.size, kShifts) * kWarp;
  dispatch(a.scalar_type(), [&](auto sample) {
    using T = decltype(sample);
    LAUNCH(dot_kernel<T>, dim3(blocks), dim3(unsigned(threads)), sizeof(DotSmem), device.stream(),
           read_from<T>(a), read_from<T>(b), int(a.size(1)), window, out.mutable_data_ptr<float>());
  });
  return out;
}

template <bool kSpread>
Tensor local_attention_combine(const Tensor& weights, const Tensor& maps, int64_t reach, int64_t dilation) {
  check_shape("maps", maps, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("weights", weights, {maps.size(0), offsets_of(reach, dilation), maps.size(2), maps.size(3)});
  check_dtype("weights", weights, ScalarType::Float);
  Tensor out = torch::stable::new_empty(maps, maps.sizes());
  if (out.numel() == 0) return out;
  const Window window = window_of(maps, reach, dilation);
  const DeviceScope device(maps);
  const unsigned blocks =
      checked_blocks(maps.size(0) * window.tiles() * ceil_div(maps.size(1), int64_t{kChannels}));
  dispatch(maps.scalar_type(), [&](auto sample) {
    using T = decltype(sample);
    LAUNCH(weigh_kernel<T>, dim3(blocks), dim3(kThreads), sizeof(WeighSmem), device.stream(),
           Weights{read_from<float>(weights), kSpread}, read_from<T>(maps), int(maps.size(1)), window,
           static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("local_attention_dot", TORCH_BOX(&vosops::cuda::local_attention_dot));
  m.impl("local_attention_weigh", TORCH_BOX(&vosops::cuda::local_attention_combine<false>));
  m.impl("local_attention_spread", TORCH_BOX(&vosops::cuda::local_attention_combine<true>));
}
