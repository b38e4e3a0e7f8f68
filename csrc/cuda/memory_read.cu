// The memory read on the GPU: softmax over the memory in a streaming pass; the affinity never exists.
//
// tensor::kernel (16-bit values; float32 values as TF32 or split): a block of 8 warps owns 64 queries x 512
// value columns (channels of all objects, which share the scores), 128 x 256 or, in 99 KB, 64 x 256, and a
// share of the memory, which it walks 32 positions at a time. A warp holds 64 queries x 64 (32) columns of
// sums in 128 (64) registers. Queries stay in shared memory, keys and values come by cp.async through two
// stages each, values in place from channel-major or channel-last memory. Between two barriers a block
// multiplies the next tile's scores and adds this tile's weights times values, so that the latency of one
// hides behind the other. Weights are relative to a maximum that may lag behind by 2^8, so that sums are
// rescaled seldom; whole tiles of 16-byte vectors are copied from addresses that only grow. Shared memory for
// Ck = 128, Cv = 512, bf16: 108 KB. A tile brings 41 KB for 1.3 M multiply-adds, 1000 cycles at the rate of
// mma.sync: the second-level cache's bandwidth is the next bound. fma::kernel (float32, IEEE, and rows too
// long for the above): 64 queries x 256 columns, 8 x 8 sums a thread. Where queries and columns make fewer
// blocks than there are multiprocessors, the memory is cut into shares, whose results merge_kernel joins by
// their log-sum-exp.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "memory_read_parts.cuh"

namespace vosops::cuda {
namespace {

constexpr int kThreads = kTileThreads, kWarps = kThreads / kWarp;

// ---- float32 FMA kernel ----
namespace fma {
constexpr int kTileQueries = 64, kTileColumns = 256;
constexpr int kSide = 16;  // 16 x 16 threads hold 4 x 2 scores each: query 16 i + ty, position 16 j + tx
constexpr int kOwnQueries = kTileQueries / kSide, kOwnPositions = kTileMemory / kSide;
constexpr int kChunk = 8, kPitch = kChunk + 4, kVectors = kChunk / 4;
constexpr int kSums = 8;  // a thread holds 8 x 8 sums: queries 8 warp + i, columns 4 lane + j and 128 more
static_assert(kSums * kWarps == kTileQueries && kSums * kWarp == kTileColumns);

struct Smem {
  alignas(16) float rows[2][kTileQueries + kTileMemory][kPitch];
  alignas(16) float values[kTileMemory][kTileColumns + 4];
  alignas(16) float weights[kTileMemory][kTileQueries + 4];
  float rescale[kTileQueries];
  int64_t offset[kTileColumns];
};

template <class V>
__global__ __launch_bounds__(kThreads, 1) void kernel(Scores<float> in, Values<V> value, int64_t batch,
                                                      int column_tiles, Target<V> target) {
  DYNAMIC_SHARED(Smem, s);
  const int thread = int(threadIdx.x), tx = thread % kSide, ty = thread / kSide, warp = thread / kWarp,
            lane = thread % kWarp;
  const Share share(in, kTileQueries, column_tiles, target.shares);
  const int first_column = share.column_tile * kTileColumns;
  const int columns = min(value.columns - first_column, kTileColumns);
  const V* values = value.data + share.n * value.batch_stride;
  if (thread < kTileColumns) s.offset[thread] = thread < columns ? value.offset(first_column + thread) : 0;

  const float* queries = in.queries_of(share.n);
  const float* keys = in.keys_of(share.n);
  float bias[kOwnQueries];
  for (int i = 0; i < kOwnQueries; ++i)
    bias[i] = in.bias_of(share.n, min(share.first_query + kSide * i + ty, in.queries - 1));

  Running running[kOwnQueries];
  float sums[kSums][kSums] = {};
  for (int64_t first = share.begin; first < share.end; first += kTileMemory) {
    const auto stage = [&](int chunk) {
      for (int i = thread; i < (kTileQueries + kTileMemory) * kVectors; i += kThreads) {
        const int row = i / kVectors, column = i % kVectors * 4;
        const float* from = row < kTileQueries
                                ? queries + min(share.first_query + row, in.queries - 1) * in.row_columns
                                : keys + min(first + row - kTileQueries, share.end - 1) * in.row_columns;
        copy_async<16>(&s.rows[chunk % 2][row][column], from + chunk * kChunk + column);
      }
      copy_async_commit();
    };
    float scores[kOwnQueries][kOwnPositions] = {};
    const int chunks = in.row_columns / kChunk;
    stage(0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<0>();
      __syncthreads();
      if (chunk + 1 < chunks) stage(chunk + 1);
      const auto& rows = s.rows[chunk % 2];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float4 q[kOwnQueries];
#pragma unroll
        for (int i = 0; i < kOwnQueries; ++i) q[i] = reinterpret_cast<const float4*>(rows[kSide * i + ty])[v];
#pragma unroll
        for (int j = 0; j < kOwnPositions; ++j) {
          const float4 k = reinterpret_cast<const float4*>(rows[kTileQueries + kSide * j + tx])[v];
#pragma unroll
          for (int i = 0; i < kOwnQueries; ++i)
            scores[i][j] =
                fmaf(q[i].w, k.w, fmaf(q[i].z, k.z, fmaf(q[i].y, k.y, fmaf(q[i].x, k.x, scores[i][j]))));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kOwnPositions; ++j) {
      const int64_t m = first + kSide * j + tx, read = min(m, share.end - 1);
      const float shrinkage = in.shrinkage_of(share.n, read), shift = in.shift_of(share.n, read);
#pragma unroll
      for (int i = 0; i < kOwnQueries; ++i)
        scores[i][j] =
            m < share.end ? fmaf(shrinkage, fmaf(in.scale, scores[i][j], bias[i]), shift) : -INFINITY;
    }

    // The values follow while their place is free: everyone has passed the chunks' barriers.
    const bool columns_innermost = value.channel_stride == 1;
    for (int i = thread; i < kTileMemory * kTileColumns; i += kThreads) {
      const int m = columns_innermost ? i / kTileColumns : i % kTileMemory;
      const int column = columns_innermost ? i % kTileColumns : i / kTileMemory;
      float x = 0;
      if (column < columns && first + m < share.end)
        x = to_float(values[s.offset[column] + (first + m) * value.pixel_stride]);
      s.values[m][column] = x;
    }
#pragma unroll
    for (int i = 0; i < kOwnQueries; ++i) {
      float greatest = scores[i][0];
#pragma unroll
      for (int j = 1; j < kOwnPositions; ++j) greatest = fmaxf(greatest, scores[i][j]);
      for (int bits = 1; bits < kSide; bits *= 2)
        greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, bits));
      const float rescale = running[i].raise(greatest);
      if (tx == 0) s.rescale[kSide * i + ty] = rescale;
#pragma unroll
      for (int j = 0; j < kOwnPositions; ++j) {
        const float weight = running[i].weight(scores[i][j]);
        running[i].sum += weight;
        s.weights[kSide * j + tx][kSide * i + ty] = weight;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float rescale = s.rescale[kSums * warp + i];
#pragma unroll
      for (int j = 0; j < kSums; ++j) sums[i][j] *= rescale;
    }
#pragma unroll 2
    for (int m = 0; m < kTileMemory; ++m) {
      float w[kSums], v[kSums];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float4*>(w + 4 * half) =
            *reinterpret_cast<const float4*>(&s.weights[m][kSums * warp + 4 * half]);
        *reinterpret_cast<float4*>(v + 4 * half) =
            *reinterpret_cast<const float4*>(&s.values[m][4 * lane + kTileColumns / 2 * half]);
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i)
#pragma unroll
        for (int j = 0; j < kSums; ++j) sums[i][j] = fmaf(w[i], v[j], sums[i][j]);
    }
  }

