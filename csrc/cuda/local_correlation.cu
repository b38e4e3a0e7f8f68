// Local correlation on the GPU, and its two gradients, with displacements d of a patch:
//   correlate  out[d,o]  = sum over channels of query[c,u(o)] key[c,u(o) + d]
//   weigh      gq[c,u]   = sum over d of grad[d,o] key[c,u + d], u = u(o); the key's gradient is the same
//   with
//              every displacement mirrored: gk[c,v] = sum over d of grad[d,o] query[c,v - d], v - d = u(o)
// Every result is gathered by one thread in a fixed order. A warp is 32 neighbours of a row of outputs or
// pixels, so that for stride 1 every load is of 32 adjacent entries. correlate: a thread owns one output
// times 16 displacements in x (16 sums), a warp a row of the patch; weigh: a thread owns a pixel times 16
// channels. Each FMA needs one load from the first-level cache: at best a quarter of the FMA rate. Bytes: the
// output or grad once, maps a few times from L2. At 120 x 214, C = 64, 31 x 31 displacements (3.0 GFLOP,
// 99 MB of output) an H100 takes 30 us for memory, 45 us for FMAs, 180 us for loads, 700 us for addresses.
#include <algorithm>
#include <vector>

#include "host.cuh"

namespace vosops::cuda {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int kWarps = 8;
constexpr int kOwn = 16;  // displacements or channels of a thread
constexpr int64_t kMostOption = 1 << 20;

struct Axis {
  int size, outputs, patch, stride, padding, dilation;

  __device__ bool contains(int64_t place) const { return place >= 0 && place < size; }
  __device__ int64_t shift(int position) const { return int64_t{position - (patch - 1) / 2} * dilation; }
  __device__ int64_t pixel(int output) const { return int64_t{output} * stride - padding; }
  // The output that looks at a pixel of the query, -1 if none does.
  __device__ int output_of(int64_t pixel) const {
    const int64_t place = pixel + padding;
    return place % stride == 0 && place / stride < outputs ? int(place / stride) : -1;
  }
};

struct Geometry {
  Axis y, x;
  int64_t batch, channels;
};

// Maps (N,C,H,W) of any strides, in entries.
template <class S>
struct Maps {
  S* data;
  int64_t n, c, y, x;
};

// Grad (N,PH,PW,oH,oW) of any strides.
template <class S>
struct Grads {
  const S* data;
  int64_t n, i, j, y, x;
};

// A block owns 32 outputs of a row, kWarps rows of the patch and kOwn of its columns.
template <class T>
__global__ __launch_bounds__(kWarps* kWarp) void correlate_kernel(Maps<const T> query, Maps<const T> key,
                                                                  Geometry g, T* out) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int64_t block = blockIdx.x;
  const auto next = [&](int count) {
    const int number = int(block % count);
    block /= count;
    return number;
  };
  const int ox = next(ceil_div(g.x.outputs, kWarp)) * kWarp + lane;
  const int j0 = next(ceil_div(g.x.patch, kOwn)) * kOwn;
  const int i = next(ceil_div(g.y.patch, kWarps)) * kWarps + warp;
  const int oy = next(g.y.outputs);
  const int64_t n = block;
  if (ox >= g.x.outputs || i >= g.y.patch) return;
  VISIT(tile, 1);

  const int64_t y = g.y.pixel(oy), x = g.x.pixel(ox), row = y + g.y.shift(i), first = x + g.x.shift(j0);
  const bool exists = g.y.contains(y) && g.x.contains(x) && g.y.contains(row);
  const auto inside = [&](int j) {
    return exists && j0 + j < g.x.patch && g.x.contains(first + int64_t{j} * g.x.dilation);
  };
  float sums[kOwn] = {};
  if (exists) {
    const T* own = query.data + n * query.n + y * query.y + x * query.x;
    const T* others = key.data + n * key.n + row * key.y + first * key.x;
    const int64_t step = int64_t{g.x.dilation} * key.x;
    for (int64_t c = 0; c < g.channels; ++c, own += query.c, others += key.c) {
      VISIT(channel, 1);
      const float here = to_float(*own);
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (inside(j)) sums[j] = fmaf(here, to_float(others[j * step]), sums[j]);
    }
  }
  T* to = out + (((n * g.y.patch + i) * g.x.patch + j0) * g.y.outputs + oy) * g.x.outputs + ox;
#pragma unroll
  for (int j = 0; j < kOwn; ++j)
    if (j0 + j < g.x.patch) to[int64_t{j} * g.y.outputs * g.x.outputs] = from_float<T>(sums[j]);
}

