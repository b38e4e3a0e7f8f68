// What local and global matching share around their inner loops.
//
// pack:    the strided, channel-major input becomes rows of contiguous channels (a row per pixel, zeros
// behind the last
//          channel), so that inner loops copy 16 bytes at a time and know no strides; NaN and infinity become
//          zeros there and live on in one number per pixel: half the squared norm of a key (+inf: it never
//          wins), the state of a query.
// select:  the ops' own kernels minimise |k|^2 / 2 - q.k and keep a Candidate per slot and query.
// finish:  recomputes the distance of each chosen pixel as sum (q - k)^2 and writes both outputs.
//
// Bytes: pack reads and writes each input once (a copy of both inputs in all), finish reads two rows per slot
// and query.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "candidates.cuh"
#include "host.cuh"

namespace vosops::cuda {

constexpr int kObjectsPerWord = 32;
// ---- Pack ----
// A frame or several: (N, C, T, H, W) of any strides.
template <class S>
struct Pixels {
  const S* data;
  int64_t batch_stride, channel_stride, frame_stride, y_stride, x_stride;
  int channels, frames, height, width;

  __host__ __device__ int64_t count() const { return int64_t{frames} * height * width; }
  __host__ __device__ int64_t offset(int64_t n, int64_t pixel) const {
    const unsigned row = unsigned(pixel) / unsigned(width), x = unsigned(pixel) % unsigned(width);
    return n * batch_stride + row / unsigned(height) * frame_stride + row % unsigned(height) * y_stride +
           x * x_stride;
  }
};

template <class S>
Pixels<S> pixels(const Tensor& tensor) {
  const bool frames = tensor.dim() == 5;
  const int y = frames ? 3 : 2;
  const int64_t planes = frames ? tensor.size(2) : 1, rows = tensor.size(y), columns = tensor.size(y + 1);
  STD_TORCH_CHECK(rows == 0 || columns == 0 || planes <= kMostPixels / rows / columns,
                  "2^31 pixels or more in one batch element");
  return {static_cast<const S*>(tensor.const_data_ptr()),
          tensor.stride(0),
          tensor.stride(1),
          frames ? tensor.stride(2) : 0,
          tensor.stride(y),
          tensor.stride(y + 1),
          int(tensor.size(1)),
          int(planes),
          int(rows),
          int(columns)};
}

// Rows of pixels, and what belongs to each pixel.
template <class E>
struct Rows {
  E* rows;            // [N][count][row_channels]
  float* half_norm;   // [N][count], of keys: |k|^2 / 2, +inf if k is not finite
  float* state;       // [N][count], of queries: 0, +inf (skip it) or NaN (it has a NaN channel)
  unsigned* objects;  // [N][words][count], of the keys of local matching: the objects that a pixel belongs to
  int64_t count;
  int row_channels;
};

constexpr int kRowGranule = 16;  // channels of a row are padded to a multiple of this
constexpr int kPackPixels = 32, kPackChannels = 64, kPackThreads = 256,
              kPackLanes = kPackThreads / kPackPixels;

struct PackSmem {
  int64_t offset[kPackPixels];
  float tile[kPackPixels][kPackChannels + 1];
};

// A block packs 32 pixels, 64 channels at a time. `mask` is the mask of queries or of one object's keys (N,
// 1, H, W), the masks of objects (N, O, H, W), or absent (data null).
template <class S, class E>
__global__ __launch_bounds__(kPackThreads) void pack_kernel(Pixels<S> source, Pixels<bool> mask,
                                                            Rows<E> out) {
  DYNAMIC_SHARED(PackSmem, s);
  const int64_t count = source.count();
  const unsigned tiles = unsigned(ceil_div(count, int64_t{kPackPixels}));
  const int64_t n = blockIdx.x / tiles, first = blockIdx.x % tiles * int64_t{kPackPixels};
  const bool channels_innermost = source.channel_stride == 1;
  const int own = int(threadIdx.x) / kPackLanes, own_lane = int(threadIdx.x) % kPackLanes;
  float square = 0;
  bool infinite = false, undefined = false;
  if (threadIdx.x < kPackPixels)
    s.offset[threadIdx.x] = source.offset(n, min(first + int64_t{threadIdx.x}, count - 1));
  __syncthreads();
  for (int start = 0; start < out.row_channels; start += kPackChannels) {
    for (int i = int(threadIdx.x); i < kPackPixels * kPackChannels; i += kPackThreads) {
      const int pixel = channels_innermost ? i / kPackChannels : i % kPackPixels;
      const int channel = channels_innermost ? i % kPackChannels : i / kPackPixels;
      const bool inside = first + pixel < count && start + channel < source.channels;
      s.tile[pixel][channel] =
          inside ? to_float(source.data[s.offset[pixel] + (start + channel) * source.channel_stride]) : 0.f;
    }
    __syncthreads();
    for (int channel = own_lane; channel < kPackChannels; channel += kPackLanes) {
      const float x = s.tile[own][channel];
      infinite |= !is_finite(x);
      undefined |= x != x;
      square += is_finite(x) ? x * x : 0.f;
    }
    const int columns = min(kPackChannels, out.row_channels - start);
    for (int i = int(threadIdx.x); i < kPackPixels * columns; i += kPackThreads) {
      const int pixel = i / columns, channel = i % columns;
      const float x = s.tile[pixel][channel];
      if (first + pixel < count)
        out.rows[(n * count + first + pixel) * out.row_channels + start + channel] =
            from_float<E>(is_finite(x) ? x : 0.f);
    }
    __syncthreads();
  }
  for (int bits = 1; bits < kPackLanes; bits *= 2) square += __shfl_xor_sync(kAllLanes, square, bits);
  const unsigned group = (1u << kPackLanes) - 1;
  const int shift = int(threadIdx.x) % kWarp / kPackLanes * kPackLanes;
  infinite = __ballot_sync(kAllLanes, infinite) >> shift & group;
  undefined = __ballot_sync(kAllLanes, undefined) >> shift & group;
  const int64_t pixel = first + own;
  if (pixel >= count) return;
  const bool skipped = own_lane == 0 && mask.data && !out.objects && !mask.data[mask.offset(n, pixel)];
  if (out.half_norm && own_lane == 0)
    out.half_norm[n * count + pixel] = infinite || skipped ? INFINITY : 0.5f * square;
  if (out.state && own_lane == 0) {
    out.state[n * count + pixel] = skipped ? INFINITY : undefined ? NAN : infinite ? INFINITY : 0.f;
  }
  if (out.objects) {
    const int words = ceil_div(mask.channels, kObjectsPerWord);
    for (int word = own_lane; word < words; word += kPackLanes) {
      unsigned bits = 0;
      const int last = min(mask.channels - word * kObjectsPerWord, kObjectsPerWord);
      for (int o = 0; o < last; ++o)
        bits |=
            unsigned(mask.data[mask.offset(n, pixel) + (word * kObjectsPerWord + o) * mask.channel_stride])
            << o;
      out.objects[(n * words + word) * count + pixel] = bits;
    }
  }
}

// The memory behind Rows: freed with this object (in stream order, as torch does).
struct PackedRows {
  Tensor rows, per_pixel, objects;
};

enum class Side { kQuery, kKey, kKeyWithObjects };

template <class S, class E>
Rows<E> pack(const Tensor& tensor, const Tensor* mask, Side side, ScalarType row_type, Stream stream,
             PackedRows& memory) {
  const Pixels<S> source = pixels<S>(tensor);
  const int64_t batch = tensor.size(0), count = source.count();
  STD_TORCH_CHECK(count <= kMostPixels, "a batch element is limited to 2^31 - 1 pixels");
  Rows<E> out{};
  out.count = count;
  out.row_channels = ceil_div(source.channels, kRowGranule) * kRowGranule;
  memory.rows =
      torch::stable::new_empty(tensor, std::vector<int64_t>{batch, count, out.row_channels}, row_type);
  memory.per_pixel = torch::stable::new_empty(tensor, std::vector<int64_t>{batch, count}, ScalarType::Float);
  out.rows = static_cast<E*>(memory.rows.mutable_data_ptr());
  auto* numbers = static_cast<float*>(memory.per_pixel.mutable_data_ptr());
  (side == Side::kQuery ? out.state : out.half_norm) = numbers;
  if (side == Side::kKeyWithObjects) {
    const int64_t words = ceil_div(mask->size(1), int64_t{kObjectsPerWord});
    memory.objects =
        torch::stable::new_empty(tensor, std::vector<int64_t>{batch, words, count}, ScalarType::Int);
    out.objects = static_cast<unsigned*>(memory.objects.mutable_data_ptr());
  }
  const int64_t blocks = batch * ceil_div(count, int64_t{kPackPixels});
  LAUNCH((pack_kernel<S, E>), dim3(checked_blocks(blocks)), dim3(kPackThreads), sizeof(PackSmem), stream,
         source, mask ? pixels<bool>(*mask) : Pixels<bool>{}, out);
  return out;
}

// ---- Finish ----
enum class Slots { kRings, kNeighbors };

constexpr int kFinishLanes = 8, kFinishThreads = 256;

__device__ __forceinline__ bool closer(float d, int64_t i, float than_d, int64_t than_i) {
  return d < than_d || (d == than_d && i >= 0 && i < than_i);
}

// Eight lanes per object and query. Rings: a slot that an inner ring beats takes its pixel. Neighbours:
// sorted again, since the recomputed distances may differ in their last bits.
template <class E>
__global__ __launch_bounds__(kFinishThreads) void finish_kernel(const Candidate* best, Rows<E> query,
                                                                Rows<E> key, int64_t batch, int objects,
                                                                int slots, Slots kind, float* distance,
                                                                int64_t* index) {
  const int lane = int(threadIdx.x) % kFinishLanes;
  const int64_t group = (int64_t{blockIdx.x} * kFinishThreads + threadIdx.x) / kFinishLanes;
  const bool live = group < batch * objects * query.count;
  const int64_t p = live ? group % query.count : 0, image = live ? group / query.count : 0,
                n = image / objects;
  const float state = query.state[n * query.count + p];
  const E* q = query.rows + (n * query.count + p) * query.row_channels;
  float best_d = INFINITY;
  int64_t best_i = -1;
  for (int slot = 0; slot < slots; ++slot) {
    const int64_t at = (image * slots + slot) * query.count + p;
    const Candidate c = live && state == 0 ? best[at] : kNoCandidate;
    int64_t i = c == kNoCandidate ? -1 : int64_t(c & 0xffffffffu);
    float d = 0;
    if (i >= 0) {
      const E* k = key.rows + (n * key.count + i) * key.row_channels;
      for (int first = lane * Vector<E>::kSize; first < key.row_channels;
           first += kFinishLanes * Vector<E>::kSize) {
        const auto a = *reinterpret_cast<const Vector<E>*>(q + first);
        const auto b = *reinterpret_cast<const Vector<E>*>(k + first);
#pragma unroll
        for (int j = 0; j < Vector<E>::kSize; ++j) {
          const float difference = to_float(a.values[j]) - to_float(b.values[j]);
          d += difference * difference;
        }
      }
    }
    for (int bits = 1; bits < kFinishLanes; bits *= 2) d += __shfl_xor_sync(kAllLanes, d, bits);
    if (i < 0 || !(d < INFINITY)) {
      d = state == state ? INFINITY : NAN;
      i = -1;
    }
    if (!live || lane != 0) continue;
    int64_t to = at;
    if (kind == Slots::kRings) {
      if (slot > 0 && closer(best_d, best_i, d, i)) {
        d = best_d;
        i = best_i;
      }
      best_d = d;
      best_i = i;
    } else {
      for (; to >= query.count && to - query.count >= image * slots * query.count; to -= query.count) {
        const int64_t before = to - query.count;
        if (!closer(d, i, distance[before], index[before])) break;
        distance[to] = distance[before];
        index[to] = index[before];
      }
    }
    distance[to] = d;
    index[to] = i;
  }
}

template <class E>
void finish(const Candidate* best, const Rows<E>& query, const Rows<E>& key, int64_t batch, int objects,
            int slots, Slots kind, Tensor& distance, Tensor& index, Stream stream) {
  const int64_t blocks = ceil_div(batch * objects * query.count * kFinishLanes, int64_t{kFinishThreads});
  LAUNCH(finish_kernel<E>, dim3(checked_blocks(blocks)), dim3(kFinishThreads), 0, stream, best, query, key,
         batch, objects, slots, kind, distance.mutable_data_ptr<float>(), index.mutable_data_ptr<int64_t>());
}

}  // namespace vosops::cuda
