// The line convolutions of a global convolution on the GPU: two of the same x side by side (split), or of two
// parts of x into one output (merge), as an implicit matrix product: output channels times pixels, over
// channels and taps.
//
// A block owns 128 output channels and a rectangle of at most 224 pixels: of split 64 channels of each
// convolution, so that x is read once for both. It walks the channels 64 bytes at a time: the rectangle with
// its halo lies in shared memory (channels innermost, two buffers) for all taps, a tap is another row of it
// for the same product. The weights of a tap (128 x 64 bytes) pass through four stages of cp.async; both are
// zero where nothing is; a thread copies the same vector of every 64th row, from addresses that it keeps.
// Products by mma (a warp: 64 channels x 56 pixels), or by FMA for float32 in IEEE arithmetic (a thread: 8 x
// 14), 112 sums a thread. For 4096 channels of 15 x 27 pixels, k = 7, 2 x 256 outputs, bf16: 4 x 2 tiles x 16
// shares of the channels on 132 multiprocessors; a stage brings 8 KB of weights and a seventh of 25 KB of x
// for 0.9 M multiply-adds, 720 cycles at the rate of mma.sync: 16 bytes a cycle, as the second-level cache
// gives to all at once. The weights (29 MB) are read from memory once, 10 us; weights with channels innermost
// (channels_last) are read in place.
#include <tuple>

#include "global_conv.cuh"

namespace vosops::cuda {
namespace {

constexpr int kThreads = kTileThreads, kWarpsRows = 2, kWarpsPixels = 4;
constexpr int kTileRows = 128, kHalfRows = kTileRows / kWarpsRows;  // output channels
constexpr int kTilePixels = 224, kWarpPixels = kTilePixels / kWarpsPixels;
constexpr int kOwnRows = 8, kOwnPixels = 14;  // of a thread's sums
constexpr int kStages = 4;
constexpr int kLeastTaps = kStages - 1;  // so that a stage never fills a buffer of x that is still read
constexpr int kPixelsOfMatrix =
    8;  // rows of ldmatrix; the halo's width is a multiple, against bank conflicts
static_assert(kOwnRows * kOwnPixels * kThreads == kTileRows * kTilePixels);

// A weight as rows of channels.
template <class E>
struct LineRows {
  const E* data;
  int64_t row_stride, tap_stride;
  int rows, channels, taps;
  bool vertical;
};

// The rectangle of pixels that a block owns, and how it lies in shared memory with its halo.
struct Rectangle {
  int height, width, halo_y, halo_x, pitch;

  __host__ __device__ int rows() const { return (height + 2 * halo_y) * pitch; }
  __device__ int row_of(int pixel) const { return (pixel / width + halo_y) * pitch + pixel % width + halo_x; }
};

template <class E>
struct Problem {
  PixelRows<E> x[2];  // what each line reads; of split the same
  LineRows<E> lines[2];
  bool merge;
  int height, width;
  Rectangle rectangle;
  int tiles_y, tiles_x, row_tiles, taps;
  int chunks[2];  // of the channels: split walks the first only, merge both
  Sums<E> sums;
};

// ---- A stage's products ----
template <class T, Arithmetic kArithmetic, int kSteps>
struct ByTensorCores {
  using Element = T;
  static constexpr int kChunkSteps = kSteps;
  static constexpr int kTilesRows = kOwnRows / 2, kTilesPixels = kOwnPixels / 2;  // of 16 and of 8
  static constexpr int kPairs = (kTilesPixels + 1) / 2;
  using Rows = unsigned char[kRowPitch<kSteps>];
  float c[kTilesRows][kTilesPixels][4] = {};
  int x_row[kPairs];  // in the rectangle: of the matrices that this lane names

