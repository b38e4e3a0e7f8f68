// Backward of local and global matching on the GPU, deterministic: sums have a fixed order, nothing is added
// by atomics.
//
// query_kernel: a warp owns a query pixel, lanes are channels; it reads one key row per slot and writes one
// row of gradients. The gradients of keys are a segmented sum over the entries (slot, query) sorted by key (a
// stable sort, by torch). chunk_kernel: a block owns 64 sorted entries, threads are channels. A segment that
// lies inside the chunk is written at once; the parts of segments that cross the chunk's ends (at most two)
// wait in `carried`. join_kernel: the chunk in which a crossing segment begins adds its parts in order.
// unpack_kernel: float32 rows of channels become the channel-major result, 32 pixels x 64 channels through
// shared memory. Rows make every read and write contiguous; each entry moves two rows, which bounds the time.
#include <tuple>

#include "matching.cuh"

namespace vosops::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kChunkEntries = 64, kChunkThreads = 128;

// One entry per slot and query: [N][slots][queries].
struct Entries {
  const float* grad;
  const int64_t* index;
  int slots;
};

// Entries by ascending key; those without a key (-1) come first.
struct Sorted {
  const int64_t* key;    // [N][count]
  const int64_t* entry;  // [N][count]
  int64_t count, chunks;
};

template <class S>
__global__ __launch_bounds__(kThreads) void query_kernel(Entries entries, Rows<S> query, Rows<S> key,
                                                         unsigned tiles, int channels, float* grad) {
  VISIT(tile, 1);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t n = blockIdx.x / tiles, p = int64_t{blockIdx.x % tiles} * kWarps + threadIdx.x / kWarp;
  if (p >= query.count) return;
  const int64_t pixel = n * query.count + p;
  for (int c = lane; c < channels; c += kWarp) {
    VISIT(channel, 1);
    const float q = to_float(query.rows[pixel * query.row_channels + c]);
    float sum = 0;
    for (int slot = 0; slot < entries.slots; ++slot) {
      VISIT_LOADS(slot, 3);
      const int64_t at = (n * entries.slots + slot) * query.count + p, m = entries.index[at];
      if (m >= 0)
        sum += entries.grad[at] * (q - to_float(key.rows[(n * key.count + m) * key.row_channels + c]));
    }
    grad[pixel * channels + c] = 2 * sum;
  }
}

struct ChunkSmem {
  int64_t key[kChunkEntries + 2];  // with the neighbours in the chunks before and after; -1 beyond the ends
  int64_t query[kChunkEntries];
  float grad[kChunkEntries];
};

enum Carried { kFromBefore, kIntoNext, kCarried };

template <class S>
__global__ __launch_bounds__(kChunkThreads) void chunk_kernel(Entries entries, Sorted sorted, Rows<S> query,
                                                              Rows<S> key, int channels, float* grad,
                                                              float* carried) {
  VISIT(tile, 1);
  DYNAMIC_SHARED(ChunkSmem, s);
  const int64_t n = blockIdx.x / unsigned(sorted.chunks),
                first = blockIdx.x % unsigned(sorted.chunks) * int64_t{kChunkEntries};
  const int size = int(min(int64_t{kChunkEntries}, sorted.count - first));
  for (int i = int(threadIdx.x); i < size + 2; i += kChunkThreads) {
    VISIT_LOADS(sorted_key, 1);
    const int64_t at = first + i - 1;
    s.key[i] = at >= 0 && at < sorted.count ? sorted.key[n * sorted.count + at] : -1;
  }
  for (int i = int(threadIdx.x); i < size; i += kChunkThreads) {
    VISIT_LOADS(sorted_entry, 2);
    const int64_t entry = sorted.entry[n * sorted.count + first + i];
    s.query[i] = entry % query.count;
    s.grad[i] = entries.grad[n * sorted.count + entry];
  }
  __syncthreads();
  for (int c = int(threadIdx.x); c < channels; c += kChunkThreads) {
    VISIT(channel, 1);
    float sum = 0;
    bool from_before = s.key[1] == s.key[0];
    for (int i = 0; i < size; ++i) {
      VISIT_LOADS(entry, 2);
      const int64_t m = s.key[i + 1];
      if (m >= 0) {
        const float k = to_float(key.rows[(n * key.count + m) * key.row_channels + c]);
        sum +=
            s.grad[i] * (to_float(query.rows[(n * query.count + s.query[i]) * query.row_channels + c]) - k);
      }
      const bool into_next = s.key[i + 2] == m;
      if (into_next && i + 1 < size) continue;
      if (m >= 0) {
        if (from_before || into_next)
          carried[(int64_t{blockIdx.x} * kCarried + (from_before ? kFromBefore : kIntoNext)) * channels + c] =
              sum;
        else
          grad[(n * key.count + m) * channels + c] = -2 * sum;
      }
      sum = 0;
      from_before = false;
    }
  }
}