  const Writer<V> write{target, share.n, batch, in.queries, value.columns, share.share};
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOwnQueries; ++i) {
    float sum = running[i].sum;
    for (int bits = 1; bits < kSide; bits *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
    const int64_t p = share.first_query + kSide * i + ty;
    if (tx != 0) continue;
    s.rescale[kSide * i + ty] = Running::inverse(sum);
    if (share.column_tile == 0 && p < in.queries) write.lse(p, Running::lse(running[i].base(), sum));
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kSums; ++j) {
    const int column = 4 * lane + j % 4 + j / 4 * (kTileColumns / 2);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int64_t p = share.first_query + kSums * warp + i;
      if (column < columns && p < in.queries)
        write.out(first_column + column, p, sums[i][j] * s.rescale[kSums * warp + i]);
    }
  }
}
}  // namespace fma

// ---- tensor-core kernel ----
namespace tensor {
constexpr int kWarpQueries = 64;  // of a warp's sums
constexpr int kStages = 2;

// The shape of a block: S is the element of the scores' rows, V that of values and weights; kWarpsM warps
// share the queries, and each holds sums of kTilesN tiles of 8 columns.
template <class S, Arithmetic kScore, class V, Arithmetic kValue, int kWarpsM, int kTilesN, bool kChannelLast>
struct Shape {
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kTileQueries = kWarpsM * kWarpQueries, kWarpColumns = 8 * kTilesN;
  static constexpr int kTileColumns = kWarpsN * kWarpColumns;
  // Scores: a warp multiplies 16 queries with 1 / kParts of the positions.
  static constexpr int kParts = kWarps * 16 / kTileQueries;
  static constexpr int kScoreTiles = kTileMemory / 8 / kParts;
  static constexpr int kWeightPitch = kTileMemory * int(sizeof(V)) + kVectorBytes;
  // Values lie as they come. The pitches keep ldmatrix, and of float32 the reads by word, free of bank
  // conflicts.
  static constexpr int kValueRows = kChannelLast ? kTileMemory : kTileColumns;
  static constexpr int kValueRowBytes = (kChannelLast ? kTileColumns : kTileMemory) * int(sizeof(V));
  static constexpr int kValuePitch = kValueRowBytes + (kChannelLast && sizeof(V) == 4 ? 2 : 1) * kVectorBytes;

