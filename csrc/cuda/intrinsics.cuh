// The only file with inline PTX. Each instruction has a plain C++ twin that the emulator runs: the fragment
// layouts are those of the PTX manual (matrix fragments for mma.m16n8k8 and mma.m16n8k16, ldmatrix), with g =
// lane / 4, t = lane % 4.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.cuh"

namespace vosops::cuda {

#ifdef __CUDACC__
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// An address in shared memory as instructions take it. It is computed once: a pointer is converted anew at
// each use, by three instructions since sm_90.
struct SharedAddress {
#ifdef __CUDACC__
  unsigned address;
#else
  unsigned char* address;
#endif
  __device__ __forceinline__ SharedAddress operator+(int bytes) const { return {address + bytes}; }
};

__device__ __forceinline__ SharedAddress shared_base(void* pointer) {
#ifdef __CUDACC__
  unsigned address = shared_address(pointer);
  asm volatile("" : "+r"(address));
  return {address};
#else
  return {static_cast<unsigned char*>(pointer)};
#endif
}

// A value that is kept in a register, where the compiler would rather compute it again in a loop.
template <class T>
__device__ __forceinline__ T kept(T value) {
#ifdef __CUDACC__
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
#endif
  return value;
}

// ---- cp.async: copies Bytes (4, 8 or 16) to shared memory; `source_bytes` of them are read, the rest become
// zero ----
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int source_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#ifdef __CUDACC__
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(Bytes), "r"(source_bytes)
                 : "memory");
#else
  emulator::copy_async(shared, global, Bytes, unsigned(source_bytes));
#endif
}

// All 16 bytes, which are there.
__device__ __forceinline__ void copy_async_whole(SharedAddress shared, const void* global) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared.address), "l"(global) : "memory");
#else
  emulator::copy_async(shared.address, global, 16, 16);
#endif
}

// 16 bytes, of which `source_bytes` are read and the rest become zero.
__device__ __forceinline__ void copy_async_partly(SharedAddress shared, const void* global,
                                                  int source_bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared.address), "l"(global),
               "r"(source_bytes)
               : "memory");
#else
  emulator::copy_async(shared.address, global, 16, unsigned(source_bytes));
#endif
}

// Closes this thread's open group of copies.
__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::copy_async_commit();
#endif
}

// Waits until at most GroupsInFlight of this thread's newest groups are under way. A barrier must follow
// before other threads may read what was copied.
template <int GroupsInFlight>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsInFlight) : "memory");
#else
  emulator::copy_async_wait(GroupsInFlight);
#endif
}

