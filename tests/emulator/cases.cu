// Kernels with one planted fault each, and their correct twins: `cases NAME` runs one and prints "ok" or the
// fault. Built by test_emulator.py, which says what each must print.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cuda/intrinsics.cuh"
#include "emulator.h"

#define LAUNCH(kernel, grid, block, shared_bytes, ...) \
  emulator::launch(#kernel, kernel, grid, block, shared_bytes, nullptr, __VA_ARGS__)
#define DYNAMIC_SHARED(Struct, name) \
  Struct& name = *static_cast<Struct*>(emulator::shared_memory(sizeof(Struct)))

using vosops::cuda::bfloat16;
using vosops::cuda::copy_async;
using vosops::cuda::copy_async_commit;
using vosops::cuda::copy_async_wait;
using vosops::cuda::load_matrices;
using vosops::cuda::multiply_accumulate;
using vosops::cuda::to_tf32;

namespace {

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("wrong: ") + what);
}

// ---- Faults ----
struct Floats {
  float values[256];
};

// Sums a block's values by halves. Fault: the barrier after the first store is missing.
__global__ void block_sum(const float* x, float* sum, bool barrier) {
  DYNAMIC_SHARED(Floats, s);
  s.values[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (barrier) __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) s.values[threadIdx.x] += s.values[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(sum, s.values[0]);
}

void sum_case(bool barrier) {
  std::vector<float> x(1024, 0.5f);
  float sum = 0;
  LAUNCH(block_sum, dim3(4), dim3(256), sizeof(Floats), x.data(), &sum, barrier);
  require(sum == 512, "block sum");
}

__global__ void write_after_read(float* out) {
  DYNAMIC_SHARED(Floats, s);
  s.values[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  const float next = s.values[(threadIdx.x + 1) % blockDim.x];
  s.values[threadIdx.x] = next;  // another thread may still have to read it
  out[threadIdx.x] = next;
}

__global__ void warp_exchange(float* out, bool synchronised) {
  DYNAMIC_SHARED(Floats, s);
  s.values[threadIdx.x] = float(threadIdx.x);
  if (synchronised) __syncwarp();
  out[threadIdx.x] = s.values[threadIdx.x ^ 1];
  if (synchronised) __syncwarp();
  s.values[threadIdx.x ^ 2] = 1;
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void early_exit() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}

__global__ void divergent_shuffle(int* out) {
  if (threadIdx.x % 32 != 7) out[threadIdx.x] = __shfl_xor_sync(emulator::kFullMask, int(threadIdx.x), 1);
}

__global__ void unwritten_read(float* out) {
  DYNAMIC_SHARED(Floats, s);
  if (threadIdx.x != 3) s.values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s.values[threadIdx.x];
}

__global__ void stale_read(float* out) {  // the first block writes what the second one only reads
  DYNAMIC_SHARED(Floats, s);
  if (blockIdx.x == 0) s.values[threadIdx.x] = 1;
  out[blockIdx.x * blockDim.x + threadIdx.x] = s.values[threadIdx.x];
}

__global__ void shared_overflow(float* out, int shift) {
  DYNAMIC_SHARED(Floats, s);
  s.values[threadIdx.x] = 1;
  s.values[threadIdx.x + shift] = 2;
  out[threadIdx.x] = s.values[threadIdx.x];
}

__global__ void write_everywhere(float* out, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = 1;
}

__global__ void global_race(float* out) {
  out[threadIdx.x / 2] = 1;
}

__global__ void block_race(float* out) {
  out[threadIdx.x] = float(blockIdx.x);
}

__global__ void misaligned(const float* x, float4* out) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(x + 1 + 4 * threadIdx.x);
}

enum class Wait { kNone, kWithoutBarrier, kFull };

__global__ void async_copy(const float* x, float* out, Wait wait) {
  DYNAMIC_SHARED(Floats, s);
  if (threadIdx.x < 64) copy_async<16>(s.values + 4 * threadIdx.x, x + 4 * threadIdx.x);
  copy_async_commit();
  if (wait != Wait::kNone) copy_async_wait<0>();
  if (wait == Wait::kFull) __syncthreads();
  out[threadIdx.x] = s.values[threadIdx.x];
  copy_async_wait<0>();
}

void async_case(Wait wait) {
  std::vector<Floats> x(1), out(1);  // 16-byte aligned by the allocator
  for (int i = 0; i < 256; ++i) x[0].values[i] = float(i);
  LAUNCH(async_copy, dim3(1), dim3(256), sizeof(Floats), x[0].values, out[0].values, wait);
  for (int i = 0; i < 256; ++i) require(out[0].values[i] == float(i), "copied values");
}

// Two groups in flight: the older one is there after wait<1>, with the rest of a short source as zeros.
__global__ void async_groups(const float* x, float* out) {
  DYNAMIC_SHARED(Floats, s);
  copy_async<16>(s.values + 4 * threadIdx.x, x, 4);
  copy_async_commit();
  copy_async<4>(s.values + 128 + threadIdx.x, x + 1);
  copy_async_commit();
  copy_async_wait<1>();
  for (int i = 0; i < 4; ++i) out[5 * threadIdx.x + i] = s.values[4 * threadIdx.x + i];
  copy_async_wait<0>();
  out[5 * threadIdx.x + 4] = s.values[128 + threadIdx.x];
}

__global__ void never_waits(const float* x) {
  DYNAMIC_SHARED(Floats, s);
  copy_async<4>(s.values + threadIdx.x, x);
}

// ---- Instructions ----
__global__ void shuffles(int* out) {
  const int lane = int(threadIdx.x % 32);
  int* mine = out + 12 * threadIdx.x;
  mine[0] = __shfl_sync(emulator::kFullMask, lane, 5);
  mine[1] = __shfl_xor_sync(emulator::kFullMask, lane, 16);
  mine[2] = __shfl_down_sync(emulator::kFullMask, lane, 3);
  mine[3] = __shfl_up_sync(emulator::kFullMask, lane, 3);
  mine[4] = __shfl_sync(emulator::kFullMask, lane, 9, 8);
  mine[5] = int(__ballot_sync(emulator::kFullMask, lane % 3 == 0));
  mine[6] = int(__match_any_sync(emulator::kFullMask, lane / 8));
  mine[7] = __reduce_min_sync(emulator::kFullMask, lane + 4);
  mine[8] = __reduce_add_sync(emulator::kFullMask, lane);
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  mine[9] = lane < 16 ? __shfl_xor_sync(half, lane, 1) : __shfl_xor_sync(half, lane, 2);
  mine[10] = __syncthreads_count(threadIdx.x % 4 == 0);
  mine[11] = __syncthreads_or(threadIdx.x == 70) + 2 * __syncthreads_and(threadIdx.x < 70);
}

void shuffle_case() {
  std::vector<int> out(96 * 12);
  LAUNCH(shuffles, dim3(1), dim3(96), 0, out.data());
  for (int i = 0; i < 96; ++i) {
    const int lane = i % 32;
    const int* mine = out.data() + 12 * i;
    require(mine[0] == 5 && mine[1] == (lane ^ 16), "__shfl_sync, __shfl_xor_sync");
    require(mine[2] == (lane < 29 ? lane + 3 : lane) && mine[3] == (lane < 3 ? lane : lane - 3),
            "__shfl_down, _up");
    require(mine[4] == lane / 8 * 8 + 1, "__shfl_sync with a width");
    require(unsigned(mine[5]) == 0x49249249u && unsigned(mine[6]) == 0xffu << lane / 8 * 8, "ballot, match");
    require(mine[7] == 4 && mine[8] == 496, "reductions");
    require(mine[9] == (lane < 16 ? lane ^ 1 : lane ^ 2), "shuffles of half warps");
    require(mine[10] == 24 && mine[11] == 1, "__syncthreads_count, _or, _and");
  }
}

// C = A B with the fragments filled element by element as the PTX manual lays them out.
template <class T, int K>
__global__ void multiply(const float* a, const float* b, float* c) {
  constexpr int kPack = 4 / sizeof(T);
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  union Register {
    uint32_t bits;
    T values[kPack];
    Register() : bits(0) {}
  };
  uint32_t ra[4], rb[2];
  for (int i = 0; i < 4; ++i) {
    Register r;
    for (int p = 0; p < kPack; ++p) r.values[p] = T(a[(g + i % 2 * 8) * K + t * kPack + p + i / 2 * (K / 2)]);
    ra[i] = r.bits;
  }
  for (int i = 0; i < 2; ++i) {
    Register r;
    for (int p = 0; p < kPack; ++p) r.values[p] = T(b[(t * kPack + p + i * (K / 2)) * 8 + g]);
    rb[i] = r.bits;
  }
  float rc[4];
  for (int i = 0; i < 4; ++i) rc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  multiply_accumulate<T>(rc, ra, rb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = rc[i];
}

template <class T, int K>
void multiply_case() {
  std::vector<float> a(16 * K), b(K * 8), c(16 * 8);
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(int(i * 37 % 17) - 8);
  for (size_t i = 0; i < b.size(); ++i) b[i] = float(int(i * 53 % 19) - 9);
  for (size_t i = 0; i < c.size(); ++i) c[i] = float(i);
  LAUNCH((multiply<T, K>), dim3(1), dim3(32), 0, a.data(), b.data(), c.data());
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float want = float(8 * m + n);
      for (int k = 0; k < K; ++k) want += a[m * K + k] * b[k * 8 + n];
      require(c[8 * m + n] == want, "matrix product");
    }
}

// The same product with the fragments loaded by ldmatrix: A by rows, B either by columns (plain) or by rows
// (transposed).
struct Tiles {
  alignas(16) bfloat16 a[16][16], b_columns[8][16], b_rows[16][8];
};
__global__ void multiply_loaded(const float* a, const float* b, float* c, bool transposed) {
  DYNAMIC_SHARED(Tiles, s);
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += 32) s.a[i / 16][i % 16] = bfloat16(a[i]);
  for (int i = lane; i < 16 * 8; i += 32) {
    s.b_rows[i / 8][i % 8] = bfloat16(b[i]);
    s.b_columns[i % 8][i / 8] = bfloat16(b[i]);
  }
  __syncwarp();
  uint32_t ra[4], rb[2];
  load_matrices<4>(ra, &s.a[lane % 16][lane / 16 * 8]);
  if (transposed)
    load_matrices<2, true>(rb, &s.b_rows[lane % 16][0]);
  else
    load_matrices<2>(rb, &s.b_columns[lane % 8][lane / 8 % 2 * 8]);
  float rc[4] = {};
  multiply_accumulate<bfloat16>(rc, ra, rb);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = rc[i];
}

