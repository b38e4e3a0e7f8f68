// Global matching on the GPU: for every query pixel and object the nearest key pixels of the object in all
// reference frames.
//
// The key pixels of each object are listed first (count, then place, in ascending order), so that inner loops
// have no mask: a matrix product of queries and listed keys with a minimum behind it. A block owns a tile of
// queries and walks a share of the tiles of 128 listed keys, object after object; the best of a query goes to
// global memory by atomicMin (any order gives the same result) when the object changes. With several
// neighbours, two sorted lists per query and block are kept and joined at the end.
//
// tensor::kernel (16-bit inputs; float32 as TF32 or split into two TF32 numbers): 256 queries x 128 keys, a
// warp holds 64 x 64 scores in 128 registers. The queries stay in shared memory, keys come by cp.async
// through three stages, rows gathered by list. C = 100, bf16: 61 + 92 KB of shared memory, one block a
// multiprocessor; a tile moves 29 KB for 3.7 M multiply-adds, 2900 cycles at the rate of mma.sync: 10 bytes a
// cycle. 8 ldmatrix feed 32 mma, so shared memory is busy 62 % of that time. Behind the
// product a thread compares the greatest of its 16 values of each query with the best so far; which key it
// was is looked for where a lane of the warp has a new best, on which the four lanes that share the query
// then agree. fma::kernel (float32, IEEE): 128 queries x 128 keys, 8 x 8 scores a thread, queries and keys 8
// channels at a time through a double buffer; the pitch of 12 floats keeps 16-byte reads free of bank
// conflicts. FMAs bound it.
#include <algorithm>
#include <tuple>

#include "matching.cuh"
#include "tensor_core.cuh"

namespace vosops::cuda {
namespace {

// ---- The lists of key pixels ----
struct Lists {
  const int* pixels;  // [N * objects][count]: the object's pixels, ascending
  const int* sizes;   // [N * objects]
};

constexpr int kListThreads = 256, kListPixels = 16;  // a thread looks at 16 neighbouring pixels
constexpr int kSegment = kListThreads * kListPixels;
constexpr int kListWarps = kListThreads / kWarp;

struct ListSmem {
  int sums[kListWarps];
};

// The sum over the block's threads with a lower number; `total` receives the sum over all of them.
__device__ int sum_before(ListSmem& s, int value, int& total) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int sum = value;
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, unsigned(delta));
    if (lane >= delta) sum += other;
  }
  if (lane == kWarp - 1) s.sums[warp] = sum;
  __syncthreads();
  int before = sum - value;
  total = 0;
  for (int w = 0; w < kListWarps; ++w) {
    if (w < warp) before += s.sums[w];
    total += s.sums[w];
  }
  __syncthreads();
  return before;
}

// The members of the object among this thread's pixels, as bits.
__device__ unsigned members(const Pixels<bool>& mask, int64_t n, int object, int64_t first) {
  unsigned bits = 0;
  for (int i = 0; i < kListPixels; ++i)
    if (first + i < mask.count())
      bits |= unsigned(mask.data[mask.offset(n, first + i) + object * mask.channel_stride]) << i;
  return bits;
}

