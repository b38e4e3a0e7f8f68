// Global matching on the GPU: for every query pixel and object the nearest key pixels of the object in all
// reference frames.
//
// The key pixels of each object are listed first (count, then place, in ascending order), so that inner loops
// have no mask. fma_kernel (float32, IEEE): a matrix product with a minimum behind it. A block owns 128
// queries and walks a share of the tiles of 128 listed keys, object after object; each of its 256 threads
// holds 8 x 8 scores in registers. Queries and keys come 8 channels at a time through a double buffer filled
// by cp.async, 12 KB a stage; the pitch of 12 floats keeps 16-byte reads free of bank conflicts. A tile moves
// 8 KB a chunk from the second-level cache for 131 K FMAs, 1024 cycles: FMAs bound it. The best of each
// thread's queries waits in shared memory, and goes by atomicMin (any order gives the same result) to global
// memory when the object changes. With several neighbours the scores of a tile go through shared memory, and
// two threads per query keep sorted lists, which merge_kernel joins.
#include <algorithm>
#include <tuple>

#include "intrinsics.cuh"
#include "matching.cuh"

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
constexpr int kTileQueries = 128, kTileKeys = 128, kThreads = 256;
constexpr int kListsPerSplit = kThreads / kTileQueries;

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

  __device__ Share(const Problem& problem, const Lists& lists, int64_t queries) {
    const int64_t tiles = ceil_div(queries, int64_t{kTileQueries});
    int64_t block = blockIdx.x;
    split = int(block % problem.splits);
    block /= problem.splits;
    first_query = block % tiles * kTileQueries;
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
  Candidate best[kPerThread][kThreads];  // each thread's own
};
struct ScoresSmem : Smem {
  float scores[kTileQueries][kTileKeys + 1];
};

template <bool kOneNeighbor>
__global__ __launch_bounds__(kThreads, kOneNeighbor ? 2 : 1) void kernel(Rows<float> query, Rows<float> key,
                                                                         Lists lists, Problem problem) {
  using Shared = std::conditional_t<kOneNeighbor, Smem, ScoresSmem>;
  DYNAMIC_SHARED(Shared, s);
  const int thread = int(threadIdx.x), tx = thread % kSide, ty = thread / kSide;
  const Share share(problem, lists, query.count);
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
         kOneNeighbor ? sizeof(Smem) : sizeof(ScoresSmem), stream, query, key, lists, problem);
}
}  // namespace fma

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
  parse_precision(precision);

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

  const int64_t tiles = batch * ceil_div(queries, int64_t{kTileQueries});
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
    const auto q = pack<S, float>(query, wanted ? &*wanted : nullptr, Side::kQuery, ScalarType::Float, stream,
                                  query_memory);
    const auto k = pack<S, float>(key, nullptr, Side::kKey, ScalarType::Float, stream, key_memory);
    (neighbors == 1 ? fma::select<true> : fma::select<false>)(q, k, lists, problem, tiles * problem.splits,
                                                              stream);
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
