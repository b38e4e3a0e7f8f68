// The k best memory positions of each query on the GPU, exactly, and the reads that follow.
//
// select_kernel: a block of 256 threads owns 64 queries and a share of the memory, 128 positions at a time;
// the scores stay in registers (32 a thread). A thread compares the greatest score of each of its queries
// with that query's bar, the k-th best so far, and only where it reaches the bar each score of it. A score
// that does goes to the query's buffer of 64 in shared memory; a full buffer is merged into the query's
// sorted list by one warp: up to k = 32 a lane holds an entry, and networks of comparisons sort and merge;
// beyond, each element's place is the number of those that come before it. Candidates are ordered by score,
// then position, so neither the order of arrival nor the cut into shares changes the result. Lists stay in
// shared memory up to k = 128 or so. About k ln(M / k) candidates a query and share pass the bar. With 64
// channels a score takes one product of a warp and at least three instructions, so issue bounds the time.
// join_kernel: a warp merges the lists of a query's shares. gather_kernel: a block owns 32 queries x 64
// channels; lanes are channels where the values are channel-last, so that a position is one contiguous read,
// else queries. weight_kernel: a warp per query and chosen position. value_kernel: lanes are positions, each
// walks the queries that chose it, in order: the entries are sorted by position first (a stable sort, by
// torch), so the sums have a fixed order.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "candidates.cuh"
#include "memory_scores.cuh"

namespace vosops::cuda {
namespace {

constexpr int kThreads = kTileThreads, kWarps = kThreads / kWarp;
constexpr int kBuffer = 64;        // candidates that wait, per query
constexpr int kMergeFrom = kWarp;  // as many are worth a merge

__device__ float score_of(Candidate c) {
  const uint32_t bits = uint32_t(c >> 32);
  return 0.f - __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// A score that reached its query's bar, and its position: as it is found, and in order's terms.
using Arrival = Candidate;
__device__ __forceinline__ Arrival arrival(float score, uint32_t position) {
  return candidate(__float_as_uint(score), position);
}
__device__ __forceinline__ Candidate candidate_of(Arrival found) {
  return candidate(ordered(0.f - __uint_as_float(uint32_t(found >> 32))), uint32_t(found));
}

// ---- Sorted lists of up to 32, a lane an entry ----
// This lane's of two entries, its own and that of the lane with the other `bit`: the lesser of them or,
// without `lesser`, the greater.
__device__ __forceinline__ Candidate exchanged(Candidate own, int bit, bool lesser) {
  const Candidate other = __shfl_xor_sync(kAllLanes, own, bit);
  return (other < own) == lesser ? other : own;
}

// Sorts what rises to one lane and falls from there, or falls and rises.
__device__ __forceinline__ Candidate sorted_if_bitonic(Candidate own) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) own = exchanged(own, bit, !(lane & bit));
  return own;
}

// Sorts by a network: runs of 2, 4, 8 ... lanes that rise and fall in turn.
__device__ __forceinline__ Candidate sorted(Candidate own) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int run = 2; run <= kWarp; run *= 2)
#pragma unroll
    for (int bit = run / 2; bit > 0; bit /= 2) own = exchanged(own, bit, !(lane & bit) == !(lane & run));
  return own;
}

// The 32 least of two sorted lists, sorted.
__device__ __forceinline__ Candidate merged(Candidate own, Candidate more) {
  return sorted_if_bitonic(min(own, __shfl_xor_sync(kAllLanes, more, kWarp - 1)));
}

// Merges up to 32 candidates into an ascending list of at most 32 by one warp.
__device__ void merge_short(Candidate* list, int size, const Arrival* found, int count) {
  const int lane = int(threadIdx.x) % kWarp;
  const Candidate best = merged(sorted(lane < count ? candidate_of(found[lane]) : kNoCandidate),
                                lane < size ? list[lane] : kNoCandidate);
  if (lane < size) list[lane] = best;
  __syncwarp();
}