  static __device__ __forceinline__ int warp() { return int(threadIdx.x) / kWarp; }
  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int half() { return warp() / kWarpsPixels; }
  static __device__ __forceinline__ int row(int i) {
    return half() * kHalfRows + i / 2 * 16 + i % 2 * 8 + lane() / 4;
  }
  static __device__ __forceinline__ int pixel(int j) {
    return warp() % kWarpsPixels * kWarpPixels + j / 2 * 8 + lane() % 4 * 2 + j % 2;
  }
  __device__ __forceinline__ float sum(int i, int j) const { return c[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  __device__ __forceinline__ explicit ByTensorCores(const int (&row_of_pixel)[kTilePixels]) {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const bool second = 2 * pair + 1 < kTilesPixels && lane() >= 16;
      x_row[pair] =
          row_of_pixel[warp() % kWarpsPixels * kWarpPixels + 16 * pair + lane() % 8 + (second ? 8 : 0)];
    }
  }

  __device__ __forceinline__ void add(const Rows* weights, const Rows* x, int shift) {
#pragma unroll(kArithmetic == Arithmetic::kSplit ? 1 : kSteps)
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[kTilesRows][4], a_low[kTilesRows][4] = {};
#pragma unroll
      for (int m = 0; m < kTilesRows; ++m) {
        load_matrices<4>(
            a[m], weights[half() * kHalfRows + 16 * m + lane() % 16] + k * kStepBytes + lane() / 16 * 16);
        prepare<T, kArithmetic>(a[m], a_low[m]);
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const unsigned char* from = x[x_row[pair] + shift] + k * kStepBytes + lane() / 8 % 2 * 16;
        const bool both = 2 * pair + 1 < kTilesPixels;
        uint32_t loaded[4];
        load_tiles(loaded, from, both);
#pragma unroll
        for (int j = 0; j < (both ? 2 : 1); ++j) {
          uint32_t b[2] = {loaded[2 * j], loaded[2 * j + 1]}, b_low[2] = {};
          prepare<T, kArithmetic>(b, b_low);
#pragma unroll
          for (int m = 0; m < kTilesRows; ++m)
            step<T, kArithmetic>(c[m][2 * pair + j], a[m], a_low[m], b, b_low);
        }
      }
    }
  }
};

template <int kSteps>
struct ByFma {
  using Element = float;
  static constexpr int kChunkSteps = kSteps;
  static constexpr int kSide = 16, kVectors = kSteps * kStepBytes / kVectorBytes;
  using Rows = unsigned char[kRowPitch<kSteps>];
  float c[kOwnRows][kOwnPixels] = {};
  int x_row[kOwnPixels];

  static __device__ __forceinline__ int half() { return int(threadIdx.x) / (kThreads / kWarpsRows); }
  static __device__ __forceinline__ int row(int i) {
    return half() * kHalfRows + 8 * i + int(threadIdx.x) / kSide % 8;
  }
  static __device__ __forceinline__ int pixel(int j) { return kSide * j + int(threadIdx.x) % kSide; }
  __device__ __forceinline__ float sum(int i, int j) const { return c[i][j]; }

  __device__ __forceinline__ explicit ByFma(const int (&row_of_pixel)[kTilePixels]) {
#pragma unroll
    for (int j = 0; j < kOwnPixels; ++j) x_row[j] = row_of_pixel[pixel(j)];
  }