__global__ __launch_bounds__(kListThreads) void count_kernel(Pixels<bool> mask, int segments, int* counts) {
  DYNAMIC_SHARED(ListSmem, s);
  const int64_t image = blockIdx.x / segments;
  const int64_t first = int64_t{blockIdx.x % segments} * kSegment + threadIdx.x * kListPixels;
  int total;
  sum_before(s, __popc(members(mask, image / mask.channels, int(image % mask.channels), first)), total);
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

__global__ __launch_bounds__(kListThreads) void place_kernel(Pixels<bool> mask, int segments,
                                                             const int* counts, int* pixels, int* sizes) {
  DYNAMIC_SHARED(ListSmem, s);
  const int64_t image = blockIdx.x / segments;
  const int segment = int(blockIdx.x % segments);
  int earlier = 0, base, total;
  for (int i = int(threadIdx.x); i < segment; i += kListThreads) earlier += counts[image * segments + i];
  sum_before(s, earlier, base);
  const int64_t first = int64_t{segment} * kSegment + threadIdx.x * kListPixels;
  unsigned bits = members(mask, image / mask.channels, int(image % mask.channels), first);
  int at = base + sum_before(s, __popc(bits), total);
  for (; bits; bits &= bits - 1) pixels[image * mask.count() + at++] = int(first + __ffs(int(bits)) - 1);
  if (segment == segments - 1 && threadIdx.x == 0) sizes[image] = base + total;
}

struct ListMemory {
  Tensor counts, pixels, sizes;
};

Lists list_members(const Tensor& mask, Stream stream, ListMemory& memory) {
  const Pixels<bool> view = pixels<bool>(mask);
  const int64_t images = mask.size(0) * mask.size(1), count = view.count();
  const int64_t segments = ceil_div(std::max<int64_t>(count, 1), int64_t{kSegment});
  STD_TORCH_CHECK(images * segments <= kMostPixels, "too many pixels in all masks");
  const auto integers = [&](int64_t size) {
    return torch::stable::new_empty(mask, std::vector<int64_t>{size}, ScalarType::Int);
  };
  memory = {integers(images * segments), integers(images * count), integers(images)};
  int* counts = memory.counts.mutable_data_ptr<int>();
  int* listed = memory.pixels.mutable_data_ptr<int>();
  int* sizes = memory.sizes.mutable_data_ptr<int>();
  LAUNCH(count_kernel, dim3(unsigned(images * segments)), dim3(kListThreads), sizeof(ListSmem), stream, view,
         int(segments), counts);
  LAUNCH(place_kernel, dim3(unsigned(images * segments)), dim3(kListThreads), sizeof(ListSmem), stream, view,
         int(segments), counts, listed, sizes);
  return {listed, sizes};
}

// ---- What the product kernels share ----
constexpr int kTileKeys = 128, kThreads = 256;
constexpr int kListsPerSplit = 2;

struct Problem {
  int objects, neighbors, splits;
  Candidate* best;   // one neighbour: [N * objects][queries], updated by atomicMin
  Candidate* lists;  // several: [N * objects][queries][splits * kListsPerSplit][neighbors], each sorted
};

// What a block works on: queries from `first_query` of batch element n, and key tiles [begin, end) of all
// objects' tiles.
struct Share {
  int n, split;
  int64_t first_query, begin, end;

  __device__ Share(const Problem& problem, const Lists& lists, int64_t queries, int tile_queries) {
    const unsigned tiles = unsigned(ceil_div(queries, int64_t{tile_queries}));
    unsigned block = blockIdx.x;
    split = int(block % unsigned(problem.splits));
    block /= unsigned(problem.splits);
    first_query = int64_t{block % tiles} * tile_queries;
    n = int(block / tiles);
    int64_t total = 0;
    for (int o = 0; o < problem.objects; ++o)
      total += ceil_div(lists.sizes[n * problem.objects + o], kTileKeys);
    begin = total * split / problem.splits;
    end = total * (split + 1) / problem.splits;
  }
};

// Inserts a candidate into an ascending list and returns the new last entry.
__device__ Candidate insert(Candidate* list, int size, Candidate c) {
  int at = size - 1;
  for (; at > 0 && list[at - 1] > c; --at) list[at] = list[at - 1];
  list[at] = c;
  return list[size - 1];
}

// Joins the sorted lists of a query: thread per image and query.
__global__ __launch_bounds__(kThreads) void merge_kernel(const Candidate* lists, int64_t images,
                                                         int64_t queries, int lists_per_query, int neighbors,
                                                         Candidate* best) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= images * queries) return;
  const Candidate* mine = lists + at * lists_per_query * neighbors;
  Candidate last = 0;
  for (int k = 0; k < neighbors; ++k) {
    Candidate next = kNoCandidate;
    for (int i = 0; i < lists_per_query * neighbors; ++i)
      if ((k == 0 || mine[i] > last) && mine[i] < next) next = mine[i];
    best[(at / queries * neighbors + k) * queries + at % queries] = next;
    last = next;
  }
}