// ---- Sorted lists of any length ----
// Merges `count` candidates, all different, into an ascending list of `size` by one warp. Entries that are
// kNoCandidate do not count. The list's last entries fall out.
__device__ void merge_long(Candidate* list, int size, const Candidate* found, int count) {
  const int lane = int(threadIdx.x) % kWarp;
  constexpr int kParts = kBuffer / kWarp;
  Candidate own[kParts];
  int place[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int i = part * kWarp + lane;
    own[part] = i < count ? found[i] : kNoCandidate;
    int begin = 0, end = own[part] == kNoCandidate ? 0 : size;
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (list[middle] < own[part])
        begin = middle + 1;
      else
        end = middle;
    }
    place[part] = begin;
  }
  for (int i = 0; i < count; ++i)
#pragma unroll
    for (int part = 0; part < kParts; ++part) place[part] += found[i] < own[part];
  __syncwarp();
  for (int first = (size - 1) / kWarp * kWarp; first >= 0; first -= kWarp) {
    const int at = first + lane;
    const Candidate entry = at < size ? list[at] : kNoCandidate;
    int to = at;
    for (int i = 0; i < count; ++i) to += found[i] < entry;
    if (!__any_sync(kAllLanes, to != at)) break;  // nor do those before it move
    __syncwarp();
    if (at < size && to < size) list[to] = entry;
    __syncwarp();
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part)
    if (own[part] != kNoCandidate && place[part] < size) list[place[part]] = own[part];
  __syncwarp();
}

// ---- Selection ----
template <class Tile>
struct SelectSmem {
  typename Tile::Smem tile;
  Arrival found[kTileA][kBuffer];
  float bar[kTileA];  // the score of the list's last, to be exceeded; NaN beyond the last query
  float bias[kTileA];
  int counts[kTileA];  // arrivals since the last merge; more than kBuffer were turned away
  float shrinkage[kTileB], shift[kTileB];  // of the tile's positions; minus infinity beyond the last
};

// Of a multiprocessor: two where that leaves registers enough (not on Ampere, whose copies take more of
// them).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class Tile>
constexpr int kSelectBlocks = 1;
#else
template <class Tile>
constexpr int kSelectBlocks = Tile::kBlocks;
#endif

