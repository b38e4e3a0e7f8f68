// Usage on the GPU: the sum of each memory position's weights over the queries, from the saved log-sum-exp.
//
// A block owns kTileB positions and goes through a share of the queries, kTileA at a time: scores come out of
// the product of both in registers, become weights exp(score - lse) and are added up per position; the
// threads that share a position add their sums in a fixed order at the end. Where the memory makes fewer
// blocks than the multiprocessors hold, the queries are cut into shares, whose sums sum_kernel adds in their
// order. Keys are read once, queries once per block from the second-level cache. Products bound the time: 2 C
// operations per pair of query and position.
#include <algorithm>
#include <optional>
#include <string_view>

#include "memory_scores.cuh"

namespace vosops::cuda {
namespace {

template <class Tile>
struct UsageSmem {
  typename Tile::Smem tile;
  float sums[kSharers][kTileB];
};

// usage[share][N][M]
template <class Tile>
__global__ __launch_bounds__(kTileThreads, Tile::kBlocks) void usage_kernel(Scores<typename Tile::Element> in,
                                                                            const float* lse, int64_t batch,
                                                                            int shares, float* usage) {
  using Shared = UsageSmem<Tile>;
  DYNAMIC_SHARED(Shared, s);
  const int64_t tiles = ceil_div(in.memory, int64_t{kTileB}), block = blockIdx.x / shares, n = block / tiles,
                first = block % tiles * kTileB;
  const int share = int(blockIdx.x % shares);
  const int64_t query_tiles = ceil_div(in.queries, int64_t{kTileA});
  const int64_t begin = query_tiles * share / shares * kTileA,
                end = min(query_tiles * (share + 1) / shares * kTileA, in.queries);
  usage += (share * batch + n) * in.memory;
  const Span span = in.span_of(n);
  if (first >= span.end || first + kTileB <= span.begin) {
    VISIT(unread, 1);
    if (threadIdx.x < kTileB && first + threadIdx.x < in.memory) usage[first + threadIdx.x] = 0;
    return;
  }
  float shrinkage[kOwnB], shift[kOwnB], sums[kOwnB] = {};
#pragma unroll
  for (int j = 0; j < kOwnB; ++j) {
    const int64_t m = min(first + Tile::column(j), in.memory - 1);
    shrinkage[j] = in.shrinkage_of(n, m);
    shift[j] = in.shift_of(n, m);
  }
  for (int64_t p0 = begin; p0 < end; p0 += kTileA) {
    VISIT(tile, 1);
    float products[kOwnA][kOwnB];
    Tile::multiply(s.tile, {in.queries_of(n), p0, in.queries}, {in.keys_of(n), first, in.memory},
                   in.row_columns, products);
#pragma unroll
    for (int i = 0; i < kOwnA; ++i) {
      const int64_t p = p0 + Tile::row(i), read = min(p, in.queries - 1);
      const float bias = in.bias_of(n, read), query_lse = lse[n * in.queries + read];
      const bool reads = p < in.queries && query_lse != -INFINITY;
#pragma unroll
      for (int j = 0; j < kOwnB; ++j) {
        VISIT(score, 2 * kOwnA * kOwnB);  // nvcc has code with and without biases of queries
        const float score = fmaf(shrinkage[j], fmaf(in.scale, products[i][j], bias), shift[j]);
        if (reads) sums[j] += exp2f((score - query_lse) * kLog2E);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kOwnB; ++j) s.sums[Tile::sharer()][Tile::column(j)] = sums[j];
  __syncthreads();
  const int64_t m = first + threadIdx.x;
  if (threadIdx.x >= kTileB || m >= in.memory) return;
  float total = 0;
  for (int i = 0; i < kSharers; ++i) total += s.sums[i][threadIdx.x];
  usage[m] = in.reads(n, m) ? total : 0.f;
}

__global__ __launch_bounds__(kTileThreads) void sum_kernel(const float* parts, int shares, int64_t count,
                                                           float* usage) {
  const int64_t at = int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  if (at >= count) return;
  float sum = 0;
  for (int share = 0; share < shares; ++share) sum += parts[share * count + at];
  usage[at] = sum;
}

// Of the queries, in tiles of them; the sums of a share cost time, too.
constexpr ShareCosts kShareCosts{.most = 16, .start = 2, .worth = 0.9};

Tensor memory_usage(const Tensor& query, const Tensor& key, const std::optional<Tensor>& shrinkage,
                    const std::optional<Tensor>& query_bias, const std::optional<Tensor>& key_bias,
                    double scale, std::string_view precision, const Tensor& lse) {
  const ScoreInputs in{query, key, shrinkage, query_bias, key_bias, scale};
  check_scores(in);
  check_shape("lse", lse, {in.batch(), in.queries()});
  check_dtype("lse", lse, ScalarType::Float);
  const Products products = score_products(in, parse_precision(precision));
  Tensor usage = torch::stable::new_empty(lse, std::vector<int64_t>{in.batch(), in.memory()});
  if (usage.numel() == 0) return usage;
  const DeviceScope device(query);
  if (in.queries() == 0) return torch::stable::fill_(usage, 0);
  const Tensor lses = torch::stable::contiguous(lse);
  with_tile(products, key.scalar_type(), [&](auto tile) {
    using Tile = decltype(tile);
    ScoreMemory memory;
    const auto scores = pack_scores<typename Tile::Element>(in, device.stream(), memory);
    const int64_t blocks = in.batch() * ceil_div(in.memory(), int64_t{kTileB}), count = usage.numel();
    const int shares = choose_shares(blocks, ceil_div(in.queries(), int64_t{kTileA}),
                                     resident_blocks(Tile::kBlocks, sizeof(UsageSmem<Tile>)), kShareCosts);
    const Tensor parts =
        shares == 1 ? usage : torch::stable::new_empty(usage, std::vector<int64_t>{shares, count});
    LAUNCH(usage_kernel<Tile>, dim3(checked_blocks(blocks * shares)), dim3(kTileThreads),
           sizeof(UsageSmem<Tile>), device.stream(), scores, lses.const_data_ptr<float>(), in.batch(), shares,
           parts.mutable_data_ptr<float>());
    if (shares > 1)
      LAUNCH(sum_kernel, dim3(checked_blocks(ceil_div(count, int64_t{kTileThreads}))), dim3(kTileThreads), 0,
             device.stream(), parts.const_data_ptr<float>(), shares, count, usage.mutable_data_ptr<float>());
  });
  return usage;
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("memory_usage", TORCH_BOX(&vosops::cuda::memory_usage));
}