void load_case(bool transposed) {
  std::vector<float> a(256), b(128), c(128);
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(int(i * 37 % 17) - 8);
  for (size_t i = 0; i < b.size(); ++i) b[i] = float(int(i * 53 % 19) - 9);
  LAUNCH(multiply_loaded, dim3(1), dim3(32), sizeof(Tiles), a.data(), b.data(), c.data(), transposed);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float want = 0;
      for (int k = 0; k < 16; ++k) want += a[m * 16 + k] * b[k * 8 + n];
      require(c[8 * m + n] == want, "matrix product");
    }
}

void tf32_case() {
  for (int i = 0; i < 100000; ++i) {
    const float x = std::ldexp(float(i * 7919 % 65537) - 32768.f, i % 40 - 20) * 1.0000153f;
    const float y = __uint_as_float(to_tf32(x));
    require((to_tf32(x) & 0x1fffu) == 0 && std::abs(y - x) <= std::abs(x) * 0x1p-11f, "rounding to TF32");
  }
  require(to_tf32(1.f + 0x1p-11f) == __float_as_uint(1.f + 0x1p-10f), "ties away from zero");
}

// ---- Fragments as somebody else describes them: the tables that cute_layouts.cpp printed, from standard
// input
using Table = std::vector<int>;

Table read_table(const std::string& name, int values) {
  std::string found;
  Table table(size_t(32 * values));
  require(bool(std::cin >> found) && found == name, "the table's name");
  for (int& entry : table) require(bool(std::cin >> entry), "the table's length");
  return table;
}

