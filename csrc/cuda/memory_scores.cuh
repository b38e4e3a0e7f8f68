// The scores of a memory read (common/score_inputs.h), shared by its kernels.
//
// Keys and queries become rows of contiguous channels first (zeros behind the last): a copy of both, a fifth
// of the values' bytes or less, after which products are of rows with rows and know no strides. Products of
// 16-bit rows are exact in mma; rows of float32 are multiplied by FMA, as TF32, or split into two TF32
// numbers, as a half-precision key needs that meets a float32 query (an anisotropic similarity cancels:
// float32 accuracy is needed).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/score_inputs.h"
#include "rows.cuh"
#include "tensor_core.cuh"

namespace vosops::cuda {

constexpr float kLog2E = 1.44269504f;

inline void check_scores(const ScoreInputs& in) {
  STD_TORCH_CHECK(is_16_bit(in.key.scalar_type()) || in.key.scalar_type() == ScalarType::Float,
                  "the CUDA kernels take float32, float16 and bfloat16 only");
  check_scores(in, ScalarType::Float);
  STD_TORCH_CHECK(in.queries() <= kMostPixels && in.memory() <= kMostPixels,
                  "a batch element is limited to 2^31 - 1 queries and positions");
}

// ---- Which positions are read ----
// A batch element's memory from the first to behind the last position whose bias is not minus infinity: what
// lies outside has no weight, and is not read. (A range whose end is not behind its begin is empty.)
struct Span {
  int64_t begin, end;
};

constexpr int kSpanThreads = 256, kSpanOwn = 16;  // positions of a thread that are looked at together

struct SpanSmem {
  unsigned first[kSpanThreads / kWarp];
};

// A block finds the range of one batch element, from both ends: of a memory without gaps it reads twice
// kSpanThreads * kSpanOwn biases.
template <class B>
__global__ __launch_bounds__(kSpanThreads) void span_kernel(const B* key_bias, int64_t memory, int* spans) {
  DYNAMIC_SHARED(SpanSmem, s);
  const int thread = int(threadIdx.x);
  key_bias += blockIdx.x * memory;
  // How many positions there are before the first that is read, or behind the last.
  const auto outside = [&](bool behind) {
    for (int64_t start = 0; start < memory; start += kSpanThreads * kSpanOwn) {
      unsigned first = ~0u;
#pragma unroll
      for (int i = kSpanOwn - 1; i >= 0; --i) {
        const int64_t at = start + i * kSpanThreads + thread;
        if (at < memory && key_bias[behind ? memory - 1 - at : at] != -INFINITY)
          first = unsigned(i * kSpanThreads + thread);
      }
      if (!__syncthreads_or(first != ~0u)) continue;
      first = __reduce_min_sync(kAllLanes, first);
      if (thread % kWarp == 0) s.first[thread / kWarp] = first;
      __syncthreads();
      for (const unsigned of_warp : s.first) first = min(first, of_warp);
      return start + first;
    }
    return memory;
  };
  const int64_t before = outside(false), behind = outside(true);
  if (thread != 0) return;
  spans[2 * blockIdx.x] = int(before);
  spans[2 * blockIdx.x + 1] = int(memory - behind);
}

// ---- Score operands ----
// Pointers to what scores are made of; a vector that is absent is null.
template <class E>
struct Scores {
  const E *query, *key;            // rows
  int64_t query_batch, key_batch;  // elements from one batch element to the next; 0 if all are the same
  int row_columns;
  const float *query_bias, *shrinkage, *key_bias;
  const int* spans;  // [N][2], or null: all is read
  int64_t queries, memory;
  float scale;