  struct Smem {
    alignas(16) unsigned char values[kStages][kValueRows][kValuePitch];
    alignas(16) unsigned char weights[kTileQueries][kWeightPitch];
    float shrinkage[kStages][kTileMemory], shift[kStages][kTileMemory];
    float greatest[kParts][kTileQueries];
    float rescale[kTileQueries];  // of the sums before this tile is added; at the end 1 / (sum of weights)
    int64_t offset[kTileColumns];
    // Behind it: the queries' rows, then kStages times those of the keys, all with Pitch(steps).
  };
  static constexpr size_t shared_bytes(int row_pitch) {
    return sizeof(Smem) + size_t(kTileQueries + kStages * kTileMemory) * row_pitch;
  }
};

// How a tile of values is copied: by vectors of so many bytes, or 0 for one element after the other. `even`:
// by 16 bytes, and the columns of a tile are equally far apart.
struct ValueCopy {
  int vector_bytes;
  bool even;
};

template <class S, Arithmetic kScore, class V, Arithmetic kValue, int kWarpsM, int kTilesN, bool kChannelLast>
__global__ __launch_bounds__(kThreads, 1) void kernel(Scores<S> in, Values<V> value, ValueCopy copy,
                                                      int64_t batch, int column_tiles, Target<V> target) {
  using X = Shape<S, kScore, V, kValue, kWarpsM, kTilesN, kChannelLast>;
  using Shared = typename X::Smem;
  DYNAMIC_SHARED(Shared, s);
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int g = lane / 4, t = lane % 4;  // of the fragments: rows g and g + 8, columns 2t and 2t + 1
  const Share share(in, X::kTileQueries, column_tiles, target.shares);
  const int first_column = share.column_tile * X::kTileColumns;
  const int columns = min(value.columns - first_column, X::kTileColumns);
  const V* values = value.data + share.n * value.batch_stride;
  const int row_bytes = in.row_columns * int(sizeof(S)), row_pitch = row_bytes + kVectorBytes;
  auto* query_rows = reinterpret_cast<unsigned char*>(&s + 1);
  const auto key_rows = [&](int tile) {
    return query_rows + (X::kTileQueries + tile % kStages * kTileMemory) * row_pitch;
  };
  const int tiles = int(ceil_div(share.end - share.begin, int64_t{kTileMemory}));
  const SharedAddress shared = shared_base(&s);

  for (int i = thread; i < X::kTileColumns; i += kThreads)
    s.offset[i] = i < columns ? value.offset(first_column + i) : 0;
  if (thread < kTileMemory)
    for (int i = 0; i < kStages; ++i) {
      if (!in.shrinkage) s.shrinkage[i][thread] = 1;
      if (!in.key_bias) s.shift[i][thread] = 0;
    }
  const auto copy_queries = [&] {
    const int vectors = row_bytes / kVectorBytes;
#pragma unroll 1
    for (int i = thread; i < X::kTileQueries * vectors; i += kThreads) {
      VISIT(query_vector, 1);
      const int row = i / vectors, at = i % vectors * kVectorBytes;
      const auto* from = reinterpret_cast<const unsigned char*>(
          in.queries_of(share.n) + min(share.first_query + row, in.queries - 1) * in.row_columns);
      copy_async<16>(query_rows + row * row_pitch + at, from + at);
    }
  };
  // Eight threads copy a key's row.
  constexpr int kKeyThreads = kThreads / kTileMemory;
  const int key_row = thread / kKeyThreads, key_part = thread % kKeyThreads * kVectorBytes;
  const SharedAddress key_to =
      shared + int(sizeof(Shared)) + (X::kTileQueries + key_row) * row_pitch + key_part;
  const bool vectors = in.shrinkage || in.key_bias;
  const int tile_bytes = kept(kTileMemory * row_bytes);
  const auto* key_at = reinterpret_cast<const unsigned char*>(in.keys_of(share.n)) + key_part +
                       (share.begin + key_row) * row_bytes;
  const auto copy_keys = [&](int tile) {  // one after the other
    if (tile >= tiles) return;
    const int64_t first = share.begin + int64_t{tile} * kTileMemory;
    const bool last = first + kTileMemory > share.end;
    const unsigned char* from = key_at;
    if (last) {
      VISIT(last_keys, 1);
      from -= max(first + key_row - (share.end - 1), int64_t{0}) * row_bytes;
    }
    key_at += tile_bytes;
    SharedAddress to = key_to + tile % kStages * kTileMemory * row_pitch;
#pragma unroll 1
    for (int left = row_bytes - key_part; left > 0; left -= kKeyThreads * kVectorBytes) {
      VISIT(key_copy, 1);
      copy_async_whole(to, from);
      from += kKeyThreads * kVectorBytes;
      to = to + kKeyThreads * kVectorBytes;
    }
    if ((vectors || last) && thread < kTileMemory) {
      VISIT(key_vectors, 1);
      const bool there = first + thread < share.end;
      const int64_t m = share.n * in.memory + first + thread;
      if (in.shrinkage && there) copy_async<4>(&s.shrinkage[tile % kStages][thread], in.shrinkage + m);
      if (in.key_bias && there) copy_async<4>(&s.shift[tile % kStages][thread], in.key_bias + m);
      if (!there) {  // scores of minus infinity
        s.shrinkage[tile % kStages][thread] = 1;
        s.shift[tile % kStages][thread] = -INFINITY;
      }
    }
  };
  // Whole vectors of whole tiles, at addresses that only grow.
  constexpr int kRowVectors = X::kValueRowBytes / kVectorBytes, kRowsAtOnce = kThreads / kRowVectors;
  static_assert(kThreads % kRowVectors == 0 && X::kValueRows % kRowsAtOnce == 0);
  const int64_t row_stride = kChannelLast ? value.pixel_stride : value.channel_stride,
                position_stride = kChannelLast ? value.pixel_stride : 1;
  const bool even = copy.even && columns == X::kTileColumns;
  const V* value_at = values + (columns > 0 ? value.offset(first_column) : 0) +
                      share.begin * position_stride + thread / kRowVectors * row_stride +
                      int64_t{thread % kRowVectors} * (kVectorBytes / int(sizeof(V)));
  const SharedAddress value_to = shared + int(offsetof(Shared, values)) +
                                 thread / kRowVectors * X::kValuePitch + thread % kRowVectors * kVectorBytes;
  const auto copy_vectors = [&]<int kBytes>(auto& to, int64_t first) {
    constexpr int kVectors = X::kValueRowBytes / kBytes, kElements = kBytes / int(sizeof(V));
#pragma unroll 1
    for (int i = thread; i < X::kValueRows * kVectors; i += kThreads) {
      VISIT(uneven_vector, 1);
      const int row = i / kVectors, at = i % kVectors * kElements;
      const int m = kChannelLast ? row : at, column = kChannelLast ? at : row;
      const int64_t left = share.end - first - m;  // positions that there still are
      int used = 0;
      if (column < columns && left > 0)
        used = kChannelLast ? kBytes : int(min(left, int64_t{kElements})) * int(sizeof(V));
      const V* from = used ? values + s.offset[column] + (first + m) * value.pixel_stride : values;
      copy_async<kBytes>(&to[row][at * int(sizeof(V))], from, used);
    }
  };
  const auto copy_values = [&](int tile) {
    if (tile >= tiles) return;
    auto& to = s.values[tile % kStages];
    const int64_t first = share.begin + int64_t{tile} * kTileMemory;
    if (even && first + kTileMemory <= share.end) {
      VISIT(value_copy, 1);
      const V* from = value_at + int64_t{tile} * kTileMemory * position_stride;
      const SharedAddress stage = value_to + tile % kStages * int(sizeof(to));
#pragma unroll
      for (int i = 0; i < X::kValueRows; i += kRowsAtOnce) {
        copy_async_whole(stage + i * X::kValuePitch, from);
        from += kRowsAtOnce * row_stride;
      }
      return;
    }
    VISIT(uneven_tile, 1);
    if (copy.vector_bytes == 16) return copy_vectors.template operator()<16>(to, first);
    if (copy.vector_bytes == 8) return copy_vectors.template operator()<8>(to, first);
    if (copy.vector_bytes == 4) return copy_vectors.template operator()<4>(to, first);
#pragma unroll 1
    for (int i = thread; i < kTileMemory * X::kTileColumns; i += kThreads) {
      VISIT(element, 1);
      const int m = kChannelLast ? i / X::kTileColumns : i % kTileMemory;
      const int column = kChannelLast ? i % X::kTileColumns : i / kTileMemory;
      V x = from_float<V>(0);
      if (column < columns && first + m < share.end)
        x = values[s.offset[column] + (first + m) * value.pixel_stride];
      auto* row = reinterpret_cast<V*>(to[kChannelLast ? m : column]);
      row[kChannelLast ? column : m] = x;
    }
  };

  // ---- Scores of a tile: this warp's queries are score_row + g and + 8, its positions from score_position.
  const int score_row = warp / X::kParts * 16, part = warp % X::kParts,
            score_position = part * X::kScoreTiles * 8;
  float bias[2], scores[X::kScoreTiles][4];
  for (int r = 0; r < 2; ++r)
    bias[r] = in.bias_of(share.n, min(share.first_query + score_row + g + 8 * r, in.queries - 1));
  const auto multiply_scores = [&](int tile) {
#pragma unroll
    for (int j = 0; j < X::kScoreTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] = 0;
    const unsigned char* query_at = query_rows + (score_row + lane % 16) * row_pitch + lane / 16 * 16;
    const unsigned char* key_at =
        key_rows(tile) + (score_position + lane % 8 + lane / 16 * 8) * row_pitch + lane / 8 % 2 * 16;
    const auto step_at = [&](int at) {
      uint32_t a[4], a_low[4] = {};
      load_matrices<4>(a, query_at + at);
      prepare<S, kScore>(a, a_low);
#pragma unroll
      for (int pair = 0; pair < X::kScoreTiles; pair += 2) {
        uint32_t loaded[4];
        load_matrices<4>(loaded, key_at + 8 * pair * row_pitch + at);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t b[2] = {loaded[2 * j], loaded[2 * j + 1]}, b_low[2] = {};
          prepare<S, kScore>(b, b_low);
          step<S, kScore>(scores[pair + j], a, a_low, b, b_low);
        }
      }
    };
    constexpr int kStepsAtOnce = kScore == Arithmetic::kSplit ? 1 : 4;
    int left = row_bytes / kStepBytes;
#pragma unroll 1
    for (; left >= kStepsAtOnce; left -= kStepsAtOnce) {
      VISIT(score_steps, 1);
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) step_at(i * kStepBytes);
      query_at += kStepsAtOnce * kStepBytes;
      key_at += kStepsAtOnce * kStepBytes;
    }
#pragma unroll 1
    for (; left > 0; --left) {
      VISIT(score_step, 1);
      step_at(0);
      query_at += kStepBytes;
      key_at += kStepBytes;
    }
    float greatest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < X::kScoreTiles; ++j) {
      const int m = score_position + 8 * j + 2 * t;
      const float2 shrinkage = *reinterpret_cast<const float2*>(&s.shrinkage[tile % kStages][m]);
      const float2 shift = *reinterpret_cast<const float2*>(&s.shift[tile % kStages][m]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[j][e] = fmaf(e % 2 ? shrinkage.y : shrinkage.x, fmaf(in.scale, scores[j][e], bias[e / 2]),
                            e % 2 ? shift.y : shift.x);
        greatest[e / 2] = fmaxf(greatest[e / 2], scores[j][e]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      for (int bits = 1; bits < 4; bits *= 2)
        greatest[r] = fmaxf(greatest[r], __shfl_xor_sync(kAllLanes, greatest[r], bits));
      if (t == 0) s.greatest[part][score_row + g + 8 * r] = greatest[r];
    }
  };
  // Weights of the tile whose scores this thread holds. Whether sums so far must be rescaled for a query of
  // it.
  Running running[2];
  float base[2] = {};  // minus the scores that weights are relative to, as exponents of two
  const auto write_weights = [&] {
    float greatest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = score_row + g + 8 * r;
      greatest[r] = s.greatest[0][row];
#pragma unroll
      for (int i = 1; i < X::kParts; ++i) greatest[r] = fmaxf(greatest[r], s.greatest[i][row]);
      if (part == 0 && t == 0) s.rescale[row] = 1;
    }
    const bool raised = __any_sync(kAllLanes, running[0].lags(greatest[0]) || running[1].lags(greatest[1]));
    if (raised) {
      VISIT(raise, 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!running[r].lags(greatest[r])) continue;
        const float rescale = running[r].raise_to(greatest[r]);
        if (part == 0 && t == 0) s.rescale[score_row + g + 8 * r] = rescale;
        base[r] = -running[r].base() * kLog2E;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = score_row + g + 8 * r;
#pragma unroll
      for (int j = 0; j < X::kScoreTiles; ++j) {
        V pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = exp2_approximate(fmaf(scores[j][2 * r + e], kLog2E, base[r]));
          running[r].sum += weight;
          pair[e] = from_float<V>(weight);
        }
        auto* to = s.weights[row] + (score_position + 8 * j + 2 * t) * int(sizeof(V));
        if constexpr (sizeof(V) == 2) {
          uint32_t bits;
          memcpy(&bits, pair, 4);
          *reinterpret_cast<uint32_t*>(to) = bits;
        } else {
          *reinterpret_cast<float2*>(to) = {pair[0], pair[1]};
        }
      }
    }
    return raised;
  };

  // ---- Sums: this warp's queries are from sum_row, its columns from sum_column.
  const int sum_row = warp / X::kWarpsN * kWarpQueries, sum_column = warp % X::kWarpsN * X::kWarpColumns;
  float sums[kWarpQueries / 16][kTilesN][4] = {};
  const auto add_values = [&](int tile, bool rescaled) {
    if (sum_column >= columns) return;
    const auto& rows = s.values[tile % kStages];
    if (rescaled) {
      VISIT(rescale, 1);
#pragma unroll
      for (int i = 0; i < kWarpQueries / 16; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float rescale = s.rescale[sum_row + 16 * i + g + 8 * r];
#pragma unroll
          for (int j = 0; j < kTilesN; ++j) {
            sums[i][j][2 * r] *= rescale;
            sums[i][j][2 * r + 1] *= rescale;
          }
        }
    }
    constexpr int kSteps = kTileMemory * int(sizeof(V)) / kStepBytes, kDepth = kTileMemory / kSteps;
#pragma unroll(kValue == Arithmetic::kSplit ? 1 : kSteps)
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[kWarpQueries / 16][4], a_low[kWarpQueries / 16][4] = {};
#pragma unroll
      for (int i = 0; i < kWarpQueries / 16; ++i) {
        load_matrices<4>(a[i], s.weights[sum_row + 16 * i + lane % 16] + k * kStepBytes + lane / 16 * 16);
        prepare<V, kValue>(a[i], a_low[i]);
      }
#pragma unroll
      for (int pair = 0; pair < kTilesN; pair += 2) {
        uint32_t loaded[4];
        const int column = sum_column + 8 * pair;
        if constexpr (sizeof(V) == 2 && kChannelLast) {
          load_matrices<4, true>(loaded,
                                 rows[k * kDepth + lane % 16] + (column + lane / 16 * 8) * int(sizeof(V)));
        } else if constexpr (!kChannelLast) {
          load_matrices<4>(loaded,
                           rows[column + lane % 8 + lane / 16 * 8] + k * kStepBytes + lane / 8 % 2 * 16);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            loaded[i] = *reinterpret_cast<const uint32_t*>(rows[k * kDepth + i % 2 * 4 + t] +
                                                           (column + i / 2 * 8 + g) * int(sizeof(V)));
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t b[2] = {loaded[2 * j], loaded[2 * j + 1]}, b_low[2] = {};
          prepare<V, kValue>(b, b_low);
#pragma unroll
          for (int i = 0; i < kWarpQueries / 16; ++i)
            step<V, kValue>(sums[i][pair + j], a[i], a_low[i], b, b_low);
        }
      }
    }
  };

  __syncthreads();  // the columns' offsets
  copy_queries();
  copy_keys(0);
  copy_async_commit();
  copy_values(0);
  copy_keys(1);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  bool raised = false;
  if (tiles > 0) {
    multiply_scores(0);
    __syncthreads();
    raised = write_weights();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    VISIT(tile, 1);
    copy_async_wait<0>();
    const bool rescaled = __syncthreads_or(raised);
    copy_values(tile + 1);
    copy_keys(tile + 2);
    copy_async_commit();
    if (tile + 1 < tiles) multiply_scores(tile + 1);
    add_values(tile, rescaled);
    if (tile + 1 == tiles) break;
    __syncthreads();
    raised = write_weights();
  }
  copy_async_wait<0>();

  // The sums of weights over the lanes and warps that share a query.
  const Writer<V> write{target, share.n, batch, in.queries, value.columns, share.share};
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = running[r].sum;
    for (int bits = 1; bits < 4; bits *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
    if (t == 0) s.greatest[part][score_row + g + 8 * r] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = score_row + g + 8 * r;
    if (part != 0 || t != 0) continue;
    float sum = 0;
    for (int i = 0; i < X::kParts; ++i) sum += s.greatest[i][row];
    s.rescale[row] = Running::inverse(sum);
    if (share.column_tile == 0 && share.first_query + row < in.queries)
      write.lse(share.first_query + row, Running::lse(running[r].base(), sum));
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kTilesN; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = sum_column + 8 * j + 2 * t + e;
      if (column >= columns) continue;
#pragma unroll
      for (int i = 0; i < kWarpQueries / 16; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = sum_row + 16 * i + g + 8 * r;
          if (share.first_query + row < in.queries)
            write.out(first_column + column, share.first_query + row, sums[i][j][2 * r + e] * s.rescale[row]);
        }
    }
}
}  // namespace tensor

