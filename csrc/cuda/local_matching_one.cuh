// Local matching of one object in one window, in 16 bits: the common case, in which no thread need look at
// masks.
//
// A block owns 8 x 32 queries and a share of the key rows, a warp 4 x 8 queries as two mma tiles of 2 x 8
// that stay in registers. Key rows come one after the other by cp.async through three stages; a warp scores
// kTilesN tiles of 8 neighbouring keys of each. Of radius 15 these are 34 x 40 of the 31 x 31 products. A
// key's |k|^2 / 2, where its sums start, is infinite unless it belongs to the object, and a thread's ten keys
// are the same columns of the window in every row, so that the window is one addend a key. A thread keeps the
// best key of each of its four queries; only behind the last row the four lanes that share a query compare
// theirs, and the shares by atomicMin. Instructions bound it: some 4 for each mma.
#pragma once

#include <algorithm>

#include "local_window.cuh"
#include "matching.cuh"
#include "tensor_core.cuh"

namespace vosops::cuda {
namespace one {

constexpr int kWarpsY = 2, kWarpsX = 4, kThreads = kWarpsY * kWarpsX * kWarp;
constexpr int kTilesM = 2;                                // of 16 queries: 2 rows of 8
constexpr int kWarpRows = 2 * kTilesM, kWarpColumns = 8;  // the queries of a warp
constexpr int kRows = kWarpsY * kWarpRows, kColumns = kWarpsX * kWarpColumns;
constexpr int kTileKeys = 8, kStages = 3;
constexpr int kMostSteps = 8;
constexpr int kBatch = 64;  // key rows whose occupation is looked up at once
constexpr int kFewTiles = 3, kManyTiles = 5;
static_assert(kThreads == kRows * kColumns);

template <int kSteps, int kTilesN>
struct Stage {
  alignas(16) unsigned char rows[kColumns - kWarpColumns + kTilesN * kTileKeys][kRowPitch<kSteps>];
  float half_norm[kColumns - kWarpColumns + kTilesN * kTileKeys];
};
template <int kSteps, int kTilesN>
struct Smem {
  Stage<kSteps, kTilesN> stages[kStages];
  int occupied[kBatch];
  int list[kBatch + kStages];  // the occupied rows
};

struct Plan {
  int tiles_y, tiles_x, shares;
};

template <class T, int kSteps, int kTilesN>
__global__ __launch_bounds__(kThreads, 1) void kernel(Rows<T> query, Rows<T> key, Window window, Plan plan,
                                                      Candidate* best) {
  using Shared = Smem<kSteps, kTilesN>;
  constexpr int kKeys = 2 * kTilesN;  // of a thread in each key row
  constexpr int kKeyColumns = kColumns - kWarpColumns + kTilesN * kTileKeys;
  DYNAMIC_SHARED(Shared, s);
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int g = lane / 4, t = lane % 4;  // this lane has queries in column g and keys 2t, 2t + 1
  unsigned block = blockIdx.x;
  const int share = int(block % unsigned(plan.shares));
  block /= unsigned(plan.shares);
  const int x0 = int(block % unsigned(plan.tiles_x)) * kColumns;
  block /= unsigned(plan.tiles_x);
  const int y0 = int(block % unsigned(plan.tiles_y)) * kRows;
  block /= unsigned(plan.tiles_y);
  const unsigned phases = unsigned(window.phases_y * window.phases_x);
  const Phase image(window, int(block % phases));
  const int64_t n = block / phases;
  const int y = y0 + thread / kColumns, x = x0 + thread % kColumns;
  const bool wanted = image.contains(y, x) && query.state[n * query.count + image.pixel(y, x)] == 0;
  if (!__syncthreads_or(wanted)) return;

  const int warp_y = warp / kWarpsX * kWarpRows, warp_x = warp % kWarpsX * kWarpColumns;
  const int row_bytes = key.row_channels * int(sizeof(T)), reach = window.reach();
  const bool idle = !image.contains(y0 + warp_y, x0 + warp_x);  // the warp's queries lie outside the image
  const int first_row = max(0, y0 - reach), last_row = min(image.height - 1, y0 + kRows - 1 + reach);
  const int begin = first_row + int(int64_t{last_row + 1 - first_row} * share / plan.shares);
  const int end = first_row + int(int64_t{last_row + 1 - first_row} * (share + 1) / plan.shares);
  const SharedAddress shared = shared_base(&s);

  // What no copy writes: columns outside of the image, and the ends of rows.
  const int tiles = ceil_div(kWarpColumns + 2 * reach, kTileKeys);
  const int last_x = x0 - reach + ceil_div(tiles, kTilesN) * kTilesN * kTileKeys + kColumns - kWarpColumns;
  if (x0 < reach || last_x > image.width || row_bytes < kSteps * kStepBytes) {
    VISIT(gaps, 1);
#pragma unroll 1
    for (int i = thread; i < int(sizeof(s.stages)) / kVectorBytes; i += kThreads) {
      VISIT(zero, 1);
      reinterpret_cast<uint4*>(&s.stages)[i] = make_uint4(0, 0, 0, 0);
    }
  }

  // The queries as the left factor, negated: the product then adds to |k|^2 / 2.
  uint32_t a[kTilesM][kSteps][4];
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int qy = y0 + warp_y + 2 * m + i % 2, qx = x0 + warp_x + g;
      const bool there = image.contains(qy, qx);
      const auto* row = reinterpret_cast<const unsigned char*>(query.rows) +
                        (there ? n * query.count + image.pixel(qy, qx) : 0) * row_bytes;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const int at = k * kStepBytes + i / 2 * 16 + t * 4;
        a[m][k][i] = there && at < row_bytes ? negated<T>(*reinterpret_cast<const uint32_t*>(row + at)) : 0;
      }
    }
  // Four threads copy a key's row.
  constexpr int kCopyThreads = 4;
  static_assert(kKeyColumns * kCopyThreads <= kThreads);
  const int own_column = thread / kCopyThreads, own_part = thread % kCopyThreads * kVectorBytes;
  // From a key row to the next.
  const int line_pixels = window.width * window.dilation, line_bytes = kept(line_pixels * row_bytes);
  const int own_bytes = kept(row_bytes - own_part);
  for (int first_tile = 0; first_tile < tiles; first_tile += kTilesN) {
    VISIT(span, 1);
    const int key_x0 = x0 - reach + first_tile * kTileKeys;
    if (key_x0 + kKeyColumns <= 0 || key_x0 >= image.width) continue;
    float outside[kKeys];  // infinite where the key's column is outside of the window or of the image
#pragma unroll
    for (int b = 0; b < kKeys; ++b) {
      const int column = warp_x + b / 2 * kTileKeys + 2 * t + b % 2;
      const int dx = key_x0 + column - (x0 + warp_x + g);
      outside[b] = abs(dx) <= reach && unsigned(key_x0 + column) < unsigned(image.width) ? 0.f : INFINITY;
    }
    const bool copies = own_column < kKeyColumns && unsigned(key_x0 + own_column) < unsigned(image.width);
    const bool copies_norm = thread < kKeyColumns && unsigned(key_x0 + thread) < unsigned(image.width);
    const int64_t own_pixel = n * key.count + (copies ? image.pixel(0, key_x0 + own_column) : 0);
    const auto* own_from =
        kept(reinterpret_cast<const unsigned char*>(key.rows) + own_pixel * row_bytes + own_part);
    const float* own_norm =
        kept(key.half_norm + n * key.count + (copies_norm ? image.pixel(0, key_x0 + thread) : 0));
    const SharedAddress own_to = {kept((shared + own_column * kRowPitch<kSteps> + own_part).address)};

    float best_score[kWarpRows];
    int best_y[kWarpRows], best_x[kWarpRows];
#pragma unroll
    for (int q = 0; q < kWarpRows; ++q) {
      best_score[q] = INFINITY;
      best_y[q] = best_x[q] = 0;
    }

    for (int batch = begin; batch < end; batch += kBatch) {
      VISIT(batch, 1);
      __syncthreads();  // everyone is done with the previous batch
      const int rows = min(kBatch, end - batch);
      for (int row = warp; row < kBatch; row += kThreads / kWarp) {
        VISIT(occupied, 1);
        bool occupied = false;
        for (int column = lane; column < kKeyColumns && row < rows; column += kWarp)
          if (unsigned(key_x0 + column) < unsigned(image.width))
            occupied |= key.half_norm[n * key.count + image.pixel(batch + row, key_x0 + column)] < INFINITY;
        occupied = __any_sync(kAllLanes, occupied);
        if (lane == 0) s.occupied[row] = occupied;
      }
      __syncthreads();
      const unsigned low = __ballot_sync(kAllLanes, s.occupied[lane]),
                     high = __ballot_sync(kAllLanes, s.occupied[kWarp + lane]);
      const int count = __popc(low) + __popc(high);
      if (warp < kBatch / kWarp) {
        const unsigned mine = warp ? high : low;
        if (mine >> lane & 1)
          s.list[(warp ? __popc(low) : 0) + __popc(mine & ((1u << lane) - 1))] = batch + thread;
      }
      if (thread < kStages) s.list[count + thread] = 0;  // looked up, not used
      __syncthreads();

      const auto stage = [&](int number, int slot) {
        if (number < count) {
          VISIT(key_copy, 1);
          const int ky = s.list[number];
          if (copies) {
            const unsigned char* from = own_from + int64_t{ky} * line_bytes;
            const SharedAddress to = own_to + slot * int(sizeof(s.stages[0]));
#pragma unroll
            for (int at = 0; at < kSteps * kStepBytes; at += kCopyThreads * kVectorBytes)
              if (at < own_bytes) copy_async_whole(to + at, from + at);
          }
          if (copies_norm)
            copy_async<4>(&s.stages[slot].half_norm[thread], own_norm + int64_t{ky} * line_pixels);
        }
        copy_async_commit();
      };
      stage(0, 0);
      stage(1, 1);
      static_assert(kStages == 3);
      int slot = 0, next_slot = kStages - 1;
      for (int number = 0; number < count; ++number) {
        VISIT(row, 1);
        copy_async_wait<kStages - 2>();
        __syncthreads();
        stage(number + kStages - 1, next_slot);
        const auto& in = s.stages[slot];
        next_slot = slot;
        slot = slot + 1 == kStages ? 0 : slot + 1;
        const int ky = s.list[number],
                  dy = ky - (y0 + warp_y) + reach;  // window of query q: q to q + 2 reach
        if (!idle && dy >= 0 && dy < 2 * reach + kWarpRows) {
          VISIT(tile, 1);
          float c[kTilesM][kTilesN][4];
          const auto start = [&](int j, float (&from)[4]) {
            const float2 half_norm =
                *reinterpret_cast<const float2*>(&in.half_norm[warp_x + j * kTileKeys + 2 * t]);
            from[0] = from[2] = half_norm.x + outside[2 * j];
            from[1] = from[3] = half_norm.y + outside[2 * j + 1];
          };
          const unsigned char* row = &in.rows[warp_x + lane % 8 + lane / 16 * kTileKeys][lane / 8 % 2 * 16];
#pragma unroll
          for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int pair = 0; pair < kTilesN; pair += 2) {
              uint32_t loaded[4];
              const unsigned char* at = row + pair * kTileKeys * kRowPitch<kSteps> + k * kStepBytes;
              load_tiles(loaded, at, pair + 1 < kTilesN);
#pragma unroll
              for (int j = pair; j < kTilesN && j < pair + 2; ++j) {
                const uint32_t b[2] = {loaded[2 * (j - pair)], loaded[2 * (j - pair) + 1]};
                float from[4];
                if (k == 0) start(j, from);
#pragma unroll
                for (int m = 0; m < kTilesM; ++m)
                  multiply_add<T>(c[m][j], k == 0 ? from : c[m][j], a[m][k], b);
              }
            }
#pragma unroll
          for (int q = 0; q < kWarpRows; ++q) {
            float least = dy >= q && dy <= q + 2 * reach ? best_score[q] : -INFINITY;
            int at = -1;
#pragma unroll
            for (int b = 0; b < kKeys; ++b) {
              const float score = c[q / 2][b / 2][q % 2 * 2 + b % 2];
              if (score < least) {
                least = score;
                at = b / 2 * kTileKeys + b % 2;
              }
            }
            if (at >= 0) {
              best_score[q] = least;
              best_y[q] = ky;
              best_x[q] = key_x0 + at;
            }
          }
        }
      }
      copy_async_wait<0>();
    }