// A product with its factors in registers by table, and the result taken from them by table.
template <class T>
void fragments_of_product() {
  constexpr int kPack = 4 / sizeof(T), kDepth = 32 / sizeof(T);
  using Multiply = vosops::cuda::twin::Multiply<T>;
  const Table a_table = read_table("A", 4 * kPack), b_table = read_table("B", 2 * kPack),
              c_table = read_table("C", 4);
  std::vector<float> a(16 * kDepth), b(8 * kDepth), c(16 * 8);
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(int(i * 37 % 17) - 8);
  for (size_t i = 0; i < b.size(); ++i) b[i] = float(int(i * 53 % 19) - 9);
  for (size_t i = 0; i < c.size(); ++i) c[i] = float(i);
  union Register {
    uint32_t bits;
    T values[kPack];
    Register() : bits(0) {}
  };
  struct Lane {
    Register a[4], b[2];
    float c[4];
    typename Multiply::Argument argument;
  };
  std::vector<Lane> lanes(32);
  void* arguments[32];
  for (size_t lane = 0; lane < 32; ++lane) {
    Lane& l = lanes[lane];
    for (size_t i = 0; i < 4 * kPack; ++i)
      l.a[i / kPack].values[i % kPack] = T(a[size_t(a_table[lane * 4 * kPack + i])]);
    for (size_t i = 0; i < 2 * kPack; ++i)
      l.b[i / kPack].values[i % kPack] = T(b[size_t(b_table[lane * 2 * kPack + i])]);
    for (size_t i = 0; i < 4; ++i) l.c[i] = c[size_t(c_table[lane * 4 + i])];
    l.argument = {l.c, &l.a[0].bits, &l.b[0].bits};
    arguments[lane] = &l.argument;
  }
  Multiply::combine(arguments, 0xffffffffu);
  for (size_t lane = 0; lane < 32; ++lane)
    for (size_t i = 0; i < 4; ++i) {
      const int at = c_table[lane * 4 + i], m = at % 16, n = at / 16;
      float want = c[size_t(at)];
      for (int k = 0; k < kDepth; ++k) want += a[size_t(m + 16 * k)] * b[size_t(n + 8 * k)];
      require(lanes[lane].c[i] == want, "fragments of a product");
    }
}