  __device__ const E* queries_of(int64_t n) const { return query + n * query_batch; }
  __device__ const E* keys_of(int64_t n) const { return key + n * key_batch; }
  __device__ float bias_of(int64_t n, int64_t p) const {
    return query_bias ? query_bias[n * queries + p] : 0.f;
  }
  __device__ float shrinkage_of(int64_t n, int64_t m) const {
    return shrinkage ? shrinkage[n * memory + m] : 1.f;
  }
  __device__ float shift_of(int64_t n, int64_t m) const { return key_bias ? key_bias[n * memory + m] : 0.f; }
  // Whether a position may be read: what it holds otherwise counts for nothing.
  __device__ bool reads(int64_t n, int64_t m) const { return shift_of(n, m) != -INFINITY; }
  __device__ Span span_of(int64_t n) const {
    return spans ? Span{spans[2 * n], spans[2 * n + 1]} : Span{0, memory};
  }
};

// The memory behind Scores.
struct ScoreMemory {
  Tensor query, key, spans;
  std::optional<Tensor> query_bias, shrinkage, key_bias;
};

template <class E>
Scores<E> pack_scores(const ScoreInputs& in, Stream stream, ScoreMemory& memory) {
  const auto vector = [](const std::optional<Tensor>& given, std::optional<Tensor>& kept) -> const float* {
    if (!given) return nullptr;
    kept = torch::stable::contiguous(*given);
    return kept->const_data_ptr<float>();
  };
  memory.query = rows_of<E>(without_repeats(in.query), 2, 1, false, stream);
  memory.key = rows_of<E>(without_repeats(in.key), 2, 1, in.squares(), stream);
  const auto batch_elements = [](const Tensor& rows) {
    return rows.size(0) == 1 ? int64_t{0} : rows.size(1) * rows.size(2);
  };
  const float* key_bias = vector(in.key_bias, memory.key_bias);
  int* spans = nullptr;
  if (key_bias) {
    memory.spans = torch::stable::new_empty(in.key, std::vector<int64_t>{in.batch(), 2}, ScalarType::Int);
    spans = memory.spans.mutable_data_ptr<int>();
    LAUNCH(span_kernel<float>, dim3(checked_blocks(in.batch())), dim3(kSpanThreads), sizeof(SpanSmem), stream,
           key_bias, in.memory(), spans);
  }
  return {static_cast<const E*>(memory.query.const_data_ptr()),
          static_cast<const E*>(memory.key.const_data_ptr()),
          batch_elements(memory.query),
          batch_elements(memory.key),
          int(memory.query.size(2)),
          vector(in.query_bias, memory.query_bias),
          vector(in.shrinkage, memory.shrinkage),
          key_bias,
          spans,
          in.queries(),
          in.memory(),
          float(in.scale)};
}

// ---- Tiles: 64 rows times 128 rows by a block of 256 threads, each with 4 x 8 of the products ----
constexpr int kTileA = 64, kTileB = 128;
constexpr int kOwnA = 4, kOwnB = 8;       // of a thread
constexpr int kSharers = kTileA / kOwnA;  // threads that share a row of B

// Rows of one batch element. Those beyond `count` are read as the last.
template <class E>
struct RowSpan {
  const E* rows;
  int64_t first, count;
};

template <class E, int kStages, int kChunkVectors, int kPitch>
struct StagedRows {
  struct alignas(16) Smem {
    unsigned char rows[kStages][kTileA + kTileB][kPitch];
  };

  // Starts the copy of one chunk of all rows: part of a pipeline whose depth is kStages; the caller commits
  // it. A thread copies the same vector of every kRowsAtOnce-th row.
  static __device__ __forceinline__ void stage(Smem& s, const RowSpan<E>& a, const RowSpan<E>& b,
                                               int row_columns, int chunk) {
    constexpr int kRowsAtOnce = kTileThreads / kChunkVectors;
    const int row_bytes = row_columns * int(sizeof(E));
    const int thread = kept(int(threadIdx.x));  // or addresses fill registers all the time
    const int own = thread / kChunkVectors, vector = thread % kChunkVectors;
    const int at = (chunk * kChunkVectors + vector) * kVectorBytes;
    const bool inside = at < row_bytes;
    // The first row of each side, and how many follow it.
    const auto* rows_a =
        reinterpret_cast<const unsigned char*>(a.rows) + a.first * row_bytes + (inside ? at : 0);
    const auto* rows_b =
        reinterpret_cast<const unsigned char*>(b.rows) + b.first * row_bytes + (inside ? at : 0);
    const int last_a = int(a.count) - 1 - int(a.first), last_b = int(b.count) - 1 - int(b.first);
    const SharedAddress to = shared_base(&s.rows[chunk % kStages][own][vector * kVectorBytes]);
#pragma unroll
    for (int first = 0; first < kTileA + kTileB; first += kRowsAtOnce) {
      const int row = first + own;
      if (first + kRowsAtOnce > kTileA + kTileB && row >= kTileA + kTileB) break;
      const bool of_a = kTileA % kRowsAtOnce == 0 ? first < kTileA : row < kTileA;
      const auto* from = of_a ? rows_a : rows_b;
      const int index = of_a ? min(row, last_a) : min(row - kTileA, last_b);
      copy_async_partly(to + first * kPitch, from + int64_t{index} * row_bytes, inside ? kVectorBytes : 0);
    }
  }
};

// By mma: a warp owns 32 x 32 products.
template <class T, Arithmetic kArithmetic>
struct TensorTile {
  using Element = T;
  static constexpr int kBlocks = 2;  // of a multiprocessor, that leave the tile enough registers
  static constexpr int kSteps = 4, kWarpsB = kTileB / 32;
  using Staged = StagedRows<T, 2, kSteps * kStepBytes / kVectorBytes, kRowPitch<kSteps>>;
  using Smem = typename Staged::Smem;