__global__ __launch_bounds__(kChunkThreads) void join_kernel(Sorted sorted, int64_t keys, int channels,
                                                             const float* carried, float* grad) {
  const int64_t n = blockIdx.x / sorted.chunks, chunk = blockIdx.x % sorted.chunks;
  const auto key_at = [&](int64_t at) {
    return at >= 0 && at < sorted.count ? sorted.key[n * sorted.count + at] : -1;
  };
  const int64_t first = chunk * kChunkEntries, last = first + kChunkEntries - 1, m = key_at(last);
  if (m < 0 || key_at(last + 1) != m) return;                // no segment goes on behind this chunk,
  if (key_at(first) == m && key_at(first - 1) == m) return;  // or it began before
  for (int c = int(threadIdx.x); c < channels; c += kChunkThreads) {
    float sum = carried[(int64_t{blockIdx.x} * kCarried + kIntoNext) * channels + c];
    for (int64_t next = chunk + 1; key_at(next * kChunkEntries) == m; ++next)
      sum += carried[((n * sorted.chunks + next) * kCarried + kFromBefore) * channels + c];
    grad[(n * keys + m) * channels + c] = -2 * sum;
  }
}

constexpr int kUnpackPixels = 32, kUnpackChannels = 64;

struct UnpackSmem {
  float tile[kUnpackChannels][kUnpackPixels + 1];
};

template <class S>
__global__ __launch_bounds__(kThreads) void unpack_kernel(const float* rows, int64_t count, int channels,
                                                          S* out) {
  DYNAMIC_SHARED(UnpackSmem, s);
  const unsigned tiles = unsigned(ceil_div(count, int64_t{kUnpackPixels}));
  const int64_t n = blockIdx.x / tiles, first = blockIdx.x % tiles * int64_t{kUnpackPixels};
  for (int start = 0; start < channels; start += kUnpackChannels) {
    for (int i = int(threadIdx.x); i < kUnpackPixels * kUnpackChannels; i += kThreads) {
      const int pixel = i / kUnpackChannels, c = i % kUnpackChannels;
      const bool inside = first + pixel < count && start + c < channels;
      s.tile[c][pixel] = inside ? rows[(n * count + first + pixel) * channels + start + c] : 0.f;
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < kUnpackPixels * kUnpackChannels; i += kThreads) {
      const int pixel = i % kUnpackPixels, c = i / kUnpackPixels;
      if (first + pixel < count && start + c < channels)
        out[(n * channels + start + c) * count + first + pixel] = from_float<S>(s.tile[c][pixel]);
    }
    __syncthreads();
  }
}

