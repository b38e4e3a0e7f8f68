// Local matching on the GPU: for every query pixel and object the nearest key pixel of the object within a
// window. All pixels that share y % dilation and x % dilation form an image of their own with dilation 1:
// blocks work on such phases.
//
// tensor::kernel (16-bit inputs; float32 as TF32 or split into two TF32 numbers): a block owns 8 x 32
// queries, a warp 4 x 8 of them as two mma tiles of 2 x 8. Key rows (64 pixels) come one after the other by
// cp.async through three stages, each row multiplied by the queries, which stay in registers, as five mma
// tiles of 8 neighbouring keys: of radius 15, 34 x 40 of the 31 x 31 products are wasted 1.41 times, and the
// block loads 38 rows x 64 keys (545 KB of bf16, C = 100, for 256 queries). |k|^2 / 2 is where the sum
// starts. Behind a row a thread compares its maximum of 10 keys with the best so far of each object in sight,
// ring and query. 70 mma and 18 ldmatrix a row and warp, 8 warps and one block a multiprocessor (15 x 7
// blocks at 480p/4); tensor cores bound it. fma::kernel (float32, IEEE): a block owns 8 x 4 queries, a warp a
// query row, its lanes are 32 vertical shifts, and a thread holds the scores of 4 queries times 16 horizontal
// shifts in registers: 19 key pixels and 4 query pixels are read from shared memory for 64 FMAs a channel. 39
// x 19 keys come 8 channels at a time through a double buffer, 37 KB a stage; the pitch of 12 floats keeps
// 16-byte reads free of bank conflicts. FMAs and shared-memory reads bound it: 6.2 KB a channel for 31 K
// useful FMAs. Both skip key rows and windows without any object's pixel. One object within one radius, in 16
// bits, has a kernel of its own: local_matching_one.cuh.
#include <algorithm>
#include <tuple>

#include "local_matching_one.cuh"
#include "local_window.cuh"
#include "matching.cuh"
#include "tensor_core.cuh"

namespace vosops::cuda {
namespace {

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
  LAUNCH(kernel, dim3(checked_blocks(blocks)), dim3(kThreads), sizeof(Smem), stream, query, key, window,
         tiles_y, tiles_x, best);
}
}  // namespace fma