// A block owns 32 pixels of a row and kWarps groups of kOwn channels; maps: the key where kOfQuery.
template <class T, bool kOfQuery>
__global__ __launch_bounds__(kWarps* kWarp) void weigh_kernel(Grads<T> grads, Maps<const T> maps, Geometry g,
                                                              T* out) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int64_t block = blockIdx.x;
  const auto next = [&](int64_t count) {
    const int64_t number = block % count;
    block /= count;
    return number;
  };
  const int x = int(next(ceil_div(g.x.size, kWarp))) * kWarp + lane;
  const int64_t channel0 = (next(ceil_div(g.channels, int64_t{kWarps * kOwn})) * kWarps + warp) * kOwn;
  const int y = int(next(g.y.size));
  const int64_t n = block;
  if (x >= g.x.size || channel0 >= g.channels) return;
  VISIT(tile, 1);

  float sums[kOwn] = {};
  const T* weights = grads.data + n * grads.n;
  const T* others = maps.data + n * maps.n + channel0 * maps.c;
  for (int i = 0; i < g.y.patch; ++i) {
    VISIT(patch_row, 1);
    const int64_t row = kOfQuery ? y + g.y.shift(i) : y - g.y.shift(i);
    if (!g.y.contains(row)) continue;
    const int oy = g.y.output_of(kOfQuery ? y : row);
    if (oy < 0) continue;
    for (int j = 0; j < g.x.patch; ++j) {
      VISIT(displacement, 1);
      const int64_t column = kOfQuery ? x + g.x.shift(j) : x - g.x.shift(j);
      if (!g.x.contains(column)) continue;
      const int ox = g.x.output_of(kOfQuery ? x : column);
      if (ox < 0) continue;
      const float weight = to_float(weights[i * grads.i + j * grads.j + oy * grads.y + ox * grads.x]);
      const T* other = others + row * maps.y + column * maps.x;
#pragma unroll
      for (int c = 0; c < kOwn; ++c)
        if (channel0 + c < g.channels) sums[c] = fmaf(weight, to_float(other[c * maps.c]), sums[c]);
    }
  }
  T* to = out + ((n * g.channels + channel0) * g.y.size + y) * g.x.size + x;
#pragma unroll
  for (int c = 0; c < kOwn; ++c)
    if (channel0 + c < g.channels) to[int64_t{c} * g.y.size * g.x.size] = from_float<T>(sums[c]);
}

// ---- Hosts ----
Geometry geometry_of(const Tensor& map, IntHeaderOnlyArrayRef patch, IntHeaderOnlyArrayRef stride,
                     IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation) {
  for (const auto& each : {patch, stride, padding, dilation})
    STD_TORCH_CHECK(each.size() == 2, "patch_size, stride, padding and dilation_patch must have two numbers");
  const auto axis = [&](int i) {
    const int64_t size = map.size(2 + i);
    for (int64_t option : {patch[i], stride[i], dilation[i]})
      STD_TORCH_CHECK(option >= 1 && option <= kMostOption,
                      "patch_size, stride and dilation_patch must be from 1 to ",
                      std::to_string(kMostOption));
    STD_TORCH_CHECK(padding[i] >= 0 && padding[i] <= kMostOption, "padding must be from 0 to ",
                    std::to_string(kMostOption));
    STD_TORCH_CHECK(size <= kMostPixels / 2, "the maps are too large");
    const int64_t last = size + 2 * padding[i] - 1;
    const int64_t outputs = last < 0 ? 0 : last / stride[i] + 1;
    return Axis{int(size), int(outputs), int(patch[i]), int(stride[i]), int(padding[i]), int(dilation[i])};
  };
  return {axis(0), axis(1), map.size(0), map.size(1)};
}

template <class T>
Maps<const T> read_from(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Tensor local_correlation(const Tensor& query, const Tensor& key, IntHeaderOnlyArrayRef patch,
                         IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
                         IntHeaderOnlyArrayRef dilation) {
  check_shape("query", query, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("key", key, {query.size(0), query.size(1), query.size(2), query.size(3)});
  check_dtype("key", key, query.scalar_type());
  const Geometry g = geometry_of(query, patch, stride, padding, dilation);
  const std::vector<int64_t> sizes{g.batch, g.y.patch, g.x.patch, g.y.outputs, g.x.outputs};
  Tensor out = torch::stable::new_empty(query, sizes);
  if (out.numel() == 0) return out;
  const DeviceScope device(query);
  const unsigned blocks = checked_blocks(g.batch * g.y.outputs * ceil_div(g.y.patch, kWarps) *
                                         ceil_div(g.x.patch, kOwn) * ceil_div(g.x.outputs, kWarp));
  dispatch(query.scalar_type(), [&](auto sample) {
    using T = decltype(sample);
    LAUNCH(correlate_kernel<T>, dim3(blocks), dim3(kWarps * kWarp), 0, device.stream(), read_from<T>(query),
           read_from<T>(key), g, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

template <bool kOfQuery>
Tensor local_correlation_gradient(const Tensor& grad, const Tensor& map, IntHeaderOnlyArrayRef patch,
                                  IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
                                  IntHeaderOnlyArrayRef dilation) {
  check_shape(kOfQuery ? "key" : "query", map, {kAnySize, kAnySize, kAnySize, kAnySize});
  const Geometry g = geometry_of(map, patch, stride, padding, dilation);
  check_shape("grad", grad, {g.batch, g.y.patch, g.x.patch, g.y.outputs, g.x.outputs});
  check_dtype("grad", grad, map.scalar_type());
  Tensor out = torch::stable::new_empty(map, map.sizes());
  if (out.numel() == 0) return out;
  const DeviceScope device(map);
  const unsigned blocks = checked_blocks(g.batch * g.y.size * ceil_div(g.channels, int64_t{kWarps * kOwn}) *
                                         ceil_div(g.x.size, kWarp));
  dispatch(map.scalar_type(), [&](auto sample) {
    using T = decltype(sample);
    const Grads<T> grads{static_cast<const T*>(grad.const_data_ptr()),
                         grad.stride(0),
                         grad.stride(1),
                         grad.stride(2),
                         grad.stride(3),
                         grad.stride(4)};
    LAUNCH((weigh_kernel<T, kOfQuery>), dim3(blocks), dim3(kWarps * kWarp), 0, device.stream(), grads,
           read_from<T>(map), g, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("local_correlation", TORCH_BOX(&vosops::cuda::local_correlation));
  m.impl("local_correlation_query", TORCH_BOX(&vosops::cuda::local_correlation_gradient<true>));
  m.impl("local_correlation_key", TORCH_BOX(&vosops::cuda::local_correlation_gradient<false>));
}