// ---- Joining the shares of the memory ----
template <class V>
__global__ __launch_bounds__(kThreads) void merge_kernel(Target<V> target, int64_t batch, int columns,
                                                         int64_t queries) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= batch * max(columns, 1) * queries) return;
  const int64_t p = at % queries, column = at / queries % max(columns, 1), n = at / queries / max(columns, 1);
  const float* lse = target.part_lse + n * queries + p;
  const int64_t lse_step = batch * queries, out_step = batch * columns * queries;
  float greatest = -INFINITY;
  for (int i = 0; i < target.shares; ++i) greatest = fmaxf(greatest, lse[i * lse_step]);
  const float base = greatest == -INFINITY ? 0.f : greatest;
  float sum = 0, total = 0;
  for (int i = 0; i < target.shares; ++i) {
    const float weight = expf(lse[i * lse_step] - base);
    sum += weight;
    if (columns > 0) total += weight * target.part_out[i * out_step + at];
  }
  if (columns > 0) target.out[at] = from_float<V>(total * Running::inverse(sum));
  if (column == 0) target.lse[n * queries + p] = Running::lse(base, sum);
}

// The outputs, and what must live until they are written.
template <class V>
struct Outputs {
  Tensor &out, &lse;
  Tensor part_out, part_lse;

  // Chooses the shares, launches `kernel(blocks, target)` and joins them.
  template <class Kernel>
  void run(int64_t tiles, int64_t memory, Stream stream, const Kernel& kernel) {
    const int64_t batch = out.size(0), columns = out.size(1) * out.size(2), queries = out.size(3);
    Target<V> target{static_cast<V*>(out.mutable_data_ptr()), lse.mutable_data_ptr<float>(), nullptr, nullptr,
                     choose_read_shares(tiles, memory)};
    if (target.shares > 1) {
      part_out = torch::stable::new_empty(lse, std::vector<int64_t>{target.shares, batch, columns, queries});
      part_lse = torch::stable::new_empty(lse, std::vector<int64_t>{target.shares, batch, queries});
      target.part_out = part_out.mutable_data_ptr<float>();
      target.part_lse = part_lse.mutable_data_ptr<float>();
    }
    kernel(checked_blocks(tiles * target.shares), target);
    if (target.shares > 1)
      LAUNCH(
          merge_kernel<V>,
          dim3(checked_blocks(ceil_div(batch * std::max<int64_t>(columns, 1) * queries, int64_t{kThreads}))),
          dim3(kThreads), 0, stream, target, batch, int(columns), queries);
  }
};