// ---- float32 FMA kernel ----
namespace fma {
constexpr int kTileQueries = 128;
static_assert(kListsPerSplit == kThreads / kTileQueries);
constexpr int kSide = 16,
              kPerThread = 8;  // 16 x 16 threads hold 8 x 8 scores each: query 16 i + ty, key 16 j + tx
constexpr int kChunk = 8, kPitch = kChunk + 4, kVectors = kChunk / 4;
static_assert(kSide * kPerThread == kTileQueries && kSide * kPerThread == kTileKeys &&
              kSide * kSide == kThreads);

struct Smem {
  alignas(16) float queries[2][kTileQueries][kPitch];
  alignas(16) float keys[2][kTileKeys][kPitch];
  int pixel[kTileKeys];
  float half_norm[kTileKeys];
};
struct BestSmem : Smem {
  Candidate best[kPerThread][kThreads];  // each thread's own
};
struct ScoresSmem : Smem {
  float scores[kTileQueries][kTileKeys + 1];
};

template <bool kOneNeighbor>
__global__ __launch_bounds__(kThreads, kOneNeighbor ? 2 : 1) void kernel(Rows<float> query, Rows<float> key,
                                                                         Lists lists, Problem problem) {
  using Shared = std::conditional_t<kOneNeighbor, BestSmem, ScoresSmem>;
  DYNAMIC_SHARED(Shared, s);
  const int thread = int(threadIdx.x), tx = thread % kSide, ty = thread / kSide;
  const Share share(problem, lists, query.count, kTileQueries);
  const int64_t own_query = share.first_query + thread % kTileQueries;  // whose list this thread keeps
  const bool wanted = own_query < query.count && query.state[share.n * query.count + own_query] == 0;
  if (!__syncthreads_or(wanted)) return;

  int64_t tile = 0;  // number of the object's first tile
  for (int object = 0; object < problem.objects; ++object) {
    const int64_t image = int64_t{share.n} * problem.objects + object;
    const int size = lists.sizes[image];
    const int64_t object_tiles = ceil_div(size, kTileKeys);
    const int64_t first = max(share.begin, tile) - tile, last = min(share.end, tile + object_tiles) - tile;
    tile += object_tiles;
    if (first >= last) continue;

    Candidate* own_list = nullptr;
    Candidate worst = kNoCandidate;
    if constexpr (kOneNeighbor) {
      for (int i = 0; i < kPerThread; ++i) s.best[i][thread] = kNoCandidate;
    } else {
      const int list = share.split * kListsPerSplit + thread / kTileQueries;
      if (wanted)
        own_list =
            problem.lists +
            ((image * query.count + own_query) * problem.splits * kListsPerSplit + list) * problem.neighbors;
    }

    for (int64_t t = first; t < last; ++t) {
      __syncthreads();  // everyone has read the previous tile's numbers
      if (thread < kTileKeys) {
        const int64_t at = t * kTileKeys + thread;
        const int pixel = at < size ? lists.pixels[image * key.count + at] : -1;
        s.pixel[thread] = pixel;
        s.half_norm[thread] = pixel < 0 ? INFINITY : key.half_norm[share.n * key.count + pixel];
      }
      __syncthreads();

      const auto stage = [&](int chunk) {
#pragma unroll 1
        for (int i = thread; i < kTileQueries * kVectors; i += kThreads) {
          const int row = i / kVectors, column = i % kVectors * 4, channel = chunk * kChunk + column;
          const int64_t q = min(share.first_query + row, query.count - 1);
          copy_async<16>(&s.queries[chunk % 2][row][column],
                         query.rows + (share.n * query.count + q) * query.row_channels + channel);
          const int64_t k = max(s.pixel[row], 0);
          copy_async<16>(&s.keys[chunk % 2][row][column],
                         key.rows + (share.n * key.count + k) * key.row_channels + channel);
        }
        copy_async_commit();
      };

      float dot[kPerThread][kPerThread] = {};
      const int chunks = key.row_channels / kChunk;
      stage(0);
      for (int chunk = 0; chunk < chunks; ++chunk) {
        copy_async_wait<0>();
        __syncthreads();
        if (chunk + 1 < chunks) stage(chunk + 1);
#pragma unroll 1
        for (int v = 0; v < kVectors; ++v) {
          float4 q[kPerThread];
#pragma unroll
          for (int i = 0; i < kPerThread; ++i)
            q[i] = *reinterpret_cast<const float4*>(&s.queries[chunk % 2][kSide * i + ty][4 * v]);
#pragma unroll
          for (int j = 0; j < kPerThread; ++j) {
            const float4 k = *reinterpret_cast<const float4*>(&s.keys[chunk % 2][kSide * j + tx][4 * v]);
#pragma unroll
            for (int i = 0; i < kPerThread; ++i)
              dot[i][j] =
                  fmaf(q[i].w, k.w, fmaf(q[i].z, k.z, fmaf(q[i].y, k.y, fmaf(q[i].x, k.x, dot[i][j]))));
          }
        }
      }

#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        float least = INFINITY;
        int column = 0;
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) {
          const float score = s.half_norm[kSide * j + tx] - dot[i][j] + 0.f;  // never negative zero
          if constexpr (kOneNeighbor) {
            if (score < least) {
              least = score;
              column = kSide * j + tx;
            }
          } else {
            s.scores[kSide * i + ty][kSide * j + tx] = score;
          }
        }
        if constexpr (kOneNeighbor)
          if (least < INFINITY)
            s.best[i][thread] = min(s.best[i][thread], candidate(ordered(least), uint32_t(s.pixel[column])));
      }
      if constexpr (!kOneNeighbor) {
        __syncthreads();
        const int begin = thread / kTileQueries * (kTileKeys / kListsPerSplit);
        for (int j = begin; own_list && j < begin + kTileKeys / kListsPerSplit; ++j) {
          const float score = s.scores[thread % kTileQueries][j];
          if (!(score < INFINITY)) continue;
          const Candidate c = candidate(ordered(score), uint32_t(s.pixel[j]));
          if (c < worst) worst = insert(own_list, problem.neighbors, c);
        }
      }
    }