template <class Tile, bool kSharedLists>
__global__ __launch_bounds__(kThreads,
                             kSelectBlocks<Tile>) void select_kernel(Scores<typename Tile::Element> in,
                                                                     int top_k, int shares,
                                                                     Candidate* lists) {
  using Shared = SelectSmem<Tile>;
  DYNAMIC_SHARED(Shared, s);
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t query_tiles = ceil_div(in.queries, int64_t{kTileA}), share = blockIdx.x % shares;
  const int64_t n = blockIdx.x / shares / query_tiles,
                first_query = blockIdx.x / shares % query_tiles * kTileA;
  const Span span = in.span_of(n);
  const int64_t first_tile = span.begin / kTileB;
  const int64_t tiles = max(ceil_div(span.end, int64_t{kTileB}) - first_tile, int64_t{0});
  const int begin = int(first_tile + tiles * share / shares),
            end = int(first_tile + tiles * (share + 1) / shares);
  const auto global_list = [&](int q) {
    return lists + ((n * in.queries + first_query + q) * shares + share) * top_k;
  };
  const auto list = [&](int q) {
    return kSharedLists ? reinterpret_cast<Candidate*>(&s + 1) + int64_t{q} * top_k : global_list(q);
  };
  // A list in global memory was filled by the host.
  if constexpr (kSharedLists)
    for (int i = thread; i < kTileA * top_k; i += kThreads) list(0)[i] = kNoCandidate;
  if (thread < kTileA) {
    s.bar[thread] = first_query + thread < in.queries ? -INFINITY : NAN;
    s.bias[thread] = in.bias_of(n, min(first_query + thread, in.queries - 1));
    s.counts[thread] = 0;
  }
  // Merges the buffers of this warp's queries that hold at least `least`; fewer may stay.
  const auto merge_buffers = [&](int least) {
    constexpr int kOwn = kTileA / kWarps;
    const int waiting = lane < kOwn ? min(s.counts[warp + lane * kWarps], kBuffer) : 0;
    unsigned full = __ballot_sync(kAllLanes, waiting >= least);
    while (full) {
      VISIT(merges, 1);
      const int own = __ffs(full) - 1, q = warp + own * kWarps;
      full &= full - 1;
      int count = __shfl_sync(kAllLanes, waiting, own);
      if (top_k <= kWarp) {
        for (; count >= least; count -= min(count, kWarp)) {
          VISIT(short_merge, 1);
          merge_short(list(q), top_k, s.found[q] + max(count - kWarp, 0), min(count, kWarp));
        }
      } else {
        VISIT(long_merge, 1);
        for (int i = lane; i < count; i += kWarp) s.found[q][i] = candidate_of(s.found[q][i]);
        __syncwarp();
        merge_long(list(q), top_k, s.found[q], count);
        count = 0;
      }
      if (lane == 0) {
        s.counts[q] = count;
        const Candidate last = list(q)[top_k - 1];
        s.bar[q] = last == kNoCandidate ? -INFINITY : score_of(last);
      }
      __syncwarp();
    }
  };

  for (int tile = begin; tile < end; ++tile) {
    VISIT(tile, 1);
    const int64_t first = int64_t{tile} * kTileB;
    if (thread < kTileB) {  // which the products' barriers make known
      VISIT(vectors, 1);
      const int64_t m = first + thread;
      s.shrinkage[thread] = m < in.memory ? in.shrinkage_of(n, m) : 1.f;
      s.shift[thread] = m < in.memory ? in.shift_of(n, m) : -INFINITY;
    }
    float scores[kOwnA][kOwnB];
    Tile::multiply(s.tile, {in.queries_of(n), first_query, in.queries}, {in.keys_of(n), first, in.memory},
                   in.row_columns, scores);
    float bias[kOwnA], greatest[kOwnA];
#pragma unroll
    for (int i = 0; i < kOwnA; ++i) {
      bias[i] = s.bias[Tile::row(i)];
      greatest[i] = -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kOwnB; ++j) {
      const float shrinkage = s.shrinkage[Tile::column(j)], shift = s.shift[Tile::column(j)];
#pragma unroll
      for (int i = 0; i < kOwnA; ++i) {
        scores[i][j] = fmaf(shrinkage, fmaf(in.scale, scores[i][j], bias[i]), shift);
        greatest[i] = fmaxf(greatest[i], scores[i][j]);
      }
    }
    int again = kept(0);  // the first round has no code of its own
    while (true) {
      VISIT(arrivals, 1);
      int turned_away = 0;
#pragma unroll
      for (int i = 0; i < kOwnA; ++i) {
        const int q = Tile::row(i);
        float bar = s.bar[q];
        if (again) {  // of equal scores the first position wins, which may be one that was turned away
          VISIT(tie, kOwnA);
          bar = nextafterf(bar, -INFINITY);
        }
        if (greatest[i] > bar) {
          VISIT_AT(reached, i, kOwnA);
#pragma unroll
          for (int j = 0; j < kOwnB; ++j)
            if (scores[i][j] > bar) {
              VISIT_AT(candidate, i * kOwnB + j, kOwnA * kOwnB);
              const int slot = atomicAdd(&s.counts[q], 1);
              if (slot < kBuffer) {
                s.found[q][slot] = arrival(scores[i][j], uint32_t(first) + uint32_t(Tile::column(j)));
                scores[i][j] = -INFINITY;  // it needs no other look
              } else {
                turned_away = 1;
              }
            }
        }
      }
      again = __syncthreads_or(turned_away);
      merge_buffers(kMergeFrom);
      if (!again) break;
      __syncthreads();
    }
  }
  __syncthreads();
  merge_buffers(1);
  if constexpr (kSharedLists) {
    __syncthreads();
    const int64_t used = min(int64_t{kTileA}, in.queries - first_query);
    for (int i = thread; i < int(used) * top_k; i += kThreads) global_list(i / top_k)[i % top_k] = list(0)[i];
  }
}