  __device__ __forceinline__ void add(const Rows* weights, const Rows* x, int shift) {
#pragma unroll 1
    for (int v = 0; v < kVectors; ++v) {
      float4 w[kOwnRows];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) w[i] = reinterpret_cast<const float4*>(weights[row(i)])[v];
#pragma unroll
      for (int j = 0; j < kOwnPixels; ++j) {
        const float4 value = reinterpret_cast<const float4*>(x[x_row[j] + shift])[v];
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
          c[i][j] = fmaf(w[i].w, value.w,
                         fmaf(w[i].z, value.z, fmaf(w[i].y, value.y, fmaf(w[i].x, value.x, c[i][j]))));
      }
    }
  }
};

// ---- The kernel ----
template <class Products>
struct Smem {
  alignas(16) unsigned char weights[kStages][kTileRows][kRowPitch<Products::kChunkSteps>];
  int row_of_pixel[kTilePixels];
  // Behind it: two buffers of x, rectangle.rows() rows each, and the pixels that those are. At the end sums
  // lie over all of it.
};

// Where a row of x is copied from: bytes from its image on, or
constexpr int64_t kNothing = -1, kUnused = -2;  // zeros; a row that serves no tap

constexpr int kSumPitch = kTilePixels + 1;
// The sums of half of the rows, and behind them where in the map each pixel is.
struct SumSmem {
  float sums[kHalfRows * kSumPitch];
  int place[kTilePixels];  // -1 outside of the map
};

template <class Products>
__global__ __launch_bounds__(kThreads, 1) void kernel(Problem<typename Products::Element> in) {
  using E = typename Products::Element;
  using Shared = Smem<Products>;
  using Rows = typename Products::Rows;
  constexpr int kVectors = Products::kChunkSteps * kStepBytes / kVectorBytes, kPitch = sizeof(Rows);
  DYNAMIC_SHARED(Shared, s);
  auto* buffers = reinterpret_cast<Rows*>(&s + 1);
  const int thread = int(threadIdx.x);
  const Rectangle& rectangle = in.rectangle;
  auto* places = reinterpret_cast<int64_t*>(buffers + 2 * rectangle.rows());
  const SharedAddress shared = shared_base(&s);

  int64_t block = blockIdx.x;
  const int share = int(block % in.sums.shares);
  block /= in.sums.shares;
  const int row_tile = int(block % in.row_tiles);
  block /= in.row_tiles;
  const int first_x = int(block % in.tiles_x) * rectangle.width;
  block /= in.tiles_x;
  const int first_y = int(block % in.tiles_y) * rectangle.height;
  const int64_t n = block / in.tiles_y;
  const int chunks = in.chunks[0] + in.chunks[1];
  const int begin = int(int64_t{chunks} * share / in.sums.shares);
  const int end = int(int64_t{chunks} * (share + 1) / in.sums.shares);

  for (int i = thread; i < kTilePixels; i += kThreads)
    s.row_of_pixel[i] = rectangle.row_of(i < rectangle.height * rectangle.width ? i : 0);
  const auto find_places = [&](const PixelRows<E>& x) {
#pragma unroll 1
    for (int row = thread; row < rectangle.rows(); row += kThreads) {
      VISIT(place, 1);
      const int dy = row / rectangle.pitch - rectangle.halo_y, dx = row % rectangle.pitch - rectangle.halo_x;
      const int y = first_y + dy, column = first_x + dx;
      const bool inside = y >= 0 && y < in.height && column >= 0 && column < in.width;
      // The corners of the halo serve no tap, nor does what is beyond it.
      const bool corner = (dy < 0 || dy >= rectangle.height) && (dx < 0 || dx >= rectangle.width);
      const bool unused = corner || dx >= rectangle.width + rectangle.halo_x;
      const int64_t place = (y * x.y_stride + column * x.x_stride) * int64_t{sizeof(E)};
      places[row] = unused ? kUnused : inside ? place : kNothing;
    }
  };
  // The line of a row of the weights' tile in a chunk, and the output channel of that line.
  const auto line_of = [&](int row, int chunk) {
    return in.merge ? chunk >= in.chunks[0] : row >= kHalfRows;
  };
  const auto channel_of = [&](int row) {
    return in.merge ? row_tile * kTileRows + row : row_tile * kHalfRows + row % kHalfRows;
  };
  // This thread copies the same vector of every kRowsAtOnce-th row, of weights and of x.
  constexpr int kRowsAtOnce = kThreads / kVectors, kOwn = kTileRows / kRowsAtOnce;
  static_assert(kHalfRows % kRowsAtOnce == 0 || kRowsAtOnce == kTileRows);
  const int own_row = thread / kVectors, own_vector = thread % kVectors;
  const SharedAddress weight_to = shared + own_row * kPitch + own_vector * kVectorBytes;
  const SharedAddress x_to = shared + int(sizeof(Shared)) + own_row * kPitch + own_vector * kVectorBytes;
  const unsigned char* weight_from[kOwn];
  int64_t tap_bytes[kOwn];
  int weight_taps[kOwn];  // of which there is something to copy
  int bytes_left = 0;     // of a row of channels, from this thread's vector on

  // Whether every row of the tile has a channel and every tap, so that only the chunk's length matters.
  const bool whole_tile = channel_of(kTileRows - 1) < in.lines[0].rows &&
                          channel_of(kTileRows - 1) < in.lines[1].rows && in.lines[0].taps == in.taps &&
                          in.lines[1].taps == in.taps;
  bool whole = false;
  int ahead_chunk = begin, ahead_tap = 0, ahead_part = -1;
  const auto stage = [&](int number) {
    if (ahead_chunk < end) {
      if (ahead_tap == 0) {
        VISIT(x_chunk_copy, 1);
        const int part = in.merge && ahead_chunk >= in.chunks[0];
        const PixelRows<E>& x = in.x[part];
        if (part != ahead_part) {
          VISIT(part, 1);
          __syncthreads();  // everyone is done with the places of the other part
          find_places(x);
          __syncthreads();
          ahead_part = part;
        }
        const int64_t chunk_at = int64_t{ahead_chunk - (part ? in.chunks[0] : 0)} * kVectors * kVectorBytes;
        const int64_t at = chunk_at + own_vector * kVectorBytes, row_bytes = x.channels * int64_t{sizeof(E)};
        whole = whole_tile && chunk_at + kVectors * kVectorBytes <= row_bytes;
        bytes_left = int(max(int64_t{0}, min(row_bytes - at, int64_t{kVectorBytes})));
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int row = own_row + i * kRowsAtOnce, channel = channel_of(row);
          const LineRows<E>& line = in.lines[line_of(row, ahead_chunk)];
          const bool inside = channel < line.rows && bytes_left > 0;
          weight_taps[i] = inside ? line.taps : 0;
          tap_bytes[i] = line.tap_stride * int64_t{sizeof(E)};
          weight_from[i] = reinterpret_cast<const unsigned char*>(line.data) +
                           (inside ? channel * line.row_stride * int64_t{sizeof(E)} + at : 0);
        }
        const auto* image = kept(reinterpret_cast<const unsigned char*>(x.data + n * x.batch_stride) +
                                 (bytes_left > 0 ? at : 0));
        SharedAddress to = x_to + (ahead_chunk - begin) % 2 * rectangle.rows() * kPitch;
#pragma unroll 1
        for (const int64_t* place = places + own_row; place < places + rectangle.rows();
             place += kRowsAtOnce) {
          VISIT(x_copy, 1);
          if (*place >= 0)
            copy_async_partly(to, image + *place, bytes_left);
          else if (*place == kNothing)
            copy_async_partly(to, image, 0);
          to = to + kRowsAtOnce * kPitch;
        }
      }
      const SharedAddress stage_to = weight_to + number % kStages * kTileRows * kPitch;
      if (whole) {
        VISIT(weight_copy, 1);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          copy_async_whole(stage_to + i * kRowsAtOnce * kPitch, weight_from[i]);
          weight_from[i] += tap_bytes[i];
        }
      } else {
        VISIT(uneven, 1);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          copy_async_partly(stage_to + i * kRowsAtOnce * kPitch, weight_from[i],
                            ahead_tap < weight_taps[i] ? bytes_left : 0);
          if (ahead_tap + 1 < weight_taps[i]) weight_from[i] += tap_bytes[i];
        }
      }
      if (++ahead_tap == in.taps) {
        ahead_tap = 0;
        ++ahead_chunk;
      }
    }
    copy_async_commit();
  };

  __syncthreads();  // row_of_pixel
  for (int number = 0; number < kStages - 1; ++number) stage(number);
  Products products(s.row_of_pixel);
  for (int chunk = begin, number = 0; chunk < end; ++chunk) {
    VISIT(chunk, 1);
    const LineRows<E>& line = in.lines[line_of(Products::half() * kHalfRows, chunk)];
    const int half = line.taps / 2, tap_rows = line.vertical ? rectangle.pitch : 1;
    const Rows* x = buffers + (chunk - begin) % 2 * rectangle.rows();
    for (int tap = 0; tap < in.taps; ++tap, ++number) {
      VISIT(tile, 1);
      copy_async_wait<kStages - 2>();
      __syncthreads();
      stage(number + kStages - 1);
      products.add(s.weights[number % kStages], x, tap < line.taps ? (tap - half) * tap_rows : 0);
    }
  }
  copy_async_wait<0>();

  // Sums go through shared memory, half of the rows at a time.
  auto& written = reinterpret_cast<SumSmem&>(s);
  float* sums = written.sums;
  const int pixels = rectangle.height * rectangle.width;
  __syncthreads();
  for (int pixel = thread; pixel < pixels; pixel += kThreads) {
    const int y = first_y + pixel / rectangle.width, column = first_x + pixel % rectangle.width;
    written.place[pixel] = y < in.height && column < in.width ? y * in.width + column : -1;
  }
  for (int half = 0; half < kWarpsRows; ++half) {
    __syncthreads();
    if (Products::half() == half)
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
        for (int j = 0; j < kOwnPixels; ++j)
          sums[(Products::row(i) - half * kHalfRows) * kSumPitch + Products::pixel(j)] = products.sum(i, j);
    __syncthreads();
    const int line = in.merge ? 0 : half;
    // Neighbouring threads write neighbouring addresses: rows of one pixel, or pixels of one row.
    const bool rows_innermost = in.sums.layout.channel_stride == 1;
    const int row_step = rows_innermost ? 0 : kThreads / kWarp;
    const int pixel_step = rows_innermost ? kThreads / kHalfRows : 0;
    for (int first = rows_innermost ? 0 : thread % kWarp; first < (rows_innermost ? 1 : pixels);
         first += kWarp) {
      int row = rows_innermost ? thread % kHalfRows : thread / kWarp;
      int pixel = rows_innermost ? thread / kHalfRows : first;
#pragma unroll 1
      for (; row < kHalfRows && pixel < pixels; row += row_step, pixel += pixel_step) {
        VISIT(sum_store, kWarpsRows);
        const int channel = channel_of(half * kHalfRows + row), place = written.place[pixel];
        if (channel >= in.lines[line].rows) break;
        if (place >= 0)
          in.sums.put(share, n, channel + (line ? in.lines[0].rows : 0), place,
                      sums[row * kSumPitch + pixel]);
      }
    }
  }
}