template <class V>
void read_by_fma(const ScoreInputs& in, const Tensor& value, Tensor& out, Tensor& lse, Stream stream) {
  ScoreMemory memory;
  const Scores<float> scores = pack_scores<float>(in, stream, memory);
  const Values<V> values = values_of<V>(value);
  const int column_tiles = std::max(1, ceil_div(values.columns, fma::kTileColumns));
  const int64_t tiles = in.batch() * ceil_div(in.queries(), int64_t{fma::kTileQueries}) * column_tiles;
  Outputs<V> outputs{out, lse, {}, {}};
  outputs.run(tiles, in.memory(), stream, [&](unsigned blocks, const Target<V>& target) {
    LAUNCH(fma::kernel<V>, dim3(blocks), dim3(kThreads), sizeof(fma::Smem), stream, scores, values,
           in.batch(), column_tiles, target);
  });
}

// ---- Choosing a kernel ----
// Whether values lie so that rows of a tile (channels of a position, or positions of a channel) are
// contiguous in memory, and by how many bytes at a time they may be copied.
template <class V>
int vector_bytes(const Values<V>& value, bool channel_last, int64_t batch) {
  if ((channel_last ? value.channel_stride : value.pixel_stride) != 1) return 0;
  int bytes = kVectorBytes;
  const auto divides = [&](int64_t elements) { return elements * int64_t{sizeof(V)} % bytes == 0; };
  for (; bytes >= 4; bytes /= 2) {
    if (reinterpret_cast<uintptr_t>(value.data) % bytes) continue;
    if (batch > 1 && !divides(value.batch_stride)) continue;
    if (!divides(channel_last ? value.pixel_stride : value.channel_stride)) continue;
    // A vector of channels must not reach into the next object's, nor beyond the last.
    if (channel_last && !divides(value.channels)) continue;
    if (value.columns == value.channels || divides(value.object_stride)) return bytes;
  }
  return 0;
}

