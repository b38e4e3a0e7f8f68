// The innermost loop of local matching (csrc/cpu/local_matching.cpp, correlate) by itself, in other shapes,
// and with key registers cut from two aligned loads instead of loaded where they lie. For AVX-512 processors.
//
//   FLAGS="-std=c++20 -O3 -mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mprefer-vector-width=512 -Icsrc"
//   g++ $FLAGS benchmarks/local_tile.cpp -o /tmp/local_tile
//
//   /tmp/local_tile         GFLOP/s from the first-level cache, beside multiply-adds that load nothing
//   /tmp/local_tile blocks  a tile of 4 rows x a key row at radius 15, all channels at once and block by
//   block /tmp/local_tile lines   cache lines touched and missed in a cycle of two multiply-adds (48 KB, 12
//   ways)
//
//   g++ $FLAGS -DVOSOPS_MCA -S benchmarks/local_tile.cpp -o /tmp/tile.s
//   llvm-mca -mcpu=sapphirerapids /tmp/tile.s
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "cpu/vec.h"

#if defined(VOSOPS_MCA)
#define MCA(text) asm volatile(text::: "memory")
#else
#define MCA(text)
#endif

namespace {

using V = vosops::cpu::Vec<float, 64>;
constexpr int kChannels = 100, kStride = 272;  // numbers from a channel of the key to the next

// Adds the products of R rows of queries with the keys at D displacements, which `key` makes.
template <int R, int D, class Key>
[[gnu::always_inline]] inline void add_products(const float* query, const Key& key, V::Reg (&sum)[D][R]) {
  V::Reg q[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) q[r] = V::load(query + r * V::kLanes);
#pragma GCC unroll 16
  for (int d = 0; d < D; ++d) {
    V::Reg k = key(d);
    V::pin(k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[d][r] = V::fma(q[r], k, sum[d][r]);
  }
}

template <int R, int D>
void store(const V::Reg (&sum)[D][R], float* out) {
  for (int i = 0; i < R * D; ++i) V::store(out + i * V::kLanes, sum[i / R][i % R]);
}

// R rows of queries by D displacements, as the op does it.
template <int R, int D>
[[gnu::noinline]] void by_loads(const float* query, const float* key, float* out) {
  V::Reg sum[D][R] = {};
  for (int e = 0; e < kChannels; ++e) {
    MCA("# LLVM-MCA-BEGIN loads");
    add_products(query, [key](int d) { return V::load(key + d); }, sum);
    query += R * V::kLanes;
    key += kStride;
    MCA("# LLVM-MCA-END");
  }
  store(sum, out);
}

// The same with no load that crosses a cache line: two aligned ones, and a permutation for each displacement.
template <int R, int D>
[[gnu::noinline]] void by_permutes(const float* query, const float* key, float* out) {
  const int offset = static_cast<int>(reinterpret_cast<uintptr_t>(key) / sizeof(float) % V::kLanes);
  key -= offset;
  __m512i index[D];
  for (int d = 0; d < D; ++d) {
    alignas(64) int lanes[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) lanes[i] = i + offset + d;
    index[d] = _mm512_load_si512(lanes);
    asm("" : "+v"(index[d]));
  }
  V::Reg sum[D][R] = {};
  for (int e = 0; e < kChannels; ++e) {
    MCA("# LLVM-MCA-BEGIN permutes");
    V::Reg low = V::load(key), high = V::load(key + V::kLanes);
    V::pin(low);
    V::pin(high);
    add_products(query, [&](int d) -> V::Reg { return _mm512_permutex2var_ps(low, index[d], high); }, sum);
    query += R * V::kLanes;
    key += kStride;
    MCA("# LLVM-MCA-END");
  }
  store(sum, out);
}

double processor_seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// The best rate of several, in GFLOP/s.
template <class F>
double rate(double operations, const F& f) {
  constexpr int kRounds = 15, kCalls = 3000;
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    const double start = processor_seconds();
    for (int i = 0; i < kCalls; ++i) f();
    best = std::max(best, kCalls * operations / (processor_seconds() - start) * 1e-9);
  }
  return best;
}

template <int R, int D, class F>
void measure(const char* name, F* tile) {
  static float query[kChannels * R * V::kLanes] __attribute__((aligned(64)));
  static float key[kChannels * kStride + 64] __attribute__((aligned(64)));
  static float out[R * D * V::kLanes];
  for (float& value : query) value = static_cast<float>(std::rand()) / RAND_MAX;
  for (float& value : key) value = static_cast<float>(std::rand()) / RAND_MAX;
  constexpr int kOffset = 3;  // all but the first of 14 displacements cross a line
  const double gflops = rate(2.0 * R * D * kChannels * V::kLanes, [&] { tile(query, key + kOffset, out); });
  std::printf("%d rows x %2d displacements by %-8s %6.1f GFLOP/s\n", R, D, name, gflops);
}

// 4 rows of queries x 30 displacements, 5 at a time, as the op goes through a key row: `block` channels for
// all of them, then the next, with the sums in memory in between.
[[gnu::noinline]] void by_blocks(const float* query, const float* key, float* sums, int channels, int block) {
  constexpr int kRows = 4, kAtOnce = 5, kAcross = 30;
  for (int first = 0; first < channels; first += block) {
    const int last = std::min(first + block, channels);
    for (int d = 0; d < kAcross; d += kAtOnce) {
      V::Reg sum[kAtOnce][kRows] = {};
      float* carried = sums + d * kRows * V::kLanes;
      if (first > 0) {
#pragma GCC unroll 32
        for (int i = 0; i < kAtOnce * kRows; ++i)
          sum[i / kRows][i % kRows] = V::load(carried + i * V::kLanes);
      }
      const float* k = key + first * kStride + d;
      for (int e = first; e < last; ++e, k += kStride)
        add_products(query + e * kRows * V::kLanes, [k](int i) { return V::load(k + i); }, sum);
#pragma GCC unroll 32
      for (int i = 0; i < kAtOnce * kRows; ++i) V::store(carried + i * V::kLanes, sum[i / kRows][i % kRows]);
    }
  }
}

constexpr int kChains = 24, kSteps = 100;

[[gnu::noinline]] void multiply_adds(float* out) {
  V::Reg sum[kChains] = {}, factor = V::set1(0.999f);
  for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < kChains; ++j) sum[j] = V::fma(sum[j], factor, factor);
#pragma GCC unroll 32
    for (int j = 0; j < kChains; ++j) V::pin(sum[j]);
  }