  // Row of A of this thread's product i, row of B of its product j.
  static __device__ __forceinline__ int row(int i) {
    return int(threadIdx.x) / kWarp / kWarpsB * 32 + i / 2 * 16 + i % 2 * 8 + int(threadIdx.x) % kWarp / 4;
  }
  static __device__ __forceinline__ int column(int j) {
    return int(threadIdx.x) / kWarp % kWarpsB * 32 + j / 2 * 8 + int(threadIdx.x) % 4 * 2 + j % 2;
  }
  // This thread's number among those that share its rows of B.
  static __device__ __forceinline__ int sharer() {
    return int(threadIdx.x) / kWarp / kWarpsB * 8 + int(threadIdx.x) % kWarp / 4;
  }

  static __device__ __forceinline__ void multiply(Smem& s, const RowSpan<T>& a, const RowSpan<T>& b,
                                                  int row_columns, float (&products)[kOwnA][kOwnB]) {
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    const int first_a = warp / kWarpsB * 32, first_b = kTileA + warp % kWarpsB * 32;
    const int chunks = ceil_div(row_columns * int(sizeof(T)), kSteps * kStepBytes);
    __syncthreads();  // everyone is done with what the stages held
    if (chunks > 0) {
      VISIT(first_copy, 1);
      Staged::stage(s, a, b, row_columns, 0);
    }
    copy_async_commit();
    float c[kOwnA / 2][kOwnB / 2][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      VISIT(chunk, 1);
      copy_async_wait<0>();
      __syncthreads();
      if (chunk + 1 < chunks) {
        VISIT(next_copy, 1);
        Staged::stage(s, a, b, row_columns, chunk + 1);
      }
      copy_async_commit();
      const auto& rows = s.rows[chunk % 2];
#pragma unroll(kArithmetic == Arithmetic::kSplit ? 1 : kSteps / int(sizeof(T) / 2))
      for (int k = 0; k < kSteps; ++k) {
        uint32_t left[2][4], left_low[2][4] = {};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          load_matrices<4>(left[m], rows[first_a + 16 * m + lane % 16] + k * kStepBytes + lane / 16 * 16);
          prepare<T, kArithmetic>(left[m], left_low[m]);
        }
#pragma unroll
        for (int pair = 0; pair < 4; pair += 2) {
          uint32_t loaded[4];
          load_matrices<4>(loaded, rows[first_b + 8 * pair + lane % 8 + lane / 16 * 8] + k * kStepBytes +
                                       lane / 8 % 2 * 16);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            uint32_t right[2] = {loaded[2 * j], loaded[2 * j + 1]}, right_low[2] = {};
            prepare<T, kArithmetic>(right, right_low);
#pragma unroll
            for (int m = 0; m < 2; ++m)
              step<T, kArithmetic>(c[m][pair + j], left[m], left_low[m], right, right_low);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnA; ++i)
#pragma unroll
      for (int j = 0; j < kOwnB; ++j) products[i][j] = c[i / 2][j / 2][i % 2 * 2 + j % 2];
  }
};

// By FMA: 16 x 16 threads.
struct FmaTile {
  using Element = float;
  static constexpr int kBlocks = 1;
  static constexpr int kSide = 16, kChunk = 8, kPitch = (kChunk + 4) * 4;
  static_assert(kSide * kOwnA == kTileA && kSide * kOwnB == kTileB && kSide * kSide == kTileThreads);
  using Staged = StagedRows<float, 2, kChunk / 4, kPitch>;
  using Smem = Staged::Smem;

  static __device__ __forceinline__ int row(int i) { return kSide * i + int(threadIdx.x) / kSide; }
  static __device__ __forceinline__ int column(int j) { return kSide * j + int(threadIdx.x) % kSide; }
  static __device__ __forceinline__ int sharer() { return int(threadIdx.x) / kSide; }

