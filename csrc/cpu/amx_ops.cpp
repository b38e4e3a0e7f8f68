// What tests and benchmarks ask of the matrix engine: why it is refused, what it served, its speed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "cpu/amx.h"
#include "cpu/parallel.h"

#if defined(VOSOPS_AMX)

namespace vosops::cpu::amx {

std::string_view float32_precision() {
  constexpr std::string_view kNames[] = {"highest", "high", "medium"};  // as vosops/_checks.py lists them
  StableIValue answer[1] = {};
  const bool answered =
      torch_call_dispatcher("vosops::float32_precision", "", answer, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS;
  if (!answered) return kNames[0];  // a process without Python
  return kNames[std::clamp<int64_t>(torch::stable::detail::to<int64_t>(answer[0]), 0, 2)];
}

namespace {

std::string amx_refusal() {
  return refusal();
}

std::string amx_counts() {
  return counts();
}

// The bfloat16 pieces of a float32 that is compared, times 10, plus those of a value.
int64_t amx_pieces(const std::string& precision) {
  const Pieces pieces = pieces_of(precision);
  return 10 * pieces.scores + pieces.values;
}

// Runs `rounds` rounds of products of random tiles that stay in the first-level cache, as every kernel here
// loads them (two by two, `pieces` pieces), in this thread; returns how many operations of bfloat16 those
// were.
int64_t peak_amx_operations(int64_t rounds, int64_t pieces) {
  if (!ready()) return 0;
  constexpr int64_t kSteps = 8;
  Workspace<uint16_t> panels(4 * kSteps * 3 * kTile);
  uint32_t state = 1;
  for (int64_t i = 0; i < 4 * kSteps * 3 * kTile; ++i) {  // zeros would be faster than any data
    state = state * 1664525u + 1013904223u;
    panels[i] = static_cast<uint16_t>((state >> 16 & 0x807f) | (0x3f00 + (state >> 28 << 4)));
  }
  alignas(64) float sums[4 * kSums];
  const Region region;
  const auto run = [&]<int kPieces>(std::integral_constant<int, kPieces>) {
    const uint16_t* p = panels.data();
    constexpr int64_t kPanel = kSteps * kPieces * kTile;
    for (int64_t i = 0; i < rounds; ++i) {
      zero_sums();
      multiply_add<kPieces>(p, p + kPanel, p + 2 * kPanel, p + 3 * kPanel, kSteps);
    }
    store_sums(sums);
    return kPieces * (kPieces + 1) / 2;
  };
  const int products = pieces == 1   ? run(std::integral_constant<int, 1>{})
                       : pieces == 2 ? run(std::integral_constant<int, 2>{})
                                     : run(std::integral_constant<int, 3>{});
  return rounds * kSteps * products * 4 * 2 * kRows * kRows * kStep;
}

}  // namespace
}  // namespace vosops::cpu::amx

#else

namespace vosops::cpu::amx {
namespace {

std::string amx_refusal() {
  return "this library was not compiled for AMX";
}
std::string amx_counts() {
  return "";
}
int64_t amx_pieces(const std::string&) {
  return 0;
}
int64_t peak_amx_operations(int64_t, int64_t) {
  return 0;
}

}  // namespace
}  // namespace vosops::cpu::amx

#endif

STABLE_TORCH_LIBRARY_IMPL(vosops, CompositeExplicitAutograd, m) {
  m.impl("amx_refusal", TORCH_BOX(&vosops::cpu::amx::amx_refusal));
  m.impl("amx_counts", TORCH_BOX(&vosops::cpu::amx::amx_counts));
  m.impl("amx_pieces", TORCH_BOX(&vosops::cpu::amx::amx_pieces));
  m.impl("peak_amx_operations", TORCH_BOX(&vosops::cpu::amx::peak_amx_operations));
}
