// Usage on the GPU: the sum of each memory position's weights over the queries, from the saved log-sum-exp.
//
// A block owns kTileB positions and goes through all queries, kTileA at a time: scores come out of the
// product of both in registers, become weights exp(score - lse) and are added up per position; the threads
// that share a position add their sums in a fixed order at the end. Keys are read once, queries once per
// block from the second-level cache. Products bound the time: 2 C operations per pair of query and position.
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

template <class Tile>
__global__ __launch_bounds__(kTileThreads, Tile::kBlocks) void usage_kernel(Scores<typename Tile::Element> in,
                                                                            const float* lse, float* usage) {
  using Shared = UsageSmem<Tile>;
  DYNAMIC_SHARED(Shared, s);
  const int64_t tiles = ceil_div(in.memory, int64_t{kTileB}), n = blockIdx.x / tiles,
                first = blockIdx.x % tiles * kTileB;
  float shrinkage[kOwnB], shift[kOwnB], sums[kOwnB] = {};
#pragma unroll
  for (int j = 0; j < kOwnB; ++j) {
    const int64_t m = min(first + Tile::column(j), in.memory - 1);
    shrinkage[j] = in.shrinkage_of(n, m);
    shift[j] = in.shift_of(n, m);
  }
  for (int64_t p0 = 0; p0 < in.queries; p0 += kTileA) {
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
  usage[n * in.memory + m] = total;
}

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
    LAUNCH(usage_kernel<Tile>, dim3(checked_blocks(in.batch() * ceil_div(in.memory(), int64_t{kTileB}))),
           dim3(kTileThreads), sizeof(UsageSmem<Tile>), device.stream(), scores, lses.const_data_ptr<float>(),
           usage.mutable_data_ptr<float>());
  });
  return usage;
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("memory_usage", TORCH_BOX(&vosops::cuda::memory_usage));
}
