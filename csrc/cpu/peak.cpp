// The ceiling that benchmarks compare with: fused multiply-adds that never leave the registers.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "cpu/vec.h"

namespace vosops::cpu {
namespace {

constexpr int kChains = kRegisters == 32 ? 24 : 12;  // enough to hide the latency of one behind the others

// Runs `rounds` rounds of independent multiply-adds in one thread and returns how many operations those were.
int64_t peak_operations(int64_t rounds) {
  using V = Vec<float, kRegisterBytes>;
  V::Reg sum[kChains] = {};
  V::Reg factor = V::set1(0.999f), addend = V::set1(0.001f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < kChains; ++j) sum[j] = V::fma(sum[j], factor, addend);
#pragma GCC unroll 32
    for (int j = 0; j < kChains; ++j) V::pin(sum[j]);
  }
  volatile float keep = 0;
#pragma GCC unroll 32
  for (int j = 0; j < kChains; ++j) keep = keep + sum[j][0];
  return rounds * kChains * V::kLanes * 2;
}

// The same with bfloat16 dot products; 0 where the processor has none.
int64_t peak_bf16_operations(int64_t rounds) {
#if defined(VOSOPS_BF16_DOT)
  if (!has_bf16_dot()) return 0;
  using V = Vec<float, kRegisterBytes>;
#if defined(VOSOPS_BF16_MATRIX)
  constexpr int kProducts = 4;  // in a lane of sums
#else
  constexpr int kProducts = 2;
#endif
  V::Reg sum[kChains] = {};
  const V::Reg factor = V::set1(0.5f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < kChains; ++j) {
#if defined(VOSOPS_BF16_MATRIX)
      sum[j] = bf16_matrix(factor, factor, sum[j]);
#else
      sum[j] = bf16_dot(factor, factor, sum[j]);
#endif
    }
#pragma GCC unroll 32
    for (int j = 0; j < kChains; ++j) V::pin(sum[j]);
  }
  volatile float keep = 0;
#pragma GCC unroll 32
  for (int j = 0; j < kChains; ++j) keep = keep + sum[j][0];
  return rounds * kChains * V::kLanes * kProducts * 2;
#else
  return 0;
#endif
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CompositeExplicitAutograd, m) {
  m.impl("peak_operations", TORCH_BOX(&vosops::cpu::peak_operations));
  m.impl("peak_bf16_operations", TORCH_BOX(&vosops::cpu::peak_bf16_operations));
}