#pragma GCC unroll 32
  for (int j = 0; j < kChains; ++j) V::store(out + j * V::kLanes, sum[j]);
}

// For each number of channels, the rates of blocks of several sizes, each round beside the multiply-adds.
void measure_blocks() {
  constexpr int kMost = 256, kRounds = 21, kRowsOfKeys = 8, kCalls = 4;
  constexpr int kKeyNumbers = kMost * kStride;
  static float query[kMost * 4 * V::kLanes] __attribute__((aligned(64)));
  static float key[kRowsOfKeys * kKeyNumbers + 64] __attribute__((aligned(64)));
  static float sums[30 * 4 * V::kLanes] __attribute__((aligned(64))), out[kChains * V::kLanes];
  for (float& value : query) value = static_cast<float>(std::rand()) / RAND_MAX;
  for (float& value : key) value = static_cast<float>(std::rand()) / RAND_MAX;
  const std::vector<int> blocks{16, 24, 36, 52, 100, kMost};
  const auto seconds = [](const auto& f) {
    const double start = processor_seconds();
    f();
    return processor_seconds() - start;
  };
  for (int channels : {32, 64, 100, 128, 256}) {
    std::vector<std::vector<double>> shares(blocks.size());
    for (int round = 0; round < kRounds; ++round) {
      for (size_t b = 0; b < blocks.size(); ++b) {
        const double peak = 600 * 2.0 * kChains * kSteps * V::kLanes / seconds([&] {
                              for (int i = 0; i < 600; ++i) multiply_adds(out);
                            });
        const double took = seconds([&] {
          for (int i = 0; i < kCalls * kRowsOfKeys; ++i)
            by_blocks(query, key + i % kRowsOfKeys * kKeyNumbers + 3, sums, channels, blocks[b]);
        });
        shares[b].push_back(kCalls * kRowsOfKeys * 2.0 * 4 * 30 * channels * V::kLanes / took / peak);
      }
    }
    std::printf("%3d channels:", channels);
    for (size_t b = 0; b < blocks.size(); ++b) {
      std::nth_element(shares[b].begin(), shares[b].begin() + kRounds / 2, shares[b].end());
      if (b == 0 || blocks[b - 1] < channels)
        std::printf("  %d: %.0f %%", std::min(blocks[b], channels), 100 * shares[b][kRounds / 2]);
    }
    std::printf("\n");
  }
}