// ---- ldmatrix: Count matrices of 8 rows of 16 bytes; lanes 8i .. 8i+7 name the rows of matrix i ----
// Plain: registers[i] is 4-byte word t of row g of matrix i (two 16-bit elements, or one 32-bit element).
// Transposed: 16-bit elements (row 2t, column g) and (row 2t + 1, column g).
template <int Count, bool Transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[Count], const void* row) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
#ifdef __CUDACC__
  const unsigned address = shared_address(row);
  if constexpr (Count == 1 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  else if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  else if constexpr (Count == 2 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (!Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
#else
  struct Argument {
    const unsigned char* row;
    uint32_t registers[Count];
  } a{static_cast<const unsigned char*>(row), {}};
  const unsigned lane = emulator::running->slot % emulator::kWarpSize;
  if (lane < 8 * Count) {
    if (!emulator::is_shared(row)) emulator::fail("ldmatrix from outside shared memory");
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix from a misaligned address");
    emulator::touch(row, 16, emulator::Access::kRead);
  }
  emulator::warp_collective(emulator::kFullMask, "ldmatrix", &a, [](void* const* lanes, unsigned) {
    const auto argument = [&](unsigned lane) { return static_cast<Argument*>(lanes[lane]); };
    for (unsigned lane = 0; lane < emulator::kWarpSize; ++lane)
      for (unsigned i = 0; i < Count; ++i)
        for (unsigned half = 0; half < 2; ++half) {
          const unsigned row = Transposed ? lane % 4 * 2 + half : lane / 4;
          const unsigned column = Transposed ? lane / 4 : lane % 4 * 2 + half;
          std::memcpy(reinterpret_cast<char*>(&argument(lane)->registers[i]) + 2 * half,
                      argument(8 * i + row)->row + 2 * column, 2);
        }
  });
  for (int i = 0; i < Count; ++i) registers[i] = a.registers[i];
#endif
}

// ---- mma.sync: c += a * b, a 16 x K by rows, b K x 8 by columns, c 16 x 8 in float32 ----
// c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]: row g + 8.
// 16-bit types, K = 16: a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8); b[0] (2t, g),
// b[1] (2t + 8, g),
//   each register holding that element and its neighbour in k.
// float (as TF32: the low 13 bits are not read), K = 8: a[0] (g, t), a[1] (g + 8, t), a[2] (g, t + 4), a[3]
// (g + 8, t + 4);
//   b[0] (t, g), b[1] (t + 4, g).
#ifndef __CUDACC__
namespace twin {
template <class T>
struct Multiply {
  static constexpr unsigned kDepth = 32 / sizeof(T);
  struct Argument {
    float* c;
    const uint32_t* a;
    const uint32_t* b;
  };
  static float element(const uint32_t* registers, unsigned index, unsigned part) {
    if constexpr (sizeof(T) == 4) {
      return std::bit_cast<float>(registers[index] & 0xffffe000u);
    } else {
      T value;
      std::memcpy(&value, reinterpret_cast<const char*>(registers + index) + 2 * part, 2);
      return float(value);
    }
  }
  static void combine(void* const* lanes, unsigned) {
    float a[16][kDepth], b[kDepth][8];
    for (unsigned lane = 0; lane < emulator::kWarpSize; ++lane) {
      const auto& l = *static_cast<const Argument*>(lanes[lane]);
      const unsigned g = lane / 4, t = lane % 4;
      for (unsigned i = 0; i < 4; ++i)
        for (unsigned part = 0; part < 4 / sizeof(T); ++part)
          a[g + i % 2 * 8][t * (4 / sizeof(T)) + part + i / 2 * (kDepth / 2)] = element(l.a, i, part);
      for (unsigned i = 0; i < 2; ++i)
        for (unsigned part = 0; part < 4 / sizeof(T); ++part)
          b[t * (4 / sizeof(T)) + part + i * (kDepth / 2)][g] = element(l.b, i, part);
    }
    for (unsigned lane = 0; lane < emulator::kWarpSize; ++lane) {
      float* c = static_cast<const Argument*>(lanes[lane])->c;
      for (unsigned i = 0; i < 4; ++i) {
        double terms[kDepth + 1];
        terms[kDepth] = double(c[i]);
        for (unsigned k = 0; k < kDepth; ++k)
          terms[k] = double(a[lane / 4 + i / 2 * 8][k]) * double(b[k][lane % 4 * 2 + i % 2]);
        c[i] = emulator::tensor_core_sum(terms, kDepth + 1);
      }
    }
  }
};
}  // namespace twin
#endif

// d = c + a * b, where several d may start from the same c.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, half> || std::is_same_v<T, bfloat16> || std::is_same_v<T, float>);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  else if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
#else
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  typename twin::Multiply<T>::Argument argument{d, a, b};
  emulator::warp_collective(emulator::kFullMask, "mma", &argument, twin::Multiply<T>::combine);
#endif
}

template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
  multiply_add<T>(c, c, a, b);
}

// ---- ex2.approx.ftz.f32: 2^x to 2 units in the last place, zero below the normal numbers ----
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDACC__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return x < -126.f ? 0.f : exp2f(x);
#endif
}

// ---- cvt.rna.tf32.f32: the bits of the nearest TF32 number, ties away from zero ----
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0x7fffffu ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
#endif
}

}  // namespace vosops::cuda