struct Words {
  alignas(16) uint16_t values[32][8];
};
template <bool Transposed>
__global__ void load_by_table(const int* rows, uint32_t* out) {
  DYNAMIC_SHARED(Words, s);
  for (int i = 0; i < 8; ++i) s.values[threadIdx.x][i] = uint16_t(8 * threadIdx.x + unsigned(i));
  __syncwarp();
  uint32_t registers[4];
  load_matrices<4, Transposed>(registers, s.values[rows[threadIdx.x]]);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + unsigned(i)] = registers[i];
}

template <bool Transposed>
void fragments_of_load() {
  const Table rows = read_table("rows", 1), elements = read_table("elements", 8);
  std::vector<uint32_t> out(32 * 4);
  LAUNCH(load_by_table<Transposed>, dim3(1), dim3(32), sizeof(Words), rows.data(), out.data());
  for (size_t i = 0; i < 256; ++i)
    require(int(out[i / 2] >> i % 2 * 16 & 0xffff) == elements[i], "what ldmatrix loads");
}

void fragments_case() {
  const auto next = [](const char* name) {
    std::string found;
    require(bool(std::cin >> found) && found == name, "the instruction's name");
  };
  next("bfloat16");
  fragments_of_product<bfloat16>();
  next("float16");
  fragments_of_product<vosops::cuda::half>();
  next("tf32");
  fragments_of_product<float>();
  next("ldmatrix");
  fragments_of_load<false>();
  next("ldmatrix.trans");
  fragments_of_load<true>();
}

// ---- Sums of products and what they are added to ----
__global__ void add_small(float term, float* out) {
  const uint32_t factor = __float_as_uint(term) >> 16, pair = factor << 16 | factor;
  const uint32_t ones = 0x3f803f80u, a[4] = {pair, pair, pair, pair}, b[2] = {ones, ones};
  float c[4] = {1, 1, 1, 1};
  multiply_accumulate<bfloat16>(c, a, b);
  out[threadIdx.x] = c[0];
}

void small_terms_case(float term, float want) {
  std::vector<float> out(32);
  LAUNCH(add_small, dim3(1), dim3(32), 0, term, out.data());
  for (float sum : out) require(sum == want, "1 plus sixteen small products");
}

// ---- Visits ----
__global__ void visits(int* out) {
  for (int i = 0; i < 3; ++i) {
    emulator::visit("uniform", 1);
    if (threadIdx.x % 32 < 5) {
      emulator::visit("few_lanes", 2);
      out[threadIdx.x] = i;
    }
    if (threadIdx.x >= 32) emulator::visit("second_warp", 1);
    for (unsigned j = 0; j < threadIdx.x % 3; ++j) emulator::visit("twice_at_most", 1);
    if (threadIdx.x % 32 < 6) emulator::visit("three_places", 4, int(threadIdx.x % 3));
    __syncwarp();
  }
}