template <class S, Arithmetic kScore, class V, Arithmetic kValue, int kWarpsM, int kTilesN, bool kChannelLast>
bool launch_tensor(const Scores<S>& scores, const Values<V>& values, int64_t batch, Tensor& out, Tensor& lse,
                   Stream stream) {
  using X = tensor::Shape<S, kScore, V, kValue, kWarpsM, kTilesN, kChannelLast>;
  const size_t bytes = X::shared_bytes(scores.row_columns * int(sizeof(S)) + kVectorBytes);
  if (bytes > device_limits().shared_bytes) return false;
  const int column_tiles = std::max(1, ceil_div(values.columns, X::kTileColumns));
  const int64_t tiles = batch * ceil_div(scores.queries, int64_t{X::kTileQueries}) * column_tiles;
  const int bytes_at_once = vector_bytes(values, kChannelLast, batch);
  // Columns of one tile are those of one object, or the objects follow each other as their channels do.
  const bool even = values.columns == values.channels || values.channels % X::kTileColumns == 0 ||
                    values.object_stride == values.channels * values.channel_stride;
  const tensor::ValueCopy copy{bytes_at_once, bytes_at_once == kVectorBytes && even};
  Outputs<V> outputs{out, lse, {}, {}};
  outputs.run(tiles, scores.memory, stream, [&](unsigned blocks, const Target<V>& target) {
    LAUNCH((tensor::kernel<S, kScore, V, kValue, kWarpsM, kTilesN, kChannelLast>), dim3(blocks),
           dim3(kThreads), bytes, stream, scores, values, copy, batch, column_tiles, target);
  });
  return true;
}

