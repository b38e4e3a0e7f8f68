// Local matching on the GPU: for every query pixel and object the nearest key pixel of the object within a
// window.
//
// fma_kernel (float32, IEEE): a block owns 8 x 4 queries of one phase of the dilation (all pixels that share
// y % dilation and x % dilation form an image of their own, with dilation 1). A warp owns a query row, its
// lanes are 32 vertical shifts, and a thread holds the scores of 4 queries times 16 horizontal shifts in
// registers: 19 key pixels and 4 query pixels are read from shared memory for 64 FMAs a channel. Keys (39 x
// 19 pixels) and queries come 8 channels at a time through a double buffer filled by cp.async, 37 KB a stage;
// the pitch of 12 floats keeps 16-byte reads free of bank conflicts. For a radius of 15 the block moves 6.2
// KB a channel for 31 K useful FMAs, 240 cycles: FMAs and shared-memory reads bound it, not bytes. Windows
// without any object's pixel are skipped. The best of a query lives in global memory, touched by one lane
// only.
#include <algorithm>
#include <tuple>

#include "intrinsics.cuh"
#include "matching.cuh"

namespace vosops::cuda {
namespace {

constexpr int kMostRings = 32;

struct Window {
  int height, width;  // of the frame
  int dilation;
  int phases_y, phases_x;  // images with dilation 1 that the frame consists of
  int objects, words, rings;
  int radius[kMostRings];  // in shifts, that is in multiples of the dilation

  __host__ __device__ int reach() const { return radius[rings - 1]; }
};

// One phase of the dilation as an image of its own.
struct Phase {
  const Window& window;
  int height, width, first;