    if constexpr (kOneNeighbor) {
      for (int i = 0; i < kPerThread; ++i) {
        Candidate c = s.best[i][thread];
        for (int bits = 1; bits < kSide; bits *= 2) c = min(c, __shfl_xor_sync(kAllLanes, c, bits));
        const int64_t q = share.first_query + kSide * i + ty;
        if (tx == 0 && q < query.count && c != kNoCandidate)
          atomicMin(problem.best + image * query.count + q, c);
      }
    }
  }
}

template <bool kOneNeighbor>
void select(const Rows<float>& query, const Rows<float>& key, const Lists& lists, const Problem& problem,
            int64_t blocks, Stream stream) {
  LAUNCH(kernel<kOneNeighbor>, dim3(unsigned(blocks)), dim3(kThreads),
         kOneNeighbor ? sizeof(BestSmem) : sizeof(ScoresSmem), stream, query, key, lists, problem);
}
}  // namespace fma

// ---- tensor-core kernel ----
namespace tensor {
constexpr int kWarpsM = 4, kWarpsN = 2;
constexpr int kTilesM = 4, kTilesN = 8;  // of 16 queries and of 8 keys: a warp holds 64 x 64 scores
constexpr int kTileQueries = kWarpsM * kTilesM * 16;
constexpr int kStages = 3;
constexpr int kNumbers = 4;  // tiles whose pixels and norms are kept: those in flight, and the one at work
static_assert(kWarpsM * kWarpsN * kWarp == kThreads && kWarpsN * kTilesN * 8 == kTileKeys);
static_assert(kListsPerSplit == kWarpsN);

template <int kSteps, int kRows>
struct alignas(16) Chunk {
  unsigned char rows[kRows][kRowPitch<kSteps>];
};
struct Numbers {
  int pixel[kTileKeys];  // -1 behind the object's last key
  float half_norm[kTileKeys];
};
template <int kSteps, bool kResident>
struct Smem {
  // The queries come with every chunk of keys unless they stay (behind the struct, one chunk after the
  // other).
  Chunk<kSteps, kTileKeys + (kResident ? 0 : kTileQueries)> stages[kStages];
  Numbers numbers[kNumbers];
  Candidate worst[kWarpsN][kTileQueries];  // that a query still keeps: its best, or the last of its list
};
template <int kSteps, bool kResident>
constexpr size_t shared_bytes(int chunks) {
  return sizeof(Smem<kSteps, kResident>) + (kResident ? chunks * sizeof(Chunk<kSteps, kTileQueries>) : 0);
}

template <class T, int kSteps, bool kResident, Arithmetic kArithmetic>
__global__ __launch_bounds__(kThreads, 1) void kernel(Rows<T> query, Rows<T> key, Lists lists,
                                                      Problem problem, int chunks) {
  using Shared = Smem<kSteps, kResident>;
  DYNAMIC_SHARED(Shared, s);
  auto* resident = reinterpret_cast<Chunk<kSteps, kTileQueries>*>(&s + 1);
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int g = lane / 4,
            t = lane %
                4;  // of the fragments: this lane has queries g, g + 8 and keys 2t, 2t + 1 of each tile
  const int warp_m = warp / kWarpsN * kTilesM * 16, warp_n = warp % kWarpsN * kTilesN * 8;
  const Share share(problem, lists, query.count, kTileQueries);
  const int64_t own_query = share.first_query + thread;
  if (share.begin == share.end) return;
  if (!__syncthreads_or(own_query < query.count && query.state[share.n * query.count + own_query] == 0))
    return;

  const int row_bytes = key.row_channels * int(sizeof(T));
  const bool whole = row_bytes == chunks * kSteps * kStepBytes;  // no chunk ends beyond the row
  const SharedAddress shared = shared_base(&s);
  constexpr int kVectors = kSteps * kStepBytes / kVectorBytes;
  // Copies a chunk of a row, by `threads` neighbouring threads.
  const auto copy = [&](unsigned char* to, const T* rows, int64_t row, int chunk, int part, int threads) {
    const auto* from = reinterpret_cast<const unsigned char*>(rows) + row * row_bytes;
    for (int v = part; v < kVectors; v += threads) {
      const int at = (chunk * kVectors + v) * kVectorBytes;
      copy_async<16>(to + v * kVectorBytes, from + (at < row_bytes ? at : 0),
                     at < row_bytes ? kVectorBytes : 0);
    }
  };
  const auto copy_queries = [&](unsigned char (*to)[kRowPitch<kSteps>], int chunk) {
    for (int row = thread / 2; row < kTileQueries; row += kThreads / 2)
      copy(to[row], query.rows, share.n * query.count + min(share.first_query + row, query.count - 1), chunk,
           thread % 2, 2);
  };
  if constexpr (kResident)
    for (int chunk = 0; chunk < chunks; ++chunk) copy_queries(resident[chunk].rows, chunk);

  int64_t tile = 0;  // number of the object's first tile
  for (int object = 0; object < problem.objects; ++object) {
    const int64_t image = int64_t{share.n} * problem.objects + object;
    const int size = lists.sizes[image];
    const int object_tiles = ceil_div(size, kTileKeys);
    const int first = int(max(share.begin, tile) - tile),
              last = int(min(share.end, tile + object_tiles) - tile);
    tile += object_tiles;
    if (first >= last) continue;

    __syncthreads();  // everyone is done with the previous object
    VISIT(object, 1);
    for (int i = 0; i < kWarpsN; ++i) s.worst[i][thread] = kNoCandidate;
    // With one neighbour the best value of each query of the lane; `worst` has its key.
    float best[2 * kTilesM];
#pragma unroll
    for (int q = 0; q < 2 * kTilesM; ++q) best[q] = -INFINITY;

    // Two threads copy a key's row. The number of the pixel is looked up one stage before it is needed.
    const int own_key = thread / 2;
    const auto look_up = [&](int t) {
      const int at = t * kTileKeys + own_key;
      return t < last && at < size ? lists.pixels[image * key.count + at] : -1;
    };
    int ahead_tile = first, ahead_chunk = 0, ahead_pixel = look_up(first);
    const auto stage = [&](int number) {
      if (ahead_tile < last) {
        auto& to = s.stages[number % kStages];
        const int64_t row = share.n * key.count + max(ahead_pixel, 0);
        if (whole) {
          VISIT(key_copy, 1);
          const auto* from = reinterpret_cast<const unsigned char*>(key.rows) + row * row_bytes +
                             ahead_chunk * kSteps * kStepBytes + thread % 2 * kVectorBytes;
          const SharedAddress row_to = shared + number % kStages * int(sizeof(to)) +
                                       own_key * kRowPitch<kSteps> + thread % 2 * kVectorBytes;
#pragma unroll
          for (int k = 0; k < kSteps; ++k) copy_async_whole(row_to + k * kStepBytes, from + k * kStepBytes);
        } else {
          VISIT(uneven, 1);
          copy(to.rows[own_key], key.rows, row, ahead_chunk, thread % 2, 2);
        }
        if constexpr (!kResident) copy_queries(to.rows + kTileKeys, ahead_chunk);
        if (ahead_chunk == 0 && thread % 2 == 0) {
          auto& numbers = s.numbers[ahead_tile % kNumbers];
          numbers.pixel[own_key] = ahead_pixel;
          copy_async<4>(&numbers.half_norm[own_key],
                        key.half_norm + share.n * key.count + max(ahead_pixel, 0));
        }
        if (++ahead_chunk == chunks) {
          ahead_chunk = 0;
          ahead_pixel = look_up(++ahead_tile);
        }
      }
      copy_async_commit();
    };

    for (int number = 0; number < kStages - 1; ++number) stage(number);
    float c[kTilesM][kTilesN][4];  // q.k - |k|^2 / 2: the greatest wins
    for (int now = first, chunk = 0, number = 0; now < last; ++number) {
      VISIT(tile, 1);
      copy_async_wait<kStages - 2>();
      __syncthreads();
      stage(number + kStages - 1);
      const auto& numbers = s.numbers[now % kNumbers];
      const auto& in = s.stages[number % kStages];
      const auto* query_rows = kResident ? resident[chunk].rows : in.rows + kTileKeys;
      const auto start = [&](int j, float (&from)[4]) {
        const int column = warp_n + 8 * j + 2 * t;
        const int2 pixel = *reinterpret_cast<const int2*>(&numbers.pixel[column]);
        const float2 half_norm = *reinterpret_cast<const float2*>(&numbers.half_norm[column]);
        from[0] = from[2] = pixel.x < 0 ? -INFINITY : -half_norm.x;
        from[1] = from[3] = pixel.y < 0 ? -INFINITY : -half_norm.y;
      };
      const auto multiply = [&](int k, bool first_step) {
        uint32_t a[kTilesM][4], a_low[kTilesM][4] = {};
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          load_matrices<4>(a[m], query_rows[warp_m + 16 * m + lane % 16] + k * kStepBytes + lane / 16 * 16);
          prepare<T, kArithmetic>(a[m], a_low[m]);
        }
#pragma unroll
        for (int pair = 0; pair < kTilesN; pair += 2) {
          uint32_t loaded[4];
          load_matrices<4>(loaded, in.rows[warp_n + 8 * pair + lane % 8 + lane / 16 * 8] + k * kStepBytes +
                                       lane / 8 % 2 * 16);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            uint32_t b[2] = {loaded[2 * j], loaded[2 * j + 1]}, b_low[2] = {};
            prepare<T, kArithmetic>(b, b_low);
            float from[4];
            if (first_step) start(pair + j, from);
#pragma unroll
            for (int m = 0; m < kTilesM; ++m)
              step_from<T, kArithmetic>(c[m][pair + j], first_step ? from : c[m][pair + j], a[m], a_low[m], b,
                                        b_low);
          }
        }
      };
      if constexpr (kArithmetic == Arithmetic::kSplit) {  // which has no registers to spare
        if (chunk == 0) {
#pragma unroll
          for (int j = 0; j < kTilesN; ++j)
#pragma unroll
            for (int m = 0; m < kTilesM; ++m) start(j, c[m][j]);
        }
#pragma unroll 1
        for (int k = 0; k < kSteps; ++k) multiply(k, false);
      } else {
        if (chunk == 0) {
          multiply(0, true);
        } else {
          VISIT(later_chunk, 1);
          multiply(0, false);
        }
#pragma unroll
        for (int k = 1; k < kSteps; ++k) multiply(k, false);
      }
      if (++chunk < chunks) continue;
      chunk = 0;

      if (problem.neighbors == 1) {
        VISIT(one_neighbor, 1);
#pragma unroll
        for (int q = 0; q < 2 * kTilesM; ++q) {
          float greatest = c[q / 2][0][q % 2 * 2];
#pragma unroll
          for (int i = 1; i < 2 * kTilesN; ++i)
            greatest = fmaxf(greatest, c[q / 2][i / 2][q % 2 * 2 + i % 2]);
          const bool better = greatest > best[q];
          if (!__any_sync(kAllLanes, better)) continue;
          {
            VISIT(update, 2 * kTilesM);
            int column = 0;
#pragma unroll
            for (int i = 2 * kTilesN - 1; i > 0; --i)
              if (c[q / 2][i / 2][q % 2 * 2 + i % 2] == greatest) column = i / 2 * 8 + i % 2;
            if (c[q / 2][0][q % 2 * 2] == greatest) column = 0;
            // The four lanes that share the query agree on its best.
            Candidate found = kNoCandidate;
            if (better)
              found = candidate(ordered(0.f - greatest), uint32_t(numbers.pixel[warp_n + 2 * t + column]));
            found = min(found, __shfl_xor_sync(kAllLanes, found, 1));
            found = min(found, __shfl_xor_sync(kAllLanes, found, 2));
            best[q] = fmaxf(best[q], greatest);
            best[q] = fmaxf(best[q], __shfl_xor_sync(kAllLanes, best[q], 1));
            best[q] = fmaxf(best[q], __shfl_xor_sync(kAllLanes, best[q], 2));
            if (t == 0 && found != kNoCandidate)
              s.worst[warp % kWarpsN][warp_m + q / 2 * 16 + q % 2 * 8 + g] = found;
          }
        }
        ++now;
        continue;
      }

      // Where a query's greatest value beats what it still keeps, the four lanes that share it take turns.
#pragma unroll
      for (int q = 0; q < 2 * kTilesM; ++q) {
        float greatest = -INFINITY;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) greatest = fmaxf(greatest, c[q / 2][j][q % 2 * 2 + e]);
        const int row = warp_m + q / 2 * 16 + q % 2 * 8 + g;
        Candidate& worst = s.worst[warp % kWarpsN][row];
        const bool better = greatest > -INFINITY && ordered(0.f - greatest) <= uint32_t(worst >> 32);
        if (!__any_sync(kAllLanes, better)) continue;
        VISIT(lists, 2 * kTilesM);
        __syncwarp();
        const int64_t at = share.first_query + row;
        Candidate* list =
            problem.neighbors == 1 || at >= query.count
                ? nullptr
                : problem.lists + ((image * query.count + at) * problem.splits * kListsPerSplit +
                                   share.split * kListsPerSplit + warp % kWarpsN) *
                                      problem.neighbors;
        for (int turn = 0; turn < 4; ++turn) {
          if (better && t == turn) {
#pragma unroll
            for (int j = 0; j < kTilesN; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const float value = c[q / 2][j][q % 2 * 2 + e];
                if (!(value > -INFINITY)) continue;
                const Candidate found =
                    candidate(ordered(0.f - value), uint32_t(numbers.pixel[warp_n + 8 * j + 2 * t + e]));
                if (found < worst) worst = list ? insert(list, problem.neighbors, found) : found;
              }
          }
          __syncwarp();
        }
      }
      ++now;
    }
    copy_async_wait<0>();

    __syncthreads();
    if (problem.neighbors == 1 && own_query < query.count) {
      Candidate least = s.worst[0][thread];
      for (int i = 1; i < kWarpsN; ++i) least = min(least, s.worst[i][thread]);
      if (least != kNoCandidate) atomicMin(problem.best + image * query.count + own_query, least);
    }
  }
}