// ---- Weights as rows of channels ----
constexpr int kPackedChannels = 256;

// A block copies the taps of 256 channels of one output channel.
template <class E>
__global__ __launch_bounds__(kThreads) void weight_kernel(const E* weight, int64_t row_stride,
                                                          int64_t channel_stride, int64_t tap_stride,
                                                          int channels, int taps, int row_channels, E* out) {
  const int tiles = ceil_div(row_channels, kPackedChannels);
  const int64_t row = blockIdx.x / tiles;
  const int first = int(blockIdx.x % tiles) * kPackedChannels;
  for (int i = int(threadIdx.x); i < kPackedChannels * taps; i += kThreads) {
    const int channel = first + i % kPackedChannels, tap = i / kPackedChannels;
    if (channel >= row_channels) continue;
    const E zero = from_float<E>(0);
    out[(row * taps + tap) * row_channels + channel] =
        channel < channels ? weight[row * row_stride + channel * channel_stride + tap * tap_stride] : zero;
  }
}

template <class E>
LineRows<E> line_rows(const Tensor& weight, const LineShape& shape, Stream stream, Tensor& memory) {
  const int64_t tap_stride = shape.taps == 1 ? 0 : weight.stride(shape.vertical ? 2 : 3);
  LineRows<E> line{static_cast<const E*>(weight.const_data_ptr()),
                   weight.stride(0),
                   tap_stride,
                   shape.rows,
                   shape.channels,
                   shape.taps,
                   shape.vertical};
  memory = weight;
  if (divides_rows(weight, {0, 2, 3})) return line;
  const int row_channels = row_columns_of(shape.channels);
  memory = torch::stable::new_empty(weight, std::vector<int64_t>{shape.rows, shape.taps, row_channels});
  LAUNCH(weight_kernel<E>,
         dim3(checked_blocks(int64_t{shape.rows} * ceil_div(row_channels, kPackedChannels))), dim3(kThreads),
         0, stream, line.data, line.row_stride, weight.stride(1), tap_stride, shape.channels, shape.taps,
         row_channels, static_cast<E*>(memory.mutable_data_ptr()));
  line.data = static_cast<const E*>(memory.const_data_ptr());
  line.row_stride = int64_t{shape.taps} * row_channels;
  line.tap_stride = row_channels;
  return line;
}

