// The usage by Intel's matrix engine, as memory_usage.cpp computes it, with the scores' products on tiles.
//
// A task owns a block of 128 positions: packed once, they meet every group of 32 queries; products leave the
// tiles into the first-level cache, become weights 2^(score - lse) and are added to a row of lanes per
// position. Queries are packed kHeldBytes at a time, for all tasks. Floor: 2 C operations of bfloat16 per
// pair of query and position, 1, 3 or 6 products for 1, 2 or 3 pieces.
#if defined(VOSOPS_AMX)

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <string_view>

#include "cpu/amx.h"
#include "cpu/memory_amx.h"
#include "cpu/memory_read_amx.h"
#include "cpu/memory_scores.h"
#include "cpu/parallel.h"

namespace vosops::cpu {
namespace {

using namespace amx;

constexpr int64_t kBlock = 128;           // memory positions
constexpr int64_t kHeldBytes = 12 << 20;  // of packed queries

Counter served("memory_usage"), outside_pieces("memory_usage_outside");

// Adds the weights of one group of queries to the rows (position, lane).
template <int kPieces, bool kQueryBias>
void add_group(const KeyBlock<kPieces>& keys, Piece q0, Piece q1, const float* bias, const float* lse,
               int64_t steps, float* ring, float* rows) {
  const Reg lses[2] = {load_bits(lse), load_bits(lse + kRows)};
  const Reg biases[2] = {kQueryBias ? load_bits(bias) : Reg{}, kQueryBias ? load_bits(bias + kRows) : Reg{}};
  for (int64_t m = 0; m <= keys.padded(); m += kGroup) {
    if (m < keys.padded())
      group_products<kPieces>(keys.at(m / kRows), keys.at(m / kRows + 1), q0, q1, steps,
                              ring + (m / kGroup & 1) * kGroupProducts);
    if (m == 0) continue;
    const float* products = ring + ((m / kGroup - 1) & 1) * kGroupProducts;
    for (int64_t r = 0; r < kGroup; ++r) {
      const int64_t position = m - kGroup + r;
      Reg sum = load_bits(rows + position * kRows);
      for (int j = 0; j < 2; ++j) {
        const Reg score = keys.template score<kQueryBias>(load_bits(products + j * 2 * kSums + r * kRows),
                                                          position, biases[j]);
        sum += exp2_weight<6>(score - lses[j]);
      }
      Lanes::store(rows + position * kRows, sum);
    }
  }
}

template <int kPieces>
bool usage_of_element(const ScoreInputs& in, const Tensor& lse, int64_t n, float* usage) {
  const int64_t steps = score_steps(in), groups = panels_of(in.queries(), kGroup);
  const int64_t at_once =
      std::min(groups, std::max<int64_t>(16, kHeldBytes / (2 * score_panel(in, kPieces) * 2)));
  QueryGroups<kPieces> queries(in, n, at_once);
  Workspace<float> lses(at_once * kGroup);
  const float* lse_row = lse.const_data_ptr<float>() + n * lse.stride(0);
  const ReadSpan span = read_span<float>(in, n);
  std::fill_n(usage, in.memory(), 0.f);
  Outside outside;
  for (int64_t first = 0; first < groups; first += at_once) {
    queries.start(first * kGroup, std::min(at_once * kGroup, in.queries() - first * kGroup));
    pack_each(queries.groups(), outside, [&](int64_t i, Extent& extent) { queries.pack(i, extent); });
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (int64_t p = 0; p < queries.groups() * kGroup; ++p) {
      const float value = p < queries.count ? lse_row[(queries.first + p) * lse.stride(1)] : -kInfinity;
      lses[p] = value == -kInfinity ? kInfinity : value * static_cast<float>(kLog2E);
    }
    if (outside.found()) return false;
    parallel_tasks(panels_of(span.size(), kBlock), [&] {
      return [&, region = Region(), keys = std::make_unique<KeyBlock<kPieces>>(in, n, kBlock),
              ring = Workspace<float>(2 * kGroupProducts),
              rows = Workspace<float>(kBlock * kRows)](int64_t block) mutable {
        if (outside.found()) return;
        const int64_t begin = span.begin + block * kBlock;
        keys->start(begin, std::min(kBlock, span.end - begin));
        Extent extent;
        for (int64_t i = 0; i < keys->panels(); ++i) keys->pack(i, extent);
        outside.note(extent);
        std::fill_n(rows.data(), kBlock * kRows, 0.f);
        for (int64_t i = 0; i < queries.groups(); ++i) {
          const float *bias = queries.bias_of(i), *group_lse = lses.data() + i * kGroup;
          if (queries.has_bias) {
            add_group<kPieces, true>(*keys, queries.at(i, 0), queries.at(i, 1), bias, group_lse, steps,
                                     ring.data(), rows.data());
          } else {
            add_group<kPieces, false>(*keys, queries.at(i, 0), queries.at(i, 1), bias, group_lse, steps,
                                      ring.data(), rows.data());
          }
        }
        for (int64_t m = 0; m < keys->count; ++m) {
          float total = 0;
          for (int i = 0; i < kRows; ++i) total += rows[m * kRows + i];
          usage[begin + m] += total;
        }
      };
    });
    if (outside.found()) return false;
  }
  return true;
}

}  // namespace

bool usage_by_tiles(const ScoreInputs& in, const Tensor& lse, std::string_view precision, Tensor& usage) {
  if (in.key.scalar_type() == ScalarType::Double) return false;
  const int of_scores = score_pieces(in, precision);
  const bool worth = worth_tiles(of_scores, in.queries(), in.memory(), 2 * in.query.size(1));
  if (!worth || in.queries() == 0 || !ready()) return false;
  bool done = true;
  with_pieces(of_scores, [&](auto pieces) {
    for (int64_t n = 0; done && n < in.batch(); ++n)
      done = usage_of_element<pieces.value>(in, lse, n, usage.mutable_data_ptr<float>() + n * in.memory());
  });
  ++(done ? served : outside_pieces);
  return done;
}

}  // namespace vosops::cpu

#endif
