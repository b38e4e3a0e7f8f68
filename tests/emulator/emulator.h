// CUDA's language and library, as far as csrc/cuda needs it, for a plain C++ compiler: see README.md.
// Every thread of a block is a fibre; this header is what kernels see, emulator.cpp is the scheduler and the
// checks.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- Function and variable attributes ----
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ const
#define __align__(bytes) alignas(bytes)
#define __shared__ static_assert(false, "declare one struct and use DYNAMIC_SHARED(Struct, name)");

// ---- Vector types ----
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

namespace emulator {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a kernel can see of the thread that runs it.
struct ThreadView {
  uint3 thread_index;
  uint3 block_index;
  dim3 block_size;
  dim3 grid_size;
  unsigned slot;  // flat index in the block
};
extern __thread ThreadView* running;  // null outside kernels

// Runs `call(context)` in every thread of the grid. Throws Fault for a bad configuration, a divergent barrier
// or, in a checked build, any race, unwritten read, access out of bounds or misaligned access of shared
// memory.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
         const void* context);

void* shared_memory(size_t bytes);
void block_barrier(int line);
int block_reduce(int predicate, int line);  // the number of threads of the block whose predicate is not 0

// Waits until every lane of `mask` is here, then `combine` runs once with every lane's argument (null outside
// the mask).
using Combine = void (*)(void* const* arguments, unsigned mask);
void warp_collective(unsigned mask, const char* name, void* argument, Combine combine,
                     bool orders_memory = false);

enum class Access { kRead, kWrite, kAtomic };
void touch(const volatile void* address, size_t bytes,
           Access access);  // tells the checks of an access made elsewhere
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// cp.async: recorded now, carried out by the wait.
void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes);
void copy_async_commit();
void copy_async_wait(unsigned groups_in_flight);

bool is_shared(const volatile void* address);
size_t shared_limit();  // bytes that a block of the emulated architecture may have
int multiprocessors();

// What a tensor core makes of products and, as the last term, what they are added to.
float tensor_core_sum(const double* terms, unsigned count);

// Counts one execution, by this thread's warp, of the code that follows, of which there are so many unrolled
// copies. Lanes that come between the same two warp-wide operations or barriers come together, to the same
// `number` of the copies where that is given. Negative `copies` are loads of each copy, of which the compiler
// decides.
void visit(const char* name, int copies, int number = 0);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            void*, Arguments&&... arguments) {
  struct Context {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  } context{kernel, {std::forward<Arguments>(arguments)...}};
  run(
      name, grid, block, shared_bytes,
      [](const void* c) {
        const auto& k = *static_cast<const Context*>(c);
        std::apply(k.kernel, k.parameters);
      },
      &context);
}

template <class T, class Source>
T shuffle(unsigned mask, const char* name, T value, Source source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Argument {
    T value, result;
    unsigned source;
  } a{value, value, source(running->slot % kWarpSize)};
  warp_collective(mask, name, &a, [](void* const* lanes, unsigned mask) {
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (!(mask >> i & 1)) continue;
      auto* me = static_cast<Argument*>(lanes[i]);
      if (!(mask >> me->source & 1))
        fail("a shuffle reads lane %u, which its mask %08x leaves out", me->source, mask);
      me->result = static_cast<Argument*>(lanes[me->source])->value;
    }
  });
  return a.result;
}

template <class T, class Result, class Reduce>
Result warp_reduce(unsigned mask, const char* name, T value, Reduce) {
  struct Argument {
    T value;
    Result result;
  } a{value, {}};
  warp_collective(mask, name, &a, [](void* const* lanes, unsigned mask) {
    T values[kWarpSize] = {};
    for (unsigned i = 0; i < kWarpSize; ++i)
      if (mask >> i & 1) values[i] = static_cast<Argument*>(lanes[i])->value;
    for (unsigned i = 0; i < kWarpSize; ++i)
      if (mask >> i & 1) static_cast<Argument*>(lanes[i])->result = Reduce{}(values, mask, i);
  });
  return a.result;
}

template <class T, class Update>
[[gnu::no_sanitize("thread")]] T atomic(T* address, Update update) {
  touch(address, sizeof(T), Access::kAtomic);
  T old = *address;
  *address = update(old);
  return old;
}

}  // namespace emulator