// ---- Hosts ----
// The rectangle of which the fewest cover the map, and of those the one with the least halo; width 0 if none
// fits.
Rectangle choose_rectangle(int height, int width, int halo_y, int halo_x, int most_rows) {
  Rectangle best{};
  int64_t least_tiles = 0;
  for (int tall = 1; tall <= std::min(height, kTilePixels); ++tall) {
    const int rows = ceil_div(height, tall), wide = std::min(width, kTilePixels / tall);
    const int columns = ceil_div(width, wide);
    Rectangle now{ceil_div(height, rows), ceil_div(width, columns), halo_y, halo_x, 0};
    now.pitch = now.width + ceil_div(2 * halo_x, kPixelsOfMatrix) * kPixelsOfMatrix;
    const int64_t tiles = int64_t{rows} * columns;
    if (now.rows() > most_rows) continue;
    if (best.width == 0 || tiles < least_tiles || (tiles == least_tiles && now.rows() < best.rows())) {
      best = now;
      least_tiles = tiles;
    }
  }
  return best;
}

// The rectangle for blocks whose stages are as these products want them.
template <class Products, class E>
Rectangle rectangle_for(const Problem<E>& in) {
  const size_t limit = device_limits().shared_bytes;
  if (limit < sizeof(Smem<Products>)) return {};
  int halo_y = 0, halo_x = 0;
  for (const auto& line : in.lines) {
    int& halo = line.vertical ? halo_y : halo_x;
    halo = std::max(halo, line.taps / 2);
  }
  const int most_rows =
      int((limit - sizeof(Smem<Products>)) / (2 * kRowPitch<Products::kChunkSteps> + sizeof(int64_t)));
  return choose_rectangle(in.height, in.width, halo_y, halo_x, most_rows);
}