  __device__ Phase(const Window& window, int phase) : window(window) {
    const int y = phase / window.phases_x, x = phase % window.phases_x;
    height = ceil_div(window.height - y, window.dilation);
    width = ceil_div(window.width - x, window.dilation);
    first = y * window.width + x;
  }
  __device__ bool contains(int y, int x) const {
    return unsigned(y) < unsigned(height) && unsigned(x) < unsigned(width);
  }
  __device__ int pixel(int y, int x) const { return first + (y * window.width + x) * window.dilation; }
};

// ---- float32 FMA kernel ----
namespace fma {
constexpr int kTileY = 8, kTileX = 4;
constexpr int kShiftsX = 16, kShiftsY = kWarp;
constexpr int kRows = kTileY + kShiftsY - 1, kColumns = kTileX + kShiftsX - 1;
constexpr int kKeys = kRows * kColumns, kQueries = kTileY * kTileX;
constexpr int kChunk = 8, kPitch = kChunk + 4, kVectors = kChunk / 4;
constexpr int kThreads = kTileY * kWarp;

struct Smem {
  alignas(16) float rows[2][kKeys + kQueries][kPitch];
  float half_norm[kKeys];
  unsigned objects[kKeys];
};

// Which of the shifts dx0 + j have |dx| and |dy| within the radius, as bits j.
__device__ unsigned shifts_within(int radius, int dx0, int dy) {
  const int first = max(0, -radius - dx0), last = min(kShiftsX - 1, radius - dx0);
  return abs(dy) <= radius && first <= last ? (2u << last) - (1u << first) : 0;
}

__global__ __launch_bounds__(kThreads, 2) void kernel(Rows<float> query, Rows<float> key, Window window,
                                                      int tiles_y, int tiles_x, Candidate* best) {
  DYNAMIC_SHARED(Smem, s);
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  int64_t block = blockIdx.x;
  const int tile_x = int(block % tiles_x);
  block /= tiles_x;
  const int tile_y = int(block % tiles_y);
  block /= tiles_y;
  const int phases = window.phases_y * window.phases_x;
  const Phase image(window, int(block % phases));
  const int n = int(block / phases);
  const int y0 = tile_y * kTileY, x0 = tile_x * kTileX;
  if (y0 >= image.height || x0 >= image.width) return;

  const auto slot = [&](int object, int ring, int pixel) -> Candidate& {
    return best[((int64_t{n} * window.objects + object) * window.rings + ring) * query.count + pixel];
  };

  bool wanted = false;
  if (thread < kQueries) {
    const int y = y0 + thread / kTileX, x = x0 + thread % kTileX;
    if (image.contains(y, x)) {
      wanted = query.state[n * query.count + image.pixel(y, x)] == 0;
      for (int object = 0; object < window.objects; ++object)
        for (int ring = 0; ring < window.rings; ++ring) slot(object, ring, image.pixel(y, x)) = kNoCandidate;
    }
  }
  if (!__syncthreads_or(wanted)) return;

  const int reach = window.reach();
  for (int word = 0; word < window.words; ++word) {
    for (int dy0 = -reach; dy0 <= reach; dy0 += kShiftsY) {
      if (y0 + dy0 + kRows <= 0 || y0 + dy0 >= image.height) continue;
      for (int dx0 = -reach; dx0 <= reach; dx0 += kShiftsX) {
        if (x0 + dx0 + kColumns <= 0 || x0 + dx0 >= image.width) continue;

        bool occupied = false;
        for (int i = thread; i < kKeys; i += kThreads) {
          const int y = y0 + dy0 + i / kColumns, x = x0 + dx0 + i % kColumns;
          float half_norm = INFINITY;
          unsigned objects = 0;
          if (image.contains(y, x)) {
            half_norm = key.half_norm[n * key.count + image.pixel(y, x)];
            objects = key.objects[(n * window.words + word) * key.count + image.pixel(y, x)];
          }
          s.half_norm[i] = half_norm;
          s.objects[i] = objects;
          occupied |= objects != 0 && half_norm < INFINITY;
        }
        if (!__syncthreads_or(occupied)) continue;

        const auto stage = [&](int chunk) {
#pragma unroll 1
          for (int i = thread; i < (kKeys + kQueries) * kVectors; i += kThreads) {
            const int pixel = i / kVectors, channel = chunk * kChunk + i % kVectors * 4;
            const bool is_key = pixel < kKeys;
            const int q = pixel - kKeys;
            const int y = y0 + (is_key ? dy0 + pixel / kColumns : q / kTileX);
            const int x = x0 + (is_key ? dx0 + pixel % kColumns : q % kTileX);
            const bool inside = image.contains(y, x);
            const float* rows = is_key ? key.rows : query.rows;
            const int64_t row = inside ? n * key.count + image.pixel(y, x) : 0;
            copy_async<16>(&s.rows[chunk % 2][pixel][i % kVectors * 4],
                           rows + row * key.row_channels + channel, inside ? 16 : 0);
          }
          copy_async_commit();
        };

        float dot[kTileX][kShiftsX] = {};
        const int chunks = key.row_channels / kChunk;
        stage(0);
        for (int chunk = 0; chunk < chunks; ++chunk) {
          copy_async_wait<0>();
          __syncthreads();
          if (chunk + 1 < chunks) stage(chunk + 1);
          const auto& rows = s.rows[chunk % 2];
#pragma unroll 1
          for (int v = 0; v < kVectors; ++v) {
            float4 q[kTileX];
#pragma unroll
            for (int i = 0; i < kTileX; ++i)
              q[i] = *reinterpret_cast<const float4*>(&rows[kKeys + warp * kTileX + i][4 * v]);
#pragma unroll
            for (int column = 0; column < kColumns; ++column) {
              const float4 k =
                  *reinterpret_cast<const float4*>(&rows[(warp + lane) * kColumns + column][4 * v]);
#pragma unroll
              for (int i = 0; i < kTileX; ++i) {
                const int j = column - i;
                if (j < 0 || j >= kShiftsX) continue;
                dot[i][j] =
                    fmaf(q[i].w, k.w, fmaf(q[i].z, k.z, fmaf(q[i].y, k.y, fmaf(q[i].x, k.x, dot[i][j]))));
              }
            }
          }
        }

        // The best of the 8 shifts of each lane, then of the 32 lanes, for every object and ring.
        const int y = y0 + warp, dy = dy0 + lane, key_row = warp + lane;
        unsigned present = 0;
        for (int column = 0; column < kColumns; ++column) present |= s.objects[key_row * kColumns + column];
        present = __reduce_or_sync(kAllLanes, present);
        if (y >= image.height) present = 0;
#pragma unroll
        for (int i = 0; i < kTileX; ++i)
#pragma unroll
          for (int j = 0; j < kShiftsX; ++j)
            dot[i][j] =
                s.half_norm[key_row * kColumns + i + j] - dot[i][j] + 0.f;  // the score; never negative zero
        for (; present; present &= present - 1) {
          const int bit = __ffs(int(present)) - 1, object = word * kObjectsPerWord + bit;
          unsigned members = 0;  // the columns of the lane's key row that belong to the object
#pragma unroll 1
          for (int column = 0; column < kColumns; ++column)
            members |= (s.objects[key_row * kColumns + column] >> bit & 1) << column;
          for (int ring = 0; ring < window.rings; ++ring) {
            const unsigned shifts = shifts_within(window.radius[ring], dx0, dy) &
                                    ~(ring == 0 ? 0 : shifts_within(window.radius[ring - 1], dx0, dy));
#pragma unroll
            for (int i = 0; i < kTileX; ++i) {
              const unsigned allowed = members >> i & shifts;
              float least = INFINITY;
              int shift = 0;
#pragma unroll
              for (int j = 0; j < kShiftsX; ++j) {
                if ((allowed >> j & 1) && dot[i][j] < least) {
                  least = dot[i][j];
                  shift = j;
                }
              }
              const uint32_t mine = least < INFINITY ? ordered(least) : ~0u;
              const uint32_t lowest = __reduce_min_sync(kAllLanes, mine);
              if (lowest == ~0u || x0 + i >= image.width) continue;
              const uint32_t index = uint32_t(image.pixel(y + dy, x0 + i + dx0 + shift));
              const uint32_t first = __reduce_min_sync(kAllLanes, mine == lowest ? index : ~0u);
              if (lane == 0) {
                Candidate& current = slot(object, ring, image.pixel(y, x0 + i));
                current = min(current, candidate(lowest, first));
              }
            }
          }
        }
        __syncthreads();  // the next window overwrites the norms
      }
    }
  }
}

void select(const Rows<float>& query, const Rows<float>& key, const Window& window, int64_t batch,
            Candidate* best, Stream stream) {
  const int tiles_y = ceil_div(ceil_div(window.height, window.dilation), kTileY);
  const int tiles_x = ceil_div(ceil_div(window.width, window.dilation), kTileX);
  const int64_t blocks = batch * window.phases_y * window.phases_x * tiles_y * tiles_x;
  STD_TORCH_CHECK(blocks <= kMostPixels, "too many pixels in all");
  LAUNCH(kernel, dim3(unsigned(blocks)), dim3(kThreads), sizeof(Smem), stream, query, key, window, tiles_y,
         tiles_x, best);
}
}  // namespace fma

std::tuple<Tensor, Tensor> local_matching(const Tensor& query, const Tensor& key, const Tensor& mask,
                                          torch::headeronly::IntHeaderOnlyArrayRef radius, int64_t dilation,
                                          const std::optional<Tensor>& query_mask,
                                          std::string_view precision) {
  check_shape("query", query, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = query.size(0), height = query.size(2), width = query.size(3);
  check_shape("key", key, {batch, query.size(1), height, width});
  check_dtype("key", key, query.scalar_type());
  check_shape("mask", mask, {batch, kAnySize, height, width});
  check_dtype("mask", mask, ScalarType::Bool);
  if (query_mask) {
    check_shape("query_mask", *query_mask, {batch, height, width});
    check_dtype("query_mask", *query_mask, ScalarType::Bool);
  }
  const int64_t rings = int64_t(radius.size());
  STD_TORCH_CHECK(rings >= 1 && rings <= kMostRings, "radius must have 1 to ", std::to_string(kMostRings),
                  " values");
  STD_TORCH_CHECK(dilation >= 1, "dilation must be at least 1");
  parse_precision(precision);

  Window window{};
  window.height = int(height);
  window.width = int(width);
  const int64_t longest = std::max<int64_t>({height, width, 1});
  window.dilation = int(std::min(dilation, longest));
  window.phases_y = int(std::min<int64_t>(window.dilation, height));
  window.phases_x = int(std::min<int64_t>(window.dilation, width));
  window.objects = int(mask.size(1));
  window.words = ceil_div(window.objects, kObjectsPerWord);
  window.rings = int(rings);
  for (int64_t i = 0; i < rings; ++i) {
    STD_TORCH_CHECK(radius[i] >= 0 && (i == 0 || radius[i] > radius[i - 1]),
                    "radius must be ascending and not negative");
    window.radius[i] = int(std::min(radius[i] / dilation, longest));
  }

  const std::vector<int64_t> shape{batch, window.objects, rings, height, width};
  Tensor distance = torch::stable::new_empty(query, shape, ScalarType::Float);
  Tensor index = torch::stable::new_empty(query, shape, ScalarType::Long);
  if (distance.numel() == 0) return {distance, index};

  const DeviceScope device(query);
  const Stream stream = device.stream();
  std::optional<Tensor> wanted;
  if (query_mask) wanted = torch::stable::unsqueeze(*query_mask, 1);
  Tensor best = torch::stable::new_empty(query, shape, ScalarType::Long);
  auto* candidates = static_cast<Candidate*>(best.mutable_data_ptr());
  dispatch(query.scalar_type(), [&](auto sample) {
    using S = decltype(sample);
    PackedRows query_memory, key_memory;
    const auto q = pack<S, float>(query, wanted ? &*wanted : nullptr, Side::kQuery, ScalarType::Float, stream,
                                  query_memory);
    const auto k = pack<S, float>(key, &mask, Side::kKeyWithObjects, ScalarType::Float, stream, key_memory);
    fma::select(q, k, window, batch, candidates, stream);
    finish(candidates, q, k, batch, window.objects, window.rings, Slots::kRings, distance, index, stream);
  });
  return {distance, index};
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("local_matching", TORCH_BOX(&vosops::cuda::local_matching));
}
