// Local matching by tiles of Intel's matrix engine.
#pragma once

#if defined(VOSOPS_AMX)

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace vosops::cpu::amx {

using torch::stable::Tensor;

// Writes what local_matching returns for checked arguments to distance and index, which are contiguous.
// Returns false, with both unspecified, where the problem is better served by multiply-adds (too small, not
// for tiles) or has a number that the bound of the filter does not cover.
bool match_locally(const Tensor& query, const Tensor& key, const Tensor& mask,
                   const std::optional<Tensor>& query_mask, const std::vector<int64_t>& radius,
                   int64_t dilation, Tensor& distance, Tensor& index);

}  // namespace vosops::cpu::amx

#endif