// A warp joins the lists of a query's shares into the first and writes the result.
__global__ __launch_bounds__(kThreads) void join_kernel(Candidate* lists, int64_t batch, int64_t queries,
                                                        int top_k, int shares, float* score, int64_t* index) {
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (at >= batch * queries) return;
  Candidate* joined = lists + at * shares * top_k;
  const int lane = int(threadIdx.x) % kWarp;
  const auto put = [&](int k, Candidate c) {
    const int64_t to = (at / queries * top_k + k) * queries + at % queries;
    score[to] = c == kNoCandidate ? -INFINITY : score_of(c);
    index[to] = c == kNoCandidate ? -1 : int64_t(c & 0xffffffffu);
  };
  if (top_k <= kWarp) {
    VISIT(short_joins, 1);
    Candidate best = kNoCandidate;
    for (int share = 0; share < shares; ++share) {
      VISIT(short_join, 1);
      best = merged(best, lane < top_k ? joined[share * top_k + lane] : kNoCandidate);
    }
    if (lane < top_k) put(lane, best);
  } else {
    VISIT(long_join, 1);
    for (int share = 1; share < shares; ++share) {
      const Candidate* more = joined + int64_t{share} * top_k;
      for (int first = 0; first < top_k && more[first] < joined[top_k - 1]; first += kBuffer)
        merge_long(joined, top_k, more + first, min(kBuffer, top_k - first));
    }
    for (int k = lane; k < top_k; k += kWarp) put(k, joined[k]);
  }
}

// Of the memory, in tiles of positions.
constexpr ShareCosts kShareCosts{.most = 32, .start = 1, .worth = 0.97};

std::tuple<Tensor, Tensor> memory_select(const Tensor& query, const Tensor& key,
                                         const std::optional<Tensor>& shrinkage,
                                         const std::optional<Tensor>& query_bias,
                                         const std::optional<Tensor>& key_bias, double scale,
                                         std::string_view precision, int64_t top_k) {
  const ScoreInputs in{query, key, shrinkage, query_bias, key_bias, scale};
  check_scores(in);
  STD_TORCH_CHECK(top_k >= 1 && top_k <= kMostPixels, "top_k must be at least 1");
  const Products products = score_products(in, parse_precision(precision));
  const std::vector<int64_t> shape{in.batch(), top_k, in.queries()};
  Tensor score = torch::stable::new_empty(query, shape, ScalarType::Float);
  Tensor index = torch::stable::new_empty(query, shape, ScalarType::Long);
  if (score.numel() == 0) return {score, index};
  const DeviceScope device(query);
  const Stream stream = device.stream();
  if (in.memory() == 0) {
    torch::stable::fill_(score, -INFINITY);
    torch::stable::fill_(index, -1);
    return {score, index};
  }
  const int64_t query_tiles = in.batch() * ceil_div(in.queries(), int64_t{kTileA});
  Tensor lists;
  Candidate* candidates = nullptr;
  int shares = 1;
  with_tile(products, key.scalar_type(), [&](auto tile) {
    using Tile = decltype(tile);
    ScoreMemory memory;
    const auto scores = pack_scores<typename Tile::Element>(in, stream, memory);
    const size_t bytes = sizeof(SelectSmem<Tile>), list_bytes = size_t(top_k) * kTileA * sizeof(Candidate);
    const bool in_shared = bytes + list_bytes <= device_limits().shared_bytes;
    shares = choose_shares(query_tiles, ceil_div(in.memory(), int64_t{kTileB}),
                           resident_blocks(Tile::kBlocks, bytes + (in_shared ? list_bytes : 0)), kShareCosts);
    lists = torch::stable::fill_(
        torch::stable::new_empty(query, std::vector<int64_t>{in.batch(), in.queries(), shares, top_k},
                                 ScalarType::Long),
        -1);  // kNoCandidate
    candidates = static_cast<Candidate*>(lists.mutable_data_ptr());
    const dim3 blocks(checked_blocks(query_tiles * shares));
    if (in_shared)
      LAUNCH((select_kernel<Tile, true>), blocks, dim3(kThreads), bytes + list_bytes, stream, scores,
             int(top_k), shares, candidates);
    else
      LAUNCH((select_kernel<Tile, false>), blocks, dim3(kThreads), bytes, stream, scores, int(top_k), shares,
             candidates);
  });
  LAUNCH(join_kernel, dim3(checked_blocks(ceil_div(in.batch() * in.queries(), int64_t{kWarps}))),
         dim3(kThreads), 0, stream, candidates, in.batch(), in.queries(), int(top_k), shares,
         score.mutable_data_ptr<float>(), index.mutable_data_ptr<int64_t>());
  return {score, index};
}