    // The best of the four lanes that share a query, and of spans and shares.
#pragma unroll
    for (int q = 0; q < kWarpRows; ++q) {
      Candidate found = kNoCandidate;
      if (best_score[q] < INFINITY)
        found = candidate(ordered(best_score[q] + 0.f),
                          uint32_t(image.pixel(best_y[q], best_x[q] + warp_x + 2 * t)));
      found = min(found, __shfl_xor_sync(kAllLanes, found, 1));
      found = min(found, __shfl_xor_sync(kAllLanes, found, 2));
      const int qy = y0 + warp_y + q, qx = x0 + warp_x + g;
      if (t != 0 || !image.contains(qy, qx) || found == kNoCandidate) continue;
      Candidate& to = best[n * query.count + image.pixel(qy, qx)];
      if (plan.shares == 1)
        to = min(to, found);
      else
        atomicMin(&to, found);
    }
  }
}

template <class T>
bool serves(const Window& window, int row_channels) {
  const int64_t row_bytes = row_channels * int64_t{sizeof(T)};
  return sizeof(T) == 2 && window.objects == 1 && window.rings == 1 && row_bytes <= kMostSteps * kStepBytes &&
         int64_t{window.width} * window.dilation * row_bytes <= kMostPixels;
}

// The number of shares of the key rows for which waves of blocks take the least time, in rows of a block.
inline int choose_shares(int64_t blocks, int rows) {
  constexpr double kStart = 6;  // rows' time that a block takes before its first and after its last
  const int64_t multiprocessors = device_limits().multiprocessors;
  int best = 1;
  double least = 0;
  for (int shares = 1; shares <= rows / 4; ++shares) {
    const double time = double(ceil_div(blocks * shares, multiprocessors)) * (double(rows) / shares + kStart);
    if (shares == 1 || time < 0.95 * least) {
      best = shares;
      least = time;
    }
  }
  return best;
}