// False where the rows are too long for shared memory.
template <class S, Arithmetic kScore, class V, Arithmetic kValue>
bool read_by_tensor_cores(const ScoreInputs& in, const Tensor& value, Tensor& out, Tensor& lse,
                          Stream stream) {
  ScoreMemory memory;
  const Scores<S> scores = pack_scores<S>(in, stream, memory);
  const Values<V> values = values_of<V>(value);
  const bool last = values.channel_stride == 1 && values.pixel_stride != 1;
  const auto launch = [&]<int kWarpsM, int kTilesN>() {
    const auto of = [&](auto layout) {
      return launch_tensor<S, kScore, V, kValue, kWarpsM, kTilesN, layout()>(scores, values, in.batch(), out,
                                                                             lse, stream);
    };
    return last ? of(std::true_type{}) : of(std::false_type{});
  };
  if constexpr (sizeof(V) == 2 && sizeof(S) == 2) {
    if (values.columns <= 256 && in.queries() > tensor::kWarpQueries && launch.template operator()<2, 8>())
      return true;
    // Where shared memory is short, half of the columns, and the scores anew for each half.
    return launch.template operator()<1, 8>() || launch.template operator()<1, 4>();
  } else {
    return launch.template operator()<1, sizeof(V) == 2 ? 8 : 4>();
  }
}