// ---- tensor-core kernel ----
namespace tensor {
constexpr int kWarpsY = 2, kWarpsX = 4, kThreads = kWarpsY * kWarpsX * kWarp;
constexpr int kTilesM = 2;                                // of 16 queries: 2 rows of 8
constexpr int kWarpRows = 2 * kTilesM, kWarpColumns = 8;  // the queries of a warp
constexpr int kRows = kWarpsY * kWarpRows, kColumns = kWarpsX * kWarpColumns, kQueries = kRows * kColumns;
constexpr int kTilesN = 5;                                 // of 8 neighbouring keys of a row
constexpr int kTileKeys = 8, kSpan = kTilesN * kTileKeys;  // keys that a warp scores in one key row
constexpr int kThreadKeys = 2 * kTilesN;                   // of which a thread holds this many, for 4 queries
constexpr int kKeyColumns = kColumns - kWarpColumns + kSpan;  // keys that the block holds of one key row
constexpr int kStages = 3;
constexpr int kMostSteps = 8;  // of one chunk of channels
constexpr int kBatch = 64;     // key rows whose occupation is looked up at once
constexpr int kMostSlots = 32;
static_assert(kThreads == kQueries);

template <int kSteps>
struct Stage {
  alignas(16) unsigned char rows[kKeyColumns][kRowPitch<kSteps>];
  float half_norm[kKeyColumns];
  unsigned objects[kKeyColumns];
};
template <int kSteps>
struct Smem {
  Stage<kSteps> stages[kStages];
  unsigned within[kMostRings][kWarp];  // bit b: the lane's key b is within the radius in x of its queries
  int occupied[kBatch];
  // Behind it: Candidate best[slots][kQueries]
};

struct Plan {
  int tiles_y, tiles_x;
  int chunks;            // of the channels
  int objects_per_pass;  // a power of two, at most kObjectsPerWord
  uint4* fragments;  // with several chunks: the queries in the order in which mma takes them, a block after
                     // the other
};

template <class T, int kSteps, Arithmetic kArithmetic>
__global__ __launch_bounds__(kThreads, 1) void kernel(Rows<T> query, Rows<T> key, Window window, Plan plan,
                                                      Candidate* best) {
  using Shared = Smem<kSteps>;
  DYNAMIC_SHARED(Shared, s);
  auto* best_of = reinterpret_cast<Candidate*>(&s + 1);
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int g = lane / 4,
            t = lane % 4;  // of the fragments: this lane has queries in column g and keys 2t, 2t + 1
  unsigned block = blockIdx.x;
  const int x0 = int(block % unsigned(plan.tiles_x)) * kColumns;
  block /= unsigned(plan.tiles_x);
  const int y0 = int(block % unsigned(plan.tiles_y)) * kRows;
  block /= unsigned(plan.tiles_y);
  const unsigned phases = unsigned(window.phases_y * window.phases_x);
  const Phase image(window, int(block % phases));
  const int64_t n = block / phases;
  const int y = y0 + thread / kColumns,
            x = x0 + thread % kColumns;  // the query whose results this thread writes
  const bool inside = image.contains(y, x);
  if (!__syncthreads_or(inside && query.state[n * query.count + image.pixel(y, x)] == 0)) return;

  const int warp_y = warp / kWarpsX * kWarpRows, warp_x = warp % kWarpsX * kWarpColumns;
  const int row_bytes = key.row_channels * int(sizeof(T));
  const int reach = window.reach();
  const bool idle = !image.contains(y0 + warp_y, x0 + warp_x);  // the warp's queries lie outside the image

  // The queries as the left factor, negated: the product then adds to |k|^2 / 2. One chunk stays in
  // registers.
  uint32_t a[kTilesM][kSteps][4];
  const auto gather = [&](int chunk) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int qy = y0 + warp_y + 2 * m + i % 2, qx = x0 + warp_x + g;
        const auto* row = reinterpret_cast<const unsigned char*>(
            query.rows +
            (image.contains(qy, qx) ? n * query.count + image.pixel(qy, qx) : 0) * query.row_channels);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const int at = (chunk * kSteps + k) * kStepBytes + i / 2 * 16 + t * 4;
          const bool there = image.contains(qy, qx) && at < row_bytes;
          a[m][k][i] = there ? negated<T>(*reinterpret_cast<const uint32_t*>(row + at)) : 0;
        }
      }
  };
  const auto fragment = [&](int chunk, int m, int k) -> uint4& {
    return plan
        .fragments[(((int64_t{blockIdx.x} * plan.chunks + chunk) * kTilesM + m) * kSteps + k) * kThreads +
                   thread];
  };
  for (int chunk = 0; chunk < plan.chunks; ++chunk) {
    gather(chunk);
    if (plan.chunks == 1) break;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        fragment(chunk, m, k) = make_uint4(a[m][k][0], a[m][k][1], a[m][k][2], a[m][k][3]);
  }

  const int tiles_n = ceil_div(kWarpColumns + 2 * reach, kTileKeys);
  for (int first_object = 0; first_object < window.objects; first_object += plan.objects_per_pass) {
    const int word = first_object / kObjectsPerWord, first_bit = first_object % kObjectsPerWord;
    const int pass_objects = min(plan.objects_per_pass, window.objects - first_object);
    const unsigned pass_mask = (pass_objects == kObjectsPerWord ? ~0u : (1u << pass_objects) - 1)
                               << first_bit;
    const unsigned* key_objects = key.objects + (n * window.words + word) * key.count;
    for (int slot = 0; slot < pass_objects * window.rings; ++slot)
      best_of[slot * kQueries + thread] = kNoCandidate;

    for (int first_tile = 0; first_tile < tiles_n; first_tile += kTilesN) {
      const int tiles = min(kTilesN, tiles_n - first_tile);
      const int key_x0 = x0 - reach + first_tile * kTileKeys;
      const int columns = kColumns - kWarpColumns + min(kTilesN, tiles + tiles % 2) * kTileKeys;
      if (key_x0 + columns <= 0 || key_x0 >= image.width) continue;
      const int last_key_y = min(image.height - 1, y0 + kRows - 1 + reach);
      for (int key_y0 = max(0, y0 - reach); key_y0 <= last_key_y; key_y0 += kBatch) {
        __syncthreads();  // everyone is done with the previous batch
        for (int ring = warp; ring < window.rings; ring += kThreads / kWarp) {
          unsigned bits = 0;
          for (int b = 0; b < kThreadKeys; ++b) {
            const int dx = (first_tile + b / 2) * kTileKeys + 2 * t + b % 2 - reach - g;
            bits |= unsigned(abs(dx) <= window.radius[ring] && b / 2 < tiles) << b;
          }
          s.within[ring][lane] = bits;
        }
        for (int row = warp; row < kBatch; row += kThreads / kWarp) {
          bool occupied = false;
          for (int column = lane; column < columns && key_y0 + row <= last_key_y; column += kWarp)
            if (image.contains(key_y0 + row, key_x0 + column))
              occupied |= (key_objects[image.pixel(key_y0 + row, key_x0 + column)] & pass_mask) != 0;
          occupied = __any_sync(kAllLanes, occupied);
          if (lane == 0) s.occupied[row] = occupied;
        }
        __syncthreads();
        const unsigned long long rows = (unsigned long long)__ballot_sync(kAllLanes, s.occupied[kWarp + lane])
                                            << kWarp |
                                        __ballot_sync(kAllLanes, s.occupied[lane]);

        // The occupied key rows, and for each the chunks of its channels, go through a ring of stages.
        struct Cursor {
          unsigned long long rows;
          int chunk;
        };
        const auto advance = [&](Cursor& c) {
          if (++c.chunk < plan.chunks) return;
          c.chunk = 0;
          c.rows &= c.rows - 1;
        };
        Cursor ahead{rows, 0};
        const auto stage = [&](int number) {
          if (ahead.rows) {
            auto& to = s.stages[number % kStages];
            const int ky = key_y0 + __ffsll((long long)ahead.rows) - 1;
            constexpr int kVectors = kSteps * kStepBytes / kVectorBytes;
            for (int i = thread; i < columns * kVectors; i += kThreads) {
              const int column = i / kVectors, at = (ahead.chunk * kVectors + i % kVectors) * kVectorBytes;
              const bool there = image.contains(ky, key_x0 + column) && at < row_bytes;
              const auto* from = reinterpret_cast<const unsigned char*>(key.rows);
              if (there) from += (n * key.count + image.pixel(ky, key_x0 + column)) * row_bytes + at;
              copy_async<16>(&to.rows[column][i % kVectors * kVectorBytes], from, there ? kVectorBytes : 0);
            }
            if (ahead.chunk == 0 && thread < columns) {
              const bool there = image.contains(ky, key_x0 + thread);
              const int pixel = there ? image.pixel(ky, key_x0 + thread) : 0;
              copy_async<4>(&to.half_norm[thread], key.half_norm + n * key.count + pixel, there ? 4 : 0);
              copy_async<4>(&to.objects[thread], key_objects + pixel, there ? 4 : 0);  // outside: nobody's
            }
            advance(ahead);
          }
          copy_async_commit();
        };

        for (int number = 0; number < kStages - 1; ++number) stage(number);
        float c[kTilesM][kTilesN][4];
        unsigned objects[kThreadKeys];
        Cursor now{rows, 0};
        for (int number = 0; now.rows; ++number, advance(now)) {
          copy_async_wait<kStages - 2>();
          __syncthreads();
          stage(number + kStages - 1);
          const int ky = key_y0 + __ffsll((long long)now.rows) - 1;
          if (idle || ky < y0 + warp_y - reach || ky > y0 + warp_y + kWarpRows - 1 + reach) continue;
          const auto& in = s.stages[number % kStages];

          if (now.chunk == 0) {
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) {
              if (j >= tiles) continue;
              const int column = warp_x + j * kTileKeys + 2 * t;
              const float2 half_norm = *reinterpret_cast<const float2*>(&in.half_norm[column]);
              const uint2 bits = *reinterpret_cast<const uint2*>(&in.objects[column]);
              objects[2 * j] = bits.x;
              objects[2 * j + 1] = bits.y;
#pragma unroll
              for (int m = 0; m < kTilesM; ++m) {
                c[m][j][0] = c[m][j][2] = half_norm.x;
                c[m][j][1] = c[m][j][3] = half_norm.y;
              }
            }
          }
          if (plan.chunks > 1) {
#pragma unroll
            for (int m = 0; m < kTilesM; ++m)
#pragma unroll
              for (int k = 0; k < kSteps; ++k) {
                const uint4 bits = fragment(now.chunk, m, k);
                a[m][k][0] = bits.x;
                a[m][k][1] = bits.y;
                a[m][k][2] = bits.z;
                a[m][k][3] = bits.w;
              }
          }
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            uint32_t high[kTilesM][4], low[kTilesM][4] = {};
#pragma unroll
            for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
              for (int i = 0; i < 4; ++i) high[m][i] = a[m][k][i];
              prepare<T, kArithmetic>(high[m], low[m]);
            }
#pragma unroll
            for (int pair = 0; pair < kTilesN; pair += 2) {
              if (pair >= tiles) continue;
              uint32_t loaded[4];
              const int row = warp_x + (pair + lane / 16) * kTileKeys + lane % 8;
              load_tiles(loaded, in.rows[row] + k * kStepBytes + lane / 8 % 2 * 16, pair + 1 < kTilesN);
#pragma unroll
              for (int j = pair; j < kTilesN && j < pair + 2; ++j) {
                if (j >= tiles) continue;
                uint32_t b[2] = {loaded[2 * (j - pair)], loaded[2 * (j - pair) + 1]}, b_low[2] = {};
                prepare<T, kArithmetic>(b, b_low);
#pragma unroll
                for (int m = 0; m < kTilesM; ++m) step<T, kArithmetic>(c[m][j], high[m], low[m], b, b_low);
              }
            }
          }
          if (now.chunk + 1 < plan.chunks) continue;

          // For every object in sight and ring: the least of this thread's scores of each of its queries, and
          // where it beats the best so far, the least of the four lanes that share the query.
          unsigned present = 0;
#pragma unroll
          for (int b = 0; b < kThreadKeys; ++b)
            if (b / 2 < tiles) present |= objects[b];
          present = __reduce_or_sync(kAllLanes, present) & pass_mask;
          for (; present; present &= present - 1) {
            const int bit = __ffs(int(present)) - 1;
            unsigned members = 0;
#pragma unroll
            for (int b = 0; b < kThreadKeys; ++b)
              if (b / 2 < tiles) members |= (objects[b] >> bit & 1) << b;
#pragma unroll
            for (int q = 0; q < kWarpRows; ++q) {
              const int dy = abs(ky - (y0 + warp_y + q));
              unsigned inner = 0;
              for (int ring = 0; ring < window.rings; ++ring) {
                if (dy > window.radius[ring]) continue;
                const unsigned within = s.within[ring][lane], allowed = members & within & ~inner;
                inner = within;
                float least = INFINITY;
#pragma unroll
                for (int b = 0; b < kThreadKeys; ++b)
                  least = fminf(least, allowed >> b & 1 ? c[q / 2][b / 2][q % 2 * 2 + b % 2] : INFINITY);
                Candidate& current = best_of[((bit - first_bit) * window.rings + ring) * kQueries +
                                             (warp_y + q) * kColumns + warp_x + g];
                const uint32_t mine = ordered(least + 0.f);
                const bool better = least < INFINITY && mine <= uint32_t(current >> 32);
                if (!__any_sync(kAllLanes, better)) continue;
                __syncwarp();  // all four lanes have read the best so far
                int column = 0;
#pragma unroll
                for (int b = kThreadKeys - 1; b >= 0; --b)
                  if ((allowed >> b & 1) && c[q / 2][b / 2][q % 2 * 2 + b % 2] == least)
                    column = warp_x + b / 2 * kTileKeys + 2 * t + b % 2;
                Candidate found =
                    better ? candidate(mine, uint32_t(image.pixel(ky, key_x0 + column))) : kNoCandidate;
                found = min(found, __shfl_xor_sync(kAllLanes, found, 1));
                found = min(found, __shfl_xor_sync(kAllLanes, found, 2));
                if (t == 0) current = min(current, found);
                __syncwarp();
              }
            }
          }
        }
        copy_async_wait<0>();
      }
    }

    __syncthreads();  // all warps' results are there
    if (inside)
      for (int slot = 0; slot < pass_objects * window.rings; ++slot)
        best[((n * window.objects + first_object) * window.rings + slot) * query.count + image.pixel(y, x)] =
            best_of[slot * kQueries + thread];
  }
}