template <class Products>
void launch(Problem<typename Products::Element> in, const Rectangle& rectangle, const Tensor& out,
            Stream stream) {
  constexpr int kPitch = kRowPitch<Products::kChunkSteps>;
  constexpr int kChannels = Products::kChunkSteps * kStepBytes / int(sizeof(typename Products::Element));
  in.rectangle = rectangle;
  in.tiles_y = ceil_div(in.height, rectangle.height);
  in.tiles_x = ceil_div(in.width, rectangle.width);
  in.taps = std::max({kLeastTaps, in.lines[0].taps, in.lines[1].taps});
  in.chunks[0] = ceil_div(in.lines[0].channels, kChannels);
  in.chunks[1] = in.merge ? ceil_div(in.lines[1].channels, kChannels) : 0;
  in.row_tiles = in.merge ? ceil_div(in.lines[0].rows, kTileRows)
                          : ceil_div(std::max(in.lines[0].rows, in.lines[1].rows), kHalfRows);
  const int64_t blocks = in.sums.batch * in.tiles_y * in.tiles_x * in.row_tiles;
  const int chunks = in.chunks[0] + in.chunks[1];
  constexpr double kProductsPerCycle = 1200;  // of mma.sync with 16 bits, on a multiprocessor
  const double cycles_of_chunk = double(in.taps) * kTileRows * kTilePixels * kChannels / kProductsPerCycle;
  const double steps_of_sums = cycles_of_sums(in.sums.count()) / cycles_of_chunk;
  const size_t bytes = std::max(
      sizeof(Smem<Products>) + size_t(rectangle.rows()) * (2 * kPitch + sizeof(int64_t)), sizeof(SumSmem));
  sum_over_shares(out, in.sums, choose_shares(blocks, chunks, steps_of_sums), stream, [&](const auto& sums) {
    in.sums = sums;
    LAUNCH(kernel<Products>, dim3(checked_blocks(blocks * sums.shares)), dim3(kThreads), bytes, stream, in);
  });
}

// By stages of 64 bytes of channels, or of 32 where only then rectangles can be large.
template <template <int> class Products, class E>
void launch_best(const Problem<E>& in, const Tensor& out, Stream stream) {
  const Rectangle wide = rectangle_for<Products<2>>(in), narrow = rectangle_for<Products<1>>(in);
  STD_TORCH_CHECK(narrow.width > 0, "the kernel is too long for the device's shared memory");
  if (wide.height * wide.width >= narrow.height * narrow.width)
    launch<Products<2>>(in, wide, out, stream);
  else
    launch<Products<1>>(in, narrow, out, stream);
}

template <int kSteps>
using ByTf32 = ByTensorCores<float, Arithmetic::kPlain, kSteps>;
template <int kSteps>
using BySplitTf32 = ByTensorCores<float, Arithmetic::kSplit, kSteps>;
template <int kSteps>
using ByHalf = ByTensorCores<half, Arithmetic::kPlain, kSteps>;
template <int kSteps>
using ByBfloat16 = ByTensorCores<bfloat16, Arithmetic::kPlain, kSteps>;

template <class E>
void launch_by(const Problem<E>& in, Precision precision, const Tensor& out, Stream stream) {
  if constexpr (std::is_same_v<E, half>)
    launch_best<ByHalf>(in, out, stream);
  else if constexpr (std::is_same_v<E, bfloat16>)
    launch_best<ByBfloat16>(in, out, stream);
  else if (precision == Precision::kIeee)
    launch_best<ByFma>(in, out, stream);
  else if (precision == Precision::kTf32)
    launch_best<ByTf32>(in, out, stream);
  else
    launch_best<BySplitTf32>(in, out, stream);
}