// Sixteen-bit keys are exact in either arithmetic; float32 is reduced only as far as `precision` allows.
template <class V>
bool read_by_tensor_cores(const ScoreInputs& in, const Tensor& value, Precision precision, Tensor& out,
                          Tensor& lse, Stream stream) {
  constexpr auto kPlain = Arithmetic::kPlain, kSplit = Arithmetic::kSplit;
  const Products products = score_products(in, precision);
  if (products == Products::kFma) return false;
  if constexpr (sizeof(V) == 4) {
    if (precision == Precision::kIeee) return false;
    if (precision == Precision::kTf32 && products != Products::kSplit)
      return read_by_tensor_cores<float, kPlain, float, kPlain>(in, value, out, lse, stream);
    return read_by_tensor_cores<float, kSplit, float, kSplit>(in, value, out, lse, stream);
  } else {
    if (products == Products::kSixteenBit && in.key.scalar_type() == kScalarType<V>)
      return read_by_tensor_cores<V, kPlain, V, kPlain>(in, value, out, lse, stream);
    return read_by_tensor_cores<float, kSplit, V, kPlain>(in, value, out, lse, stream);
  }
}

void check_value(const ScoreInputs& in, const Tensor& value) {
  check_shape("value", value, {in.batch(), kAnySize, kAnySize, in.memory()});
}

std::tuple<Tensor, Tensor> memory_read(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const std::optional<Tensor>& shrinkage,
                                       const std::optional<Tensor>& query_bias,
                                       const std::optional<Tensor>& key_bias, double scale,
                                       std::string_view precision) {
  const ScoreInputs in{query, key, shrinkage, query_bias, key_bias, scale};
  check_scores(in);
  check_value(in, value);
  const Precision arithmetic = parse_precision(precision);
  Tensor out = torch::stable::new_empty(
      value, std::vector<int64_t>{in.batch(), value.size(1), value.size(2), in.queries()});
  Tensor lse =
      torch::stable::new_empty(query, std::vector<int64_t>{in.batch(), in.queries()}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  const DeviceScope device(query);
  if (in.memory() == 0) {
    torch::stable::fill_(out, 0);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse};
  }
  dispatch(value.scalar_type(), [&](auto sample) {
    using V = decltype(sample);
    if (!read_by_tensor_cores<V>(in, value, arithmetic, out, lse, device.stream()))
      read_by_fma<V>(in, value, out, lse, device.stream());
  });
  return {out, lse};
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("memory_read", TORCH_BOX(&vosops::cuda::memory_read));
}