template <class T, int kSteps, Arithmetic kArithmetic>
void select(const Rows<T>& query, const Rows<T>& key, const Window& window, int64_t blocks, Plan plan,
            Candidate* best, Stream stream) {
  const int slots = std::min(plan.objects_per_pass, window.objects) * window.rings;
  LAUNCH((kernel<T, kSteps, kArithmetic>), dim3(unsigned(blocks)), dim3(kThreads),
         sizeof(Smem<kSteps>) + slots * kQueries * sizeof(Candidate), stream, query, key, window, plan, best);
}

template <class T, Arithmetic kArithmetic>
void select(const Rows<T>& query, const Rows<T>& key, const Window& window, const Tensor& like, int64_t batch,
            Candidate* best, Stream stream) {
  Plan plan{};
  plan.tiles_y = ceil_div(ceil_div(window.height, window.dilation), kRows);
  plan.tiles_x = ceil_div(ceil_div(window.width, window.dilation), kColumns);
  const int slots = window.objects * window.rings;
  const int slots_that_fit =
      int((device_limits().shared_bytes - sizeof(Smem<kMostSteps>)) / (kQueries * sizeof(Candidate)));
  plan.objects_per_pass = kObjectsPerWord;
  while (plan.objects_per_pass > 1 &&
         std::min(slots, plan.objects_per_pass * window.rings) > std::min(kMostSlots, slots_that_fit))
    plan.objects_per_pass /= 2;
  const int64_t blocks = batch * window.phases_y * window.phases_x * plan.tiles_y * plan.tiles_x;
  STD_TORCH_CHECK(blocks <= kMostPixels, "too many pixels in all");
  const int all_steps = key.row_channels * int(sizeof(T)) / kStepBytes;
  plan.chunks = ceil_div(all_steps, kMostSteps);
  const int steps = ceil_div(all_steps, plan.chunks);
  Tensor fragments;
  if (plan.chunks > 1) {
    fragments = torch::stable::new_empty(
        like, std::vector<int64_t>{blocks, plan.chunks, kTilesM, kMostSteps, kThreads, 4}, ScalarType::Int);
    plan.fragments = static_cast<uint4*>(fragments.mutable_data_ptr());
  }
  if (steps <= 4)
    select<T, 4, kArithmetic>(query, key, window, blocks, plan, best, stream);
  else if (steps <= 7)
    select<T, 7, kArithmetic>(query, key, window, blocks, plan, best, stream);
  else
    select<T, 8, kArithmetic>(query, key, window, blocks, plan, best, stream);
}
}  // namespace tensor

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
  const Precision arithmetic = parse_precision(precision);

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
    const ScalarType type = query.scalar_type();
    const auto q = pack<S, S>(query, wanted ? &*wanted : nullptr, Side::kQuery, type, stream, query_memory);
    const bool one_object = one::serves<S>(window, q.row_channels);
    const auto k =
        pack<S, S>(key, &mask, one_object ? Side::kKey : Side::kKeyWithObjects, type, stream, key_memory);
    if constexpr (std::is_same_v<S, float>) {
      if (arithmetic == Precision::kIeee)
        fma::select(q, k, window, batch, candidates, stream);
      else if (arithmetic == Precision::kTf32)
        tensor::select<S, Arithmetic::kPlain>(q, k, window, query, batch, candidates, stream);
      else
        tensor::select<S, Arithmetic::kSplit>(q, k, window, query, batch, candidates, stream);
    } else if (one_object) {
      one::select(q, k, window, batch, candidates, best, stream);
    } else {
      tensor::select<S, Arithmetic::kPlain>(q, k, window, query, batch, candidates, stream);
    }
    finish(candidates, q, k, batch, window.objects, window.rings, Slots::kRings, distance, index, stream);
  });
  return {distance, index};
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("local_matching", TORCH_BOX(&vosops::cuda::local_matching));
}