  static __device__ __forceinline__ void multiply(Smem& s, const RowSpan<float>& a, const RowSpan<float>& b,
                                                  int row_columns, float (&products)[kOwnA][kOwnB]) {
#pragma unroll
    for (int i = 0; i < kOwnA; ++i)
#pragma unroll
      for (int j = 0; j < kOwnB; ++j) products[i][j] = 0;
    const int chunks = row_columns / kChunk;
    __syncthreads();  // everyone is done with what the stages held
    if (chunks > 0) Staged::stage(s, a, b, row_columns, 0);
    copy_async_commit();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<0>();
      __syncthreads();
      if (chunk + 1 < chunks) Staged::stage(s, a, b, row_columns, chunk + 1);
      copy_async_commit();
      const auto& rows = s.rows[chunk % 2];
#pragma unroll 1
      for (int v = 0; v < kChunk / 4; ++v) {
        float4 left[kOwnA];
#pragma unroll
        for (int i = 0; i < kOwnA; ++i) left[i] = reinterpret_cast<const float4*>(rows[row(i)])[v];
#pragma unroll
        for (int j = 0; j < kOwnB; ++j) {
          const float4 right = reinterpret_cast<const float4*>(rows[kTileA + column(j)])[v];
#pragma unroll
          for (int i = 0; i < kOwnA; ++i)
            products[i][j] = fmaf(
                left[i].w, right.w,
                fmaf(left[i].z, right.z, fmaf(left[i].y, right.y, fmaf(left[i].x, right.x, products[i][j]))));
        }
      }
    }
  }
};

// ---- Launches: where tiles make fewer blocks than multiprocessors hold, what each walks is cut into shares
// How many blocks of so much shared memory a multiprocessor holds, of as many as registers allow.
inline int resident_blocks(int by_registers, size_t block_bytes) {
  constexpr size_t kReserved = 1 << 10;  // that each block costs besides
  const size_t fit = (device_limits().shared_bytes + kReserved) / (block_bytes + kReserved);
  return int(std::clamp<size_t>(fit, 1, size_t(by_registers)));
}

// What shares cost: at most so many, the tiles' time that a block takes before its first and after its last,
// and what part of the time more shares must leave to be worth their results.
struct ShareCosts {
  int most;
  double start, worth;
};

// The number of shares of what `blocks` blocks walk, `tiles` of each, for which their waves take the least
// time.
inline int choose_shares(int64_t blocks, int64_t tiles, int resident, const ShareCosts& costs) {
  const int64_t slots = int64_t{resident} * device_limits().multiprocessors;
  int best = 1;
  double least = 0;
  for (int shares = 1; shares <= std::min<int64_t>(tiles, costs.most); ++shares) {
    const double time =
        double(ceil_div(blocks * shares, slots)) * (double(ceil_div(tiles, int64_t{shares})) + costs.start);
    if (shares == 1 || time < costs.worth * least) {
      best = shares;
      least = time;
    }
  }
  return best;
}

using Tf32Tile = TensorTile<float, Arithmetic::kPlain>;
using SplitTile = TensorTile<float, Arithmetic::kSplit>;

// How products of queries and keys are made.
enum class Products { kSixteenBit, kFma, kTf32, kSplit };

inline Products score_products(const ScoreInputs& in, Precision precision) {
  if (is_16_bit(in.key.scalar_type()))
    return in.query.scalar_type() == in.key.scalar_type() && !in.squares() ? Products::kSixteenBit
                                                                           : Products::kSplit;
  return precision == Precision::kIeee   ? Products::kFma
         : precision == Precision::kTf32 ? Products::kTf32
                                         : Products::kSplit;
}

// Calls f with the tile that makes them; of float32 rows only.
template <class F>
void with_float_tile(Products products, F f) {
  switch (products) {
    case Products::kFma:
      return f(FmaTile{});
    case Products::kTf32:
      return f(Tf32Tile{});
    default:
      return f(SplitTile{});
  }
}

// The same of any rows.
template <class F>
void with_tile(Products products, ScalarType key, F f) {
  if (products != Products::kSixteenBit) return with_float_tile(products, f);
  if (key == ScalarType::Half) return f(TensorTile<half, Arithmetic::kPlain>{});
  f(TensorTile<bfloat16, Arithmetic::kPlain>{});
}

}  // namespace vosops::cuda