// ---- Built-in variables ----
#define threadIdx (emulator::running->thread_index)
#define blockIdx (emulator::running->block_index)
#define blockDim (emulator::running->block_size)
#define gridDim (emulator::running->grid_size)

// ---- Barriers ----
inline void __syncthreads(int line = __builtin_LINE()) {
  emulator::block_barrier(line);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return emulator::block_reduce(predicate, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return emulator::block_reduce(predicate, line) > 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return emulator::block_reduce(!predicate, line) == 0;
}
inline void __syncwarp(unsigned mask = emulator::kFullMask) {
  emulator::warp_collective(mask, "__syncwarp", nullptr, [](void* const*, unsigned) {}, true);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- Shuffles, votes, reductions ----
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::shuffle(mask, "__shfl_sync", value,
                           [=](unsigned me) { return me / width * width + unsigned(lane) % width; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulator::shuffle(mask, "__shfl_xor_sync", value, [=](unsigned me) {
    unsigned source = me ^ unsigned(bits);
    return source / width <= me / width ? source : me;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle(mask, "__shfl_down_sync", value, [=](unsigned me) {
    return me % width + delta < unsigned(width) ? me + delta : me;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle(mask, "__shfl_up_sync", value,
                           [=](unsigned me) { return me % width >= delta ? me - delta : me; });
}
namespace emulator {
struct Ballot {
  unsigned operator()(const int* values, unsigned mask, unsigned) const {
    unsigned bits = 0;
    for (unsigned i = 0; i < kWarpSize; ++i) bits |= unsigned((mask >> i & 1) && values[i]) << i;
    return bits;
  }
};
template <class Fold>
struct Folded {
  template <class T>
  T operator()(const T* values, unsigned mask, unsigned lane) const {
    T total = values[lane];
    for (unsigned i = 0; i < kWarpSize; ++i)
      if ((mask >> i & 1) && i != lane) total = Fold{}(total, values[i]);
    return total;
  }
};
struct Matching {
  template <class T>
  unsigned operator()(const T* values, unsigned mask, unsigned lane) const {
    unsigned bits = 0;
    for (unsigned i = 0; i < kWarpSize; ++i)
      bits |= unsigned((mask >> i & 1) && values[i] == values[lane]) << i;
    return bits;
  }
};
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Greatest {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Sum {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Union {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
}  // namespace emulator
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::warp_reduce<int, unsigned>(mask, "__ballot_sync", predicate, emulator::Ballot{});
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return emulator::warp_reduce<T, unsigned>(mask, "__match_any_sync", value, emulator::Matching{});
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return emulator::warp_reduce<T, T>(mask, "__reduce_min_sync", value, emulator::Folded<emulator::Least>{});
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return emulator::warp_reduce<T, T>(mask, "__reduce_max_sync", value,
                                     emulator::Folded<emulator::Greatest>{});
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return emulator::warp_reduce<T, T>(mask, "__reduce_add_sync", value, emulator::Folded<emulator::Sum>{});
}
template <class T>
T __reduce_or_sync(unsigned mask, T value) {
  return emulator::warp_reduce<T, T>(mask, "__reduce_or_sync", value, emulator::Folded<emulator::Union>{});
}

// ---- Atomics ----
template <class T>
T atomicAdd(T* address, T value) {
  return emulator::atomic(address, [=](T old) { return T(old + value); });
}
template <class T>
T atomicMin(T* address, T value) {
  return emulator::atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, T value) {
  return emulator::atomic(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicOr(T* address, T value) {
  return emulator::atomic(address, [=](T old) { return T(old | value); });
}
template <class T>
T atomicExch(T* address, T value) {
  return emulator::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return emulator::atomic(address, [=](T old) { return old == expected ? value : old; });
}

// ---- Arithmetic ----
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(unsigned(x));
}
inline int __ffs(int x) {
  return x ? std::countr_zero(unsigned(x)) + 1 : 0;
}
inline int __ffsll(long long x) {
  return x ? std::countr_zero((unsigned long long)(x)) + 1 : 0;
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
