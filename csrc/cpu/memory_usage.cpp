// Usage on the CPU: the sum of each memory position's weights over the queries, from the saved log-sum-exp.
//
// A task owns kMemoryBlock positions: packed once, they meet every lane panel of queries; the scores come out
// of the product in registers, become weights 2^(score - lse) and are added to a row of lanes per position,
// which stays in the first-level cache. Floor: 2 C operations per pair of query and position at the FMA rate.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "common/checks.h"
#include "cpu/gemm.h"
#include "cpu/memory_read_amx.h"
#include "cpu/memory_scores.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace vosops::cpu {
namespace {

template <class E>
void usage_of_element(const ScoreInputs& in, const Tensor& lse, int64_t n, typename E::Lanes::T* usage) {
  using V = typename E::Lanes;
  using T = typename V::T;
  constexpr int64_t kLanes = kLanePanel<V>;
  PackedQueries<E> queries(in, n);
  PackedLse<E> lses(lse, n, queries);
  const ReadSpan span = read_span<T>(in, n);
  std::fill_n(usage, in.memory(), T{0});
  parallel_tasks(panels_of(span.size(), kMemoryBlock), [&] {
    return [&, memory = std::make_unique<PackedMemory<E>>(in, n, static_cast<T>(kLog2E)),
            sums = Workspace<T>(kMemoryBlock * V::kLanes)](int64_t block) mutable {
      const int64_t begin = span.begin + block * kMemoryBlock;
      memory->start(begin, std::min(kMemoryBlock, span.end - begin));
      for (int64_t i = 0; i < memory->panels(); ++i) memory->pack_panel(i);
      std::fill_n(sums.data(), kMemoryBlock * V::kLanes, T{0});
      for (int64_t p = 0; p < queries.panels; ++p) {
        const T* bias = queries.has_bias ? queries.bias.data() + p * kLanes : nullptr;
        for (int64_t i = 0; i < memory->panels(); ++i) {
          T* rows = sums.data() + i * kKeyPanel * V::kLanes;
          memory->score(i, queries.lanes(p), bias, [&](TileSums<E>& scores) {
#pragma GCC unroll 16
            for (int j = 0; j < kKeyPanel; ++j) {
              typename V::Reg sum = V::load(rows + j * V::kLanes);
              for (int r = 0; r < kTileRegisters; ++r)
                sum += exp2_of_negative<V>(scores[j][r] -
                                           V::load(lses.data.data() + p * kLanes + r * V::kLanes));
              V::store(rows + j * V::kLanes, sum);
            }
          });
        }
      }
      for (int64_t m = 0; m < memory->count; ++m) {
        T total = 0;
        for (int i = 0; i < V::kLanes; ++i) total += sums[m * V::kLanes + i];
        usage[begin + m] = total;
      }
    };
  });
}

Tensor memory_usage(const Tensor& query, const Tensor& key, const std::optional<Tensor>& shrinkage,
                    const std::optional<Tensor>& query_bias, const std::optional<Tensor>& key_bias,
                    double scale, std::string_view precision, const Tensor& lse) {
  const ScoreInputs in{query, key, shrinkage, query_bias, key_bias, scale};
  check_scores(in);
  check_shape("lse", lse, {in.batch(), in.queries()});
  check_dtype("lse", lse, accumulator_dtype(key.scalar_type()));
  Tensor usage = torch::stable::new_empty(lse, std::vector<int64_t>{in.batch(), in.memory()});
#if defined(VOSOPS_AMX)
  if (usage_by_tiles(in, lse, precision, usage)) return usage;
#endif
  with_score_element(in, [&]<class E>(E) {
    using T = typename E::Lanes::T;
    for (int64_t n = 0; n < in.batch(); ++n)
      usage_of_element<E>(in, lse, n, usage.mutable_data_ptr<T>() + n * in.memory());
  });
  return usage;
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("memory_usage", TORCH_BOX(&vosops::cpu::memory_usage));
}