using MaybeTensor = std::optional<Tensor>;

// A bias as the kernels read it; `memory` keeps it.
template <class E>
const E* bias_of(const char* name, const MaybeTensor& bias, int channels, Tensor& memory) {
  if (!bias) return nullptr;
  check_shape(name, *bias, {channels});
  check_dtype(name, *bias, kScalarType<E>);
  memory = torch::stable::contiguous(*bias);
  return static_cast<const E*>(memory.const_data_ptr());
}

struct Operands {
  const Tensor &x, &first, &second;
  const MaybeTensor &first_bias, &second_bias, &addend;
  bool merge;
};

Tensor convolve(const Operands& given, std::string_view precision_name) {
  const Tensor& x = given.x;
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3), all = x.size(1);
  const int64_t first_channels = given.merge ? given.first.size(1) : all;
  STD_TORCH_CHECK(first_channels <= all, "first must have at most as many channels as x");
  const LineShape shapes[2] = {
      line_shape("first", given.first, x, first_channels),
      line_shape("second", given.second, x, given.merge ? all - first_channels : all),
  };
  if (given.merge) check_shape("second", given.second, {shapes[0].rows, kAnySize, kAnySize, kAnySize});
  STD_TORCH_CHECK(height <= kMostPixels / 4 / std::max<int64_t>(width, 1), "x has too many pixels");
  const Precision precision = parse_precision(precision_name);
  const int channels = given.merge ? shapes[0].rows : shapes[0].rows + shapes[1].rows;
  Tensor out = empty_map_like(x, channels);
  if (out.numel() == 0) return out;

  const DeviceScope device(x);
  const Stream stream = device.stream();
  dispatch(x.scalar_type(), [&](auto sample) {
    using E = decltype(sample);
    Tensor kept[7];
    Problem<E> in{};
    Tensor parts[2] = {x, x};
    if (given.merge) {
      parts[0] = torch::stable::narrow(parts[0], 1, 0, first_channels);
      parts[1] = torch::stable::narrow(parts[1], 1, first_channels, all - first_channels);
    }
    in.x[0] = pixel_rows<E>(parts[0], stream, kept[0]);
    in.x[1] = given.merge ? pixel_rows<E>(parts[1], stream, kept[1]) : in.x[0];
    in.lines[0] = line_rows<E>(given.first, shapes[0], stream, kept[2]);
    in.lines[1] = line_rows<E>(given.second, shapes[1], stream, kept[3]);
    in.merge = given.merge;
    in.height = int(height);
    in.width = int(width);
    in.sums = sums_into<E>(out);
    Addends<E>& addends = in.sums.addends;
    addends.first_channels = given.merge ? channels : shapes[0].rows;
    addends.first_bias =
        bias_of<E>(given.merge ? "bias" : "first_bias", given.first_bias, addends.first_channels, kept[4]);
    addends.second_bias = bias_of<E>("second_bias", given.second_bias, shapes[1].rows, kept[5]);
    if (given.addend) {
      check_shape("addend", *given.addend, {given.addend->size(0) == 1 ? 1 : batch, channels, height, width});
      check_dtype("addend", *given.addend, x.scalar_type());
      kept[6] = torch::stable::contiguous(*given.addend);
      addends.map = static_cast<const E*>(kept[6].const_data_ptr());
      addends.map_layout = {given.addend->size(0) == 1 ? 0 : channels * height * width, height * width, 1};
    }
    launch_by(in, precision, out, stream);
  });
  return out;
}

Tensor global_conv_split(const Tensor& x, const Tensor& first, const Tensor& second,
                         const MaybeTensor& first_bias, const MaybeTensor& second_bias,
                         const MaybeTensor& addend, std::string_view precision) {
  return convolve({x, first, second, first_bias, second_bias, addend, false}, precision);
}

Tensor global_conv_merge(const Tensor& x, const Tensor& first, const Tensor& second, const MaybeTensor& bias,
                         std::string_view precision) {
  return convolve({x, first, second, bias, {}, {}, true}, precision);
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("global_conv_split", TORCH_BOX(&vosops::cuda::global_conv_split));
  m.impl("global_conv_merge", TORCH_BOX(&vosops::cuda::global_conv_merge));
}