template <class T, int kSteps, bool kResident, Arithmetic kArithmetic>
bool select(const Rows<T>& query, const Rows<T>& key, const Lists& lists, const Problem& problem,
            int64_t blocks, Stream stream) {
  const int chunks = ceil_div(key.row_channels * int(sizeof(T)) / kStepBytes, kSteps);
  const size_t bytes = shared_bytes<kSteps, kResident>(chunks);
  if (bytes > device_limits().shared_bytes) return false;
  LAUNCH((kernel<T, kSteps, kResident, kArithmetic>), dim3(unsigned(blocks)), dim3(kThreads), bytes, stream,
         query, key, lists, problem, chunks);
  return true;
}

// The fewest chunks that leave the queries room to stay; else chunks of which any device holds three with
// their queries.
template <class T, Arithmetic kArithmetic>
void select(const Rows<T>& query, const Rows<T>& key, const Lists& lists, const Problem& problem,
            int64_t blocks, Stream stream) {
  const int steps = key.row_channels * int(sizeof(T)) / kStepBytes;
  const bool sevens = ceil_div(steps, 7) == ceil_div(steps, 8);
  if (steps > 4 && sevens && select<T, 7, true, kArithmetic>(query, key, lists, problem, blocks, stream))
    return;
  if (steps > 4 && !sevens && select<T, 8, true, kArithmetic>(query, key, lists, problem, blocks, stream))
    return;
  if (select<T, 4, true, kArithmetic>(query, key, lists, problem, blocks, stream)) return;
  STD_TORCH_CHECK((select<T, 2, false, kArithmetic>(query, key, lists, problem, blocks, stream)),
                  "the device has too little shared memory");
}
}  // namespace tensor

