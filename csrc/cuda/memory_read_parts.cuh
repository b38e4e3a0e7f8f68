// What the kernels of the memory read share: where values are, where results go, what a block works on, how
// the memory is cut, and the running softmax of a query.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "memory_scores.cuh"

namespace vosops::cuda {

constexpr int kTileMemory = 32;  // positions that are read between two looks at the maximum

// (N, O, C, M) of any strides; columns are the channels of all objects.
template <class V>
struct Values {
  const V* data;
  int64_t batch_stride, object_stride, channel_stride, pixel_stride;
  int channels, columns;

  __device__ int64_t offset(int column) const {
    return column / channels * object_stride + column % channels * channel_stride;
  }
};

template <class V>
Values<V> values_of(const Tensor& value) {
  STD_TORCH_CHECK(value.size(1) * value.size(2) <= kMostPixels / 4, "too many value channels");
  return {static_cast<const V*>(value.const_data_ptr()),
          value.stride(0),
          value.stride(1),
          value.stride(2),
          value.stride(3),
          int(value.size(2)),
          int(value.size(1) * value.size(2))};
}

// Where results go: the op's outputs, or with several shares of the memory parts of them.
template <class V>
struct Target {
  V* out;           // [N][columns][P]
  float* lse;       // [N][P]
  float* part_out;  // [shares][N][columns][P]
  float* part_lse;  // [shares][N][P]
  int shares;
};

// The number of shares that fills the multiprocessors best; a few more shares must be worth their merge.
inline int choose_read_shares(int64_t blocks, int64_t memory) {
  constexpr int kMostShares = 16;
  const int64_t tiles = ceil_div(memory, int64_t{kTileMemory}),
                multiprocessors = device_limits().multiprocessors;
  int best = 1;
  double least = 0;
  for (int shares = 1; shares <= std::min<int64_t>(tiles, kMostShares); ++shares) {
    const double time = double(ceil_div(blocks * shares, multiprocessors)) / shares + 0.01 * shares;
    if (shares == 1 || time < 0.95 * least) {
      best = shares;
      least = time;
    }
  }
  return best;
}

// What a block works on.
struct Share {
  int share, column_tile;
  int64_t n, first_query, begin, end;  // positions [begin, end)

  template <class E>
  __device__ Share(const Scores<E>& in, int tile_queries, int column_tiles, int shares) {
    int64_t block = blockIdx.x;
    share = int(block % shares);
    block /= shares;
    column_tile = int(block % column_tiles);
    block /= column_tiles;
    const int64_t tiles = ceil_div(in.queries, int64_t{tile_queries});
    first_query = block % tiles * tile_queries;
    n = block / tiles;
    // Whole tiles from the one with the first position that is read.
    const Span span = in.span_of(n);
    const int64_t first = span.begin / kTileMemory * kTileMemory;
    const int64_t memory_tiles = max(ceil_div(span.end - first, int64_t{kTileMemory}), int64_t{0});
    begin = first + memory_tiles * share / shares * kTileMemory;
    end = max(begin, min(first + memory_tiles * (share + 1) / shares * kTileMemory, span.end));
  }
};

template <class V>
struct Writer {
  const Target<V>& target;
  int64_t n, batch, queries;
  int columns, share;

  __device__ void out(int column, int64_t p, float x) const {
    const int64_t at = (n * columns + column) * queries + p;
    if (target.shares == 1)
      target.out[at] = from_float<V>(x);
    else
      target.part_out[share * batch * columns * queries + at] = x;
  }
  __device__ void lse(int64_t p, float x) const {
    const int64_t at = n * queries + p;
    if (target.shares == 1)
      target.lse[at] = x;
    else
      target.part_lse[share * batch * queries + at] = x;
  }
};

// The running softmax of one query.
struct Running {
  float maximum = -INFINITY, sum = 0;

  // Takes a tile's maximum in; returns what earlier sums are to be multiplied by.
  __device__ float raise(float greatest) {
    const float before = maximum;
    maximum = fmaxf(maximum, greatest);
    const float rescale = exp2f((before - base()) * kLog2E);
    sum *= rescale;
    return rescale;
  }
  __device__ float base() const { return maximum == -INFINITY ? 0.f : maximum; }
  __device__ float weight(float score) const { return exp2f((score - base()) * kLog2E); }

  // The same with a maximum that may lag behind the greatest score by kLag, so that sums seldom need a
  // rescale: weights are at most 2^8.
  static constexpr float kLag = 8 / kLog2E;
  __device__ bool lags(float greatest) const { return greatest > maximum + kLag; }
  __device__ float raise_to(float greatest) {
    const float before = maximum * kLog2E;
    maximum = greatest;
    const float rescale = exp2_approximate(before - base() * kLog2E);
    sum *= rescale;
    return rescale;
  }
  static __device__ float lse(float base, float sum) { return sum == 0 ? -INFINITY : base + logf(sum); }
  static __device__ float inverse(float sum) { return sum == 0 ? 0.f : 1 / sum; }
};

}  // namespace vosops::cuda