// `best` and `candidates` are the same memory.
template <class T>
void select(const Rows<T>& query, const Rows<T>& key, const Window& window, int64_t batch,
            Candidate* candidates, Tensor& best, Stream stream) {
  const int height = ceil_div(window.height, window.dilation),
            width = ceil_div(window.width, window.dilation);
  Plan plan{ceil_div(height, kRows), ceil_div(width, kColumns), 1};
  const int64_t blocks = batch * window.phases_y * window.phases_x * plan.tiles_y * plan.tiles_x;
  plan.shares = choose_shares(blocks, std::min(height, kRows + 2 * window.reach()));
  const dim3 grid(checked_blocks(blocks * plan.shares));
  torch::stable::fill_(best, -1);  // kNoCandidate
  const auto launch = [&]<int kSteps>() {
    if (kWarpColumns + 2 * window.reach() <= kFewTiles * kTileKeys)
      LAUNCH((kernel<T, kSteps, kFewTiles>), grid, dim3(kThreads), sizeof(Smem<kSteps, kFewTiles>), stream,
             query, key, window, plan, candidates);
    else
      LAUNCH((kernel<T, kSteps, kManyTiles>), grid, dim3(kThreads), sizeof(Smem<kSteps, kManyTiles>), stream,
             query, key, window, plan, candidates);
  };
  const int steps = key.row_channels * int(sizeof(T)) / kStepBytes;
  if (steps <= 4)
    launch.template operator()<4>();
  else if (steps <= 7)
    launch.template operator()<7>();
  else
    launch.template operator()<kMostSteps>();
}

}  // namespace one
}  // namespace vosops::cuda
