// The ceiling that benchmarks compare with: fused multiply-adds that never leave the registers.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "cpu/vec.h"

namespace vosops::cpu {
namespace {

// Runs `rounds` rounds of independent multiply-adds in one thread and returns how many operations those were.
int64_t peak_operations(int64_t rounds) {
  using V = Vec<float, kRegisterBytes>;
  constexpr int kChains = 12;  // enough to hide the latency of one behind the others
  V::Reg sum[kChains] = {};
  V::Reg factor = V::set1(0.999f), addend = V::set1(0.001f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) sum[j] = V::fma(sum[j], factor, addend);
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) V::pin(sum[j]);
  }
  volatile float keep = 0;
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j) keep = keep + sum[j][0];
  return rounds * kChains * V::kLanes * 2;
}

// The same with bfloat16 dot products; 0 where the processor has none.
int64_t peak_bf16_operations(int64_t rounds) {
#if defined(__AVX512BF16__)
  if (!has_bf16_dot()) return 0;
  using V = Vec<float, 64>;
  constexpr int kChains = 12;
  V::Reg sum[kChains] = {};
  const V::Reg factor = V::set1(0.5f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) sum[j] = bf16_dot(factor, factor, sum[j]);
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) V::pin(sum[j]);
  }
  volatile float keep = 0;
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j) keep = keep + sum[j][0];
  return rounds * kChains * V::kLanes * 4;
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