// A cache that forgets the line that was used least recently.
class Cache {
 public:
  void load(uint64_t address) {
    for (uint64_t line = address / 64; line <= (address + 63) / 64; ++line) touch(line);
  }
  double touched = 0, missed = 0;

 private:
  static constexpr int kWays = 12, kSets = 48 * 1024 / 64 / kWays;
  void touch(uint64_t line) {
    auto& set = sets_[line % kSets];
    const auto found = std::find(set.begin(), set.end(), line);
    ++touched;
    if (found == set.end()) {
      ++missed;
      if (set.size() == kWays) set.pop_back();
    } else {
      set.erase(found);
    }
    set.insert(set.begin(), line);
  }
  std::vector<uint64_t> sets_[kSets];
};

// The loads of a band of 8 tiles of 4 rows, radius 15, in the op's order.
void count_lines(int channels) {
  constexpr int kTiles = 8, kRows = 4, kReach = 15, kAcross = 2 * kReach + 1, kChunks = 6;
  constexpr uint64_t kQueries = 1 << 20, kKeys = 1 << 24, kRowBytes = 17 * 64;
  Cache cache;
  double cycles = 0;
  for (int y = 0; y < kAcross + kRows - 1; ++y) {
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int first = kAcross * chunk / kChunks, last = kAcross * (chunk + 1) / kChunks;
        for (int e = 0; e < channels; ++e) {
          for (int r = 0; r < kRows; ++r) cache.load(kQueries + ((tile * channels + e) * kRows + r) * 64);
          for (int d = first; d < last; ++d)
            cache.load(kKeys + (y * channels + e) * kRowBytes + (tile * V::kLanes + d) * sizeof(float));
        }
        cycles += channels * kRows * (last - first) / 2.0;
      }
    }
  }
  std::printf("%3d channels: %.2f lines touched, %.3f missed\n", channels, cache.touched / cycles,
              cache.missed / cycles);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "lines") {
    for (int channels : {64, 100, 128, 160, 256}) count_lines(channels);
    return 0;
  }
  if (count > 1 && std::string(arguments[1]) == "blocks") {
    measure_blocks();
    return 0;
  }
  static float out[kChains * V::kLanes];
  const double peak = rate(2.0 * kChains * kSteps * V::kLanes, [&] { multiply_adds(out); });
  std::printf("multiply-adds alone: %.1f GFLOP/s\n", peak);
  measure<4, 5>("loads", by_loads<4, 5>);
  measure<4, 5>("permutes", by_permutes<4, 5>);
  measure<4, 6>("loads", by_loads<4, 6>);
  measure<4, 6>("permutes", by_permutes<4, 6>);
  measure<3, 8>("loads", by_loads<3, 8>);
  measure<6, 4>("loads", by_loads<6, 4>);
  measure<8, 3>("loads", by_loads<8, 3>);
  measure<1, 12>("loads", by_loads<1, 12>);
}