constexpr int kBlocksPerMultiprocessor = 4;  // of one neighbour: enough to even out the objects' sizes
constexpr int kMostSplits = 64;

std::tuple<Tensor, Tensor> global_matching(const Tensor& query, const Tensor& key, const Tensor& mask,
                                           int64_t neighbors, const std::optional<Tensor>& query_mask,
                                           std::string_view precision) {
  check_shape("query", query, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = query.size(0), height = query.size(2), width = query.size(3);
  check_shape("key", key, {batch, query.size(1), kAnySize, kAnySize, kAnySize});
  check_dtype("key", key, query.scalar_type());
  check_shape("mask", mask, {batch, kAnySize, key.size(2), key.size(3), key.size(4)});
  check_dtype("mask", mask, ScalarType::Bool);
  if (query_mask) {
    check_shape("query_mask", *query_mask, {batch, height, width});
    check_dtype("query_mask", *query_mask, ScalarType::Bool);
  }
  STD_TORCH_CHECK(neighbors >= 1 && neighbors <= kMostPixels, "neighbors must be at least 1");
  const Precision arithmetic = parse_precision(precision);

  const int64_t objects = mask.size(1), queries = height * width, images = batch * objects;
  const std::vector<int64_t> shape{batch, objects, neighbors, height, width};
  Tensor distance = torch::stable::new_empty(query, shape, ScalarType::Float);
  Tensor index = torch::stable::new_empty(query, shape, ScalarType::Long);
  if (distance.numel() == 0) return {distance, index};

  const DeviceScope device(query);
  const Stream stream = device.stream();
  std::optional<Tensor> wanted;
  if (query_mask) wanted = torch::stable::unsqueeze(*query_mask, 1);
  ListMemory list_memory;
  const Lists lists = list_members(mask, stream, list_memory);

  const bool by_fma = query.scalar_type() == ScalarType::Float && arithmetic == Precision::kIeee;
  const int64_t tiles = batch * ceil_div(queries, int64_t{by_fma ? fma::kTileQueries : tensor::kTileQueries});
  const int64_t blocks_wanted =
      int64_t{device_limits().multiprocessors} * (neighbors == 1 ? kBlocksPerMultiprocessor : 1);
  Problem problem{};
  problem.objects = int(objects);
  problem.neighbors = int(neighbors);
  problem.splits = int(std::clamp<int64_t>(ceil_div(blocks_wanted, tiles), 1, kMostSplits));
  STD_TORCH_CHECK(tiles * problem.splits <= kMostPixels && images <= kMostPixels, "too many pixels in all");
  const auto candidates = [&](std::vector<int64_t> sizes) {
    return torch::stable::fill_(torch::stable::new_empty(query, sizes, ScalarType::Long),
                                -1);  // kNoCandidate
  };
  Tensor best = candidates(shape), parts;
  problem.best = static_cast<Candidate*>(best.mutable_data_ptr());
  if (neighbors > 1) {
    parts = candidates({images, queries, problem.splits * kListsPerSplit, neighbors});
    problem.lists = static_cast<Candidate*>(parts.mutable_data_ptr());
  }
  dispatch(query.scalar_type(), [&](auto sample) {
    using S = decltype(sample);
    PackedRows query_memory, key_memory;
    const ScalarType type = query.scalar_type();
    const auto q = pack<S, S>(query, wanted ? &*wanted : nullptr, Side::kQuery, type, stream, query_memory);
    const auto k = pack<S, S>(key, nullptr, Side::kKey, type, stream, key_memory);
    const int64_t blocks = tiles * problem.splits;
    if constexpr (std::is_same_v<S, float>) {
      if (by_fma)
        (neighbors == 1 ? fma::select<true> : fma::select<false>)(q, k, lists, problem, blocks, stream);
      else if (arithmetic == Precision::kTf32)
        tensor::select<S, Arithmetic::kPlain>(q, k, lists, problem, blocks, stream);
      else
        tensor::select<S, Arithmetic::kSplit>(q, k, lists, problem, blocks, stream);
    } else {
      tensor::select<S, Arithmetic::kPlain>(q, k, lists, problem, blocks, stream);
    }
    if (neighbors > 1)
      LAUNCH(merge_kernel, dim3(unsigned(ceil_div(images * queries, int64_t{kThreads}))), dim3(kThreads), 0,
             stream, problem.lists, images, queries, problem.splits * kListsPerSplit, problem.neighbors,
             problem.best);
    finish(problem.best, q, k, batch, problem.objects, problem.neighbors, Slots::kNeighbors, distance, index,
           stream);
  });
  return {distance, index};
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("global_matching", TORCH_BOX(&vosops::cuda::global_matching));
}