// ---- Gather ----
// weight and index are contiguous (N, K, P); an image is one object of one batch element.
template <class S>
struct Gather {
  const float* weight;
  const int64_t* index;
  const S *value, *grad;  // grad as rows [N][P][grad_columns] of the channels of all objects
  int64_t batch_stride, object_stride, channel_stride, pixel_stride;
  int64_t batch, objects, channels, memory, top_k, queries, grad_columns;

  __device__ const S* image(int64_t image) const {
    return value + image / objects * batch_stride + image % objects * object_stride;
  }
  __device__ const S* grad_of(int64_t image, int64_t p) const {
    return grad + (image / objects * queries + p) * grad_columns + image % objects * channels;
  }
  __device__ int64_t entry(int64_t n, int64_t k, int64_t p) const { return (n * top_k + k) * queries + p; }
};

constexpr int kGatherQueries = 32, kGatherChannels = 64;
static_assert(kGatherQueries == kWarp);

struct GatherSmem {
  float sums[kGatherChannels][kGatherQueries + 1];
};

template <class S>
__global__ __launch_bounds__(kThreads, 4) void gather_kernel(Gather<S> in, S* out) {
  DYNAMIC_SHARED(GatherSmem, s);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t channel_tiles = ceil_div(in.channels, int64_t{kGatherChannels}),
                query_tiles = ceil_div(in.queries, int64_t{kGatherQueries});
  const int64_t first_channel = blockIdx.x % channel_tiles * kGatherChannels,
                rest = blockIdx.x / channel_tiles;
  const int64_t first_query = rest % query_tiles * kGatherQueries, image = rest / query_tiles,
                n = image / in.objects;
  const S* values = in.image(image);
  if (in.channel_stride == 1) {
    for (int q = warp; q < kGatherQueries && first_query + q < in.queries; q += kWarps) {
      float sums[kGatherChannels / kWarp] = {};
      for (int64_t first = 0; first < in.top_k; first += kWarp) {
        int own = -1;
        float own_weight = 0;
        if (first + lane < in.top_k) {
          const int64_t at = in.entry(n, first + lane, first_query + q);
          own = int(in.index[at]);
          own_weight = in.weight[at];
        }
        const int count = int(min(in.top_k - first, int64_t{kWarp}));
#pragma unroll 4
        for (int k = 0; k < count; ++k) {
          const int64_t m = __shfl_sync(kAllLanes, own, k);
          const float weight = __shfl_sync(kAllLanes, own_weight, k);
#pragma unroll
          for (int i = 0; i < kGatherChannels / kWarp; ++i) {
            const int64_t c = first_channel + i * kWarp + lane;
            if (m >= 0 && c < in.channels)
              sums[i] = fmaf(weight, to_float(values[m * in.pixel_stride + c]), sums[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kGatherChannels / kWarp; ++i) s.sums[i * kWarp + lane][q] = sums[i];
    }
  } else if (first_query + lane < in.queries) {
    constexpr int kOwn = kGatherChannels / kWarps;
    float sums[kOwn] = {};
    for (int64_t k = 0; k < in.top_k; ++k) {
      const int64_t at = in.entry(n, k, first_query + lane), m = in.index[at];
      if (m < 0) continue;
      const float weight = in.weight[at];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int64_t c = first_channel + warp * kOwn + i;
        if (c < in.channels)
          sums[i] = fmaf(weight, to_float(values[m * in.pixel_stride + c * in.channel_stride]), sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) s.sums[warp * kOwn + i][lane] = sums[i];
  }
  __syncthreads();
  for (int c = warp; c < kGatherChannels && first_channel + c < in.channels; c += kWarps)
    if (first_query + lane < in.queries)
      out[(image * in.channels + first_channel + c) * in.queries + first_query + lane] =
          from_float<S>(s.sums[c][lane]);
}

// The gradient of a weight: a warp per entry, the product of its query's gradient with the value it chose.
template <class S>
__global__ __launch_bounds__(kThreads) void weight_kernel(Gather<S> in, float* grad_weight) {
  VISIT(tile, 1);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (at >= in.batch * in.top_k * in.queries) return;
  const int64_t n = at / in.queries / in.top_k, p = at % in.queries, m = in.index[at];
  float sum = 0;
  if (m >= 0)
    for (int64_t o = 0; o < in.objects; ++o) {
      VISIT(object, 1);
      const S* values = in.image(n * in.objects + o) + m * in.pixel_stride;
      const S* grads = in.grad_of(n * in.objects + o, p);
      for (int64_t c = lane; c < in.channels; c += kWarp) {
        VISIT_LOADS(channel, 2);
        sum = fmaf(to_float(values[c * in.channel_stride]), to_float(grads[c]), sum);
      }
    }
  for (int bits = 1; bits < kWarp; bits *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  if (lane == 0) grad_weight[at] = sum;
}

// The first of `count` ascending keys that is at least `key`.
__device__ int64_t first_at_least(const int64_t* keys, int64_t count, int64_t key) {
  int64_t begin = 0, end = count;
  while (begin < end) {
    VISIT(probe, 2);
    const int64_t middle = (begin + end) / 2;
    if (keys[middle] < key)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The gradient of the values: a lane per position, a warp per channel. `keys` are the indices in ascending
// order, `order` the entries that they come from.
template <class S>
__global__ __launch_bounds__(kThreads) void value_kernel(Gather<S> in, const int64_t* keys,
                                                         const int64_t* order, S* grad_value) {
  VISIT(tile, 1);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t channel_tiles = ceil_div(in.channels, int64_t{kGatherChannels}),
                memory_tiles = ceil_div(in.memory, int64_t{kWarp});
  const int64_t first_channel = blockIdx.x % channel_tiles * kGatherChannels,
                rest = blockIdx.x / channel_tiles;
  const int64_t m = rest % memory_tiles * kWarp + lane, image = rest / memory_tiles, n = image / in.objects;
  if (m >= in.memory) return;
  const int64_t entries = in.top_k * in.queries;
  keys += n * entries;
  order += n * entries;
  const int64_t begin = first_at_least(keys, entries, m), end = first_at_least(keys, entries, m + 1);
  constexpr int kOwn = kGatherChannels / kWarps;
  float sums[kOwn] = {};
  const S* grads_of_image = in.grad_of(image, 0) + first_channel;
  for (int64_t i = begin; i < end; ++i) {
    VISIT(entry, 1);
    const float weight = in.weight[n * entries + order[i]];
    const S* grads = grads_of_image + order[i] % in.queries * in.grad_columns;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int64_t c = warp * kOwn + own;
      if (first_channel + c < in.channels) sums[own] = fmaf(weight, to_float(grads[c]), sums[own]);
    }
  }
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int64_t c = first_channel + warp * kOwn + own;
    if (c < in.channels) grad_value[(image * in.channels + c) * in.memory + m] = from_float<S>(sums[own]);
  }
}

void check_gather(const Tensor& weight, const Tensor& index, const Tensor& value) {
  check_shape("value", value, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("weight", weight, {value.size(0), kAnySize, kAnySize});
  check_dtype("weight", weight, ScalarType::Float);
  check_shape("index", index, {value.size(0), weight.size(1), weight.size(2)});
  check_dtype("index", index, ScalarType::Long);
  STD_TORCH_CHECK(value.size(3) <= kMostPixels, "a batch element is limited to 2^31 - 1 positions");
}

template <class S>
Gather<S> gather_of(const Tensor& weight, const Tensor& index, const Tensor& value, const Tensor* grad) {
  return {weight.const_data_ptr<float>(),
          index.const_data_ptr<int64_t>(),
          static_cast<const S*>(value.const_data_ptr()),
          grad ? static_cast<const S*>(grad->const_data_ptr()) : nullptr,
          value.stride(0),
          value.stride(1),
          value.stride(2),
          value.stride(3),
          value.size(0),
          value.size(1),
          value.size(2),
          value.size(3),
          weight.size(1),
          weight.size(2),
          grad ? grad->size(2) : 0};
}

Tensor memory_gather(const Tensor& weight, const Tensor& index, const Tensor& value) {
  check_gather(weight, index, value);
  Tensor out = torch::stable::new_empty(
      value, std::vector<int64_t>{value.size(0), value.size(1), value.size(2), weight.size(2)});
  if (out.numel() == 0) return out;
  const DeviceScope device(value);
  const Tensor weights = torch::stable::contiguous(weight), indices = torch::stable::contiguous(index);
  const int64_t blocks = value.size(0) * value.size(1) * ceil_div(weight.size(2), int64_t{kGatherQueries}) *
                         ceil_div(value.size(2), int64_t{kGatherChannels});
  dispatch(value.scalar_type(), [&](auto sample) {
    using S = decltype(sample);
    LAUNCH(gather_kernel<S>, dim3(checked_blocks(blocks)), dim3(kThreads), sizeof(GatherSmem),
           device.stream(), gather_of<S>(weights, indices, value, nullptr),
           static_cast<S*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor> memory_gather_backward(const Tensor& grad, const Tensor& weight,
                                                  const Tensor& index, const Tensor& value) {
  check_gather(weight, index, value);
  check_shape("grad", grad, {value.size(0), value.size(1), value.size(2), weight.size(2)});
  check_dtype("grad", grad, value.scalar_type());
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  if (grad_weight.numel() == 0 && grad_value.numel() == 0) return {grad_weight, grad_value};
  const DeviceScope device(value);
  const Tensor weights = torch::stable::contiguous(weight), indices = torch::stable::contiguous(index);
  const int64_t entries = weight.size(1) * weight.size(2);
  const int64_t blocks = value.size(0) * value.size(1) * ceil_div(value.size(3), int64_t{kWarp}) *
                         ceil_div(value.size(2), int64_t{kGatherChannels});
  const auto [keys, order] =
      stable_sort(torch::stable::view(indices, std::vector<int64_t>{value.size(0), entries}));
  dispatch(value.scalar_type(), [&](auto sample) {
    using S = decltype(sample);
    const Tensor grads = rows_of<S>(
        torch::stable::reshape(
            grad, std::vector<int64_t>{value.size(0), value.size(1) * value.size(2), weight.size(2)}),
        2, 1, false, device.stream());
    const Gather<S> in = gather_of<S>(weights, indices, value, &grads);
    LAUNCH(weight_kernel<S>, dim3(checked_blocks(ceil_div(value.size(0) * entries, int64_t{kWarps}))),
           dim3(kThreads), 0, device.stream(), in, grad_weight.mutable_data_ptr<float>());
    if (grad_value.numel() > 0)
      LAUNCH(value_kernel<S>, dim3(checked_blocks(blocks)), dim3(kThreads), 0, device.stream(), in,
             keys.template const_data_ptr<int64_t>(), order.template const_data_ptr<int64_t>(),
             static_cast<S*>(grad_value.mutable_data_ptr()));
  });
  return {grad_weight, grad_value};
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("memory_select", TORCH_BOX(&vosops::cuda::memory_select));
  m.impl("memory_gather", TORCH_BOX(&vosops::cuda::memory_gather));
  m.impl("memory_gather_backward", TORCH_BOX(&vosops::cuda::memory_gather_backward));
}