template <class Kernel, class... Arguments>
void simple(Kernel kernel, unsigned blocks, unsigned block_size, Arguments... arguments) {
  emulator::launch("kernel", kernel, dim3(blocks), dim3(block_size), sizeof(Floats), nullptr, arguments...);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<float> out(4096), x(4096, 1.f);
  std::vector<int> integers(4096);
  const std::map<std::string, std::function<void()>> cases{
      {"fragments", fragments_case},
      {"small_terms_kept", [] { small_terms_case(0x1p-26f, 1 + 0x1p-22f); }},
      {"small_terms_lost", [] { small_terms_case(0x1p-26f, 1); }},
      {"terms_of_25_bits_kept", [] { small_terms_case(0x1p-25f, 1 + 0x1p-21f); }},
      {"visits", [&] { simple(visits, 1, 64, integers.data()); }},
      {"block_sum", [] { sum_case(true); }},
      {"missing_barrier", [] { sum_case(false); }},
      {"write_after_read", [&] { simple(write_after_read, 1, 64, out.data()); }},
      {"warp_exchange", [&] { simple(warp_exchange, 1, 64, out.data(), true); }},
      {"missing_syncwarp", [&] { simple(warp_exchange, 1, 64, out.data(), false); }},
      {"divergent_barrier", [] { simple(divergent_barrier, 1, 64); }},
      {"early_exit", [] { simple(early_exit, 1, 64); }},
      {"divergent_shuffle", [&] { simple(divergent_shuffle, 1, 64, integers.data()); }},
      {"unwritten_read", [&] { simple(unwritten_read, 1, 64, out.data()); }},
      {"stale_read", [&] { simple(stale_read, 2, 64, out.data()); }},
      {"shared_overflow", [&] { simple(shared_overflow, 1, 256, out.data(), 256); }},
      {"shared_in_bounds", [&] { simple(shared_overflow, 1, 256, out.data(), 0); }},
      {"global_in_bounds",
       [] {
         std::vector<float> small(200);
         simple(write_everywhere, 1, 256, small.data(), 200);
       }},
      {"global_overflow",
       [] {
         std::vector<float> small(200);
         simple(write_everywhere, 1, 256, small.data(), 201);
       }},
      {"global_race", [&] { simple(global_race, 1, 64, out.data()); }},
      {"block_race", [&] { simple(block_race, 2, 64, out.data()); }},
      {"misaligned", [&] { simple(misaligned, 1, 8, x.data(), reinterpret_cast<float4*>(out.data())); }},
      {"async_copy", [] { async_case(Wait::kFull); }},
      {"async_without_wait", [] { async_case(Wait::kNone); }},
      {"async_without_barrier", [] { async_case(Wait::kWithoutBarrier); }},
      {"async_groups",
       [&] {
         x[1] = 2;
         simple(async_groups, 1, 32, x.data(), out.data());
         for (int i = 0; i < 32 * 5; ++i)
           require(out[i] == (i % 5 == 0 ? 1.f : i % 5 == 4 ? 2.f : 0.f), "copied values");
       }},
      {"never_waits", [&] { simple(never_waits, 1, 32, x.data()); }},
      {"block_too_large", [&] { simple(write_everywhere, 1, 1025, out.data(), 0); }},
      {"grid_too_large", [&] { LAUNCH(write_everywhere, dim3(1, 65536), dim3(1), 0, out.data(), 0); }},
      {"shared_164k", [&] { LAUNCH(write_everywhere, dim3(1), dim3(1), 164 << 10, out.data(), 0); }},
      {"shuffles", shuffle_case},
      {"mma_float16", multiply_case<vosops::cuda::half, 16>},
      {"mma_bfloat16", multiply_case<bfloat16, 16>},
      {"mma_tf32", multiply_case<float, 8>},
      {"ldmatrix", [] { load_case(false); }},
      {"ldmatrix_transposed", [] { load_case(true); }},
      {"tf32", tf32_case},
  };
  if (argc != 2 || !cases.count(argv[1])) {
    for (const auto& [name, run] : cases) std::puts(name.c_str());
    return 2;
  }
  try {
    cases.at(argv[1])();
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  std::puts("ok");
}