template <class S>
void backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& index,
              Tensor& grad_query, Tensor& grad_key, Stream stream) {
  const int64_t batch = query.size(0), queries = query.size(2), keys = key.size(2), slots = grad.size(1);
  const int channels = int(query.size(1));
  const ScalarType type = query.scalar_type();
  PackedRows query_memory, key_memory;
  const auto q =
      pack<S, S>(torch::stable::unsqueeze(query, 2), nullptr, Side::kQuery, type, stream, query_memory);
  const auto k = pack<S, S>(torch::stable::unsqueeze(key, 2), nullptr, Side::kKey, type, stream, key_memory);
  const Entries entries{grad.const_data_ptr<float>(), index.const_data_ptr<int64_t>(), int(slots)};
  const auto numbers = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(query, shape, ScalarType::Float);
  };
  const auto unpack = [&](const Tensor& rows, int64_t count, Tensor& out) {
    LAUNCH(unpack_kernel<S>, dim3(unsigned(batch * ceil_div(count, int64_t{kUnpackPixels}))), dim3(kThreads),
           sizeof(UnpackSmem), stream, rows.const_data_ptr<float>(), count, channels,
           static_cast<S*>(out.mutable_data_ptr()));
  };

  Tensor rows = numbers({batch, queries, channels});
  const int64_t tiles = ceil_div(queries, int64_t{kWarps});
  STD_TORCH_CHECK(batch * tiles <= kMostPixels, "too many pixels in all");
  LAUNCH(query_kernel<S>, dim3(unsigned(batch * tiles)), dim3(kThreads), 0, stream, entries, q, k,
         unsigned(tiles), channels, rows.mutable_data_ptr<float>());
  unpack(rows, queries, grad_query);

  const auto [sorted_keys, order] =
      stable_sort(torch::stable::view(index, std::vector<int64_t>{batch, slots * queries}));
  const Sorted sorted{sorted_keys.template const_data_ptr<int64_t>(),
                      order.template const_data_ptr<int64_t>(), slots * queries,
                      ceil_div(slots * queries, int64_t{kChunkEntries})};
  STD_TORCH_CHECK(batch * sorted.chunks <= kMostPixels, "too many entries");
  Tensor key_rows = torch::stable::fill_(numbers({batch, keys, channels}), 0);
  Tensor carried = numbers({batch, sorted.chunks, kCarried, channels});
  float* key_sums = key_rows.mutable_data_ptr<float>();
  float* parts = carried.mutable_data_ptr<float>();
  LAUNCH(chunk_kernel<S>, dim3(unsigned(batch * sorted.chunks)), dim3(kChunkThreads), sizeof(ChunkSmem),
         stream, entries, sorted, q, k, channels, key_sums, parts);
  LAUNCH(join_kernel, dim3(unsigned(batch * sorted.chunks)), dim3(kChunkThreads), 0, stream, sorted, keys,
         channels, parts, key_sums);
  unpack(key_rows, keys, grad_key);
}

std::tuple<Tensor, Tensor> matching_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                             const Tensor& index) {
  check_shape("query", query, {kAnySize, kAnySize, kAnySize});
  check_shape("key", key, {query.size(0), query.size(1), kAnySize});
  check_dtype("key", key, query.scalar_type());
  check_shape("grad", grad, {query.size(0), kAnySize, query.size(2)});
  check_dtype("grad", grad, ScalarType::Float);
  check_shape("index", index, {query.size(0), grad.size(1), query.size(2)});
  check_dtype("index", index, ScalarType::Long);
  Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  Tensor grad_key = torch::stable::new_empty(key, key.sizes());
  if (query.size(0) == 0 || query.size(1) == 0) return {grad_query, grad_key};
  const DeviceScope device(query);
  if (grad.numel() == 0) {
    torch::stable::fill_(grad_query, 0);
    torch::stable::fill_(grad_key, 0);
    return {grad_query, grad_key};
  }
  const Tensor grads = torch::stable::contiguous(grad), indices = torch::stable::contiguous(index);
  dispatch(query.scalar_type(), [&](auto sample) {
    backward<decltype(sample)>(grads, query, key, indices, grad_query, grad_key, device.stream());
  });
  return {grad_query, grad_key};
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("matching_backward", TORCH_BOX(&vosops::cuda::matching_backward));
}
