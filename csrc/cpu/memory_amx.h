// The scores of a memory read (common/score_inputs.h) by Intel's matrix engine: queries and keys as panels of
// bfloat16 pieces (cpu/amx.h), and what turns their products into scores. Shared by the read, its backward,
// the usage and the selection.
//
// Products of 32 memory positions (rows, A panels) with 32 queries (columns, B panels) leave the tiles as
// (2, 32, 16): lanes are queries, so that a maximum or a sum over the memory needs no step across lanes.
#pragma once

#if defined(VOSOPS_AMX)

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string_view>
#include <type_traits>

#include "common/score_inputs.h"
#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/memory_scores.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace vosops::cpu::amx {

constexpr int64_t kGroup = 2 * kRows;                       // queries, or positions, of one product
constexpr int64_t kGroupProducts = int64_t{2} * 2 * kSums;  // float32

// The pieces that the scores need: as many as query and key, and the squares of keys, which are exact.
inline int score_pieces(const ScoreInputs& in, std::string_view precision) {
  const int of_float = pieces_of(precision).scores;
  const ScalarType query = in.query.scalar_type(), key = in.key.scalar_type();
  const int pieces = std::max(pieces_for(query, of_float), pieces_for(key, of_float));
  const bool rounded = of_float == 1 && (query == ScalarType::Float || key == ScalarType::Float);
  if (!in.squares() || rounded) return pieces;
  return std::max(pieces, key == ScalarType::BFloat16 ? 2 : 3);
}

// Whether tiles are the faster way: on small problems pieces, packing and tiles that are not full cost more
// than they save. `channels`: those of keys and values together. Measured on an Intel Xeon (family 6, model
// 207), one thread, against the kernels of the avx512 library.
inline bool worth_tiles(int pieces, int64_t queries, int64_t memory, int64_t channels) {
  if (pieces == 1) return memory >= 64;
  if (pieces == 2) return queries >= 128 && memory >= 256 && channels >= 64;
  return queries >= 128 && memory >= 1024 && channels >= 128;
}

// Calls f(std::integral_constant<int, pieces>).
template <class F>
void with_pieces(int pieces, const F& f) {
  if (pieces == 1) return f(std::integral_constant<int, 1>{});
  if (pieces == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 3>{});
}

// Steps of 32 channels of a query or key panel: the channels, then their squares.
inline int64_t channel_steps(const ScoreInputs& in) {
  return panels_of(in.key.size(1), kStep);
}
inline int64_t score_steps(const ScoreInputs& in) {
  return channel_steps(in) * (in.squares() ? 2 : 1);
}
inline int64_t score_panel(const ScoreInputs& in, int pieces) {  // bfloat16
  return score_steps(in) * pieces * kTile;
}

// Packs queries [first, first + 16) of batch element n, zeros after the last.
template <int kPieces, bool kB>
void pack_query_panel(const ScoreInputs& in, int64_t n, int64_t first, uint16_t* to, Extent& extent) {
  StridedMatrix matrix = StridedMatrix::of(in.query, n * in.query.stride(0));
  const int64_t count = std::clamp<int64_t>(in.queries() - first, 0, kRows), steps = channel_steps(in);
  matrix.channels = in.key.size(1);
  pack_panel<kPieces, kB>(matrix, first, count, steps, to, extent);
  if (!in.squares()) return;
  matrix.data = static_cast<const char*>(matrix.data) +
                matrix.channels * matrix.channel_stride * in.query.element_size();
  pack_panel<kPieces, kB>(matrix, first, count, steps, to + steps * kPieces * kTile, extent);
}

// Packs the squares of 16 vectors, rounded once to float32; see pack_panel().
template <int kPieces, bool kB>
void pack_squares(const StridedMatrix& matrix, int64_t first, int64_t steps, uint16_t* to, Extent& extent,
                  uint32_t vectors) {
  dispatch_floating(matrix.dtype, [&]<class S>(S) {
    alignas(64) float squares[kTile];
    const auto pack = [&](auto vector, auto element, auto adjacent) {
      constexpr bool kAdjacent = decltype(adjacent)::value;
      const S* from = static_cast<const S*>(matrix.data) + first * vector;
      for (int64_t s = 0; s < steps; ++s, from += kStep * element) {
        const int64_t count = std::min<int64_t>(kStep, matrix.channels - s * kStep);
        std::fill_n(squares, kTile, 0.f);
        for (int64_t e = 0; e < count; ++e) {
          for (int64_t v = 0; v < kRows; ++v) {
            if (!(vectors >> v & 1)) continue;
            const auto x = static_cast<float>(widen(from[v * vector + e * element]));
            squares[kAdjacent ? v * kStep + e : e * kRows + v] = x * x;
          }
        }
        pack_tile<kPieces, kAdjacent, kB>(squares, kAdjacent ? kStep : kRows, 0xffffu, ~0u, 1.f,
                                          to + s * kPieces * kTile, extent);
      }
    };
    constexpr std::integral_constant<int64_t, 1> kOne;
    if (matrix.pixel_stride == 1) return pack(kOne, matrix.channel_stride, std::false_type{});
    pack(matrix.pixel_stride, matrix.channel_stride, std::true_type{});
  });
}

// Packs memory positions [first, first + count), count <= 16, of batch element n. Those whose bit in `read`
// is 0 are 0, whatever lies there.
template <int kPieces, bool kB>
void pack_key_panel(const ScoreInputs& in, int64_t n, int64_t first, int64_t count, uint32_t read,
                    uint16_t* to, Extent& extent) {
  const StridedMatrix matrix = StridedMatrix::of(in.key, n * in.key.stride(0));
  const int64_t steps = channel_steps(in);
  pack_panel<kPieces, kB>(matrix, first, count, steps, to, extent, 1.f, read);
  if (!in.squares()) return;
  if (count < kRows) read &= (1u << count) - 1;
  pack_squares<kPieces, kB>(matrix, first, steps, to + steps * kPieces * kTile, extent, read);
}

// All query pixels [first, first + count) of one batch element, in groups of two panels. Packing is the
// caller's to share out: pack(i, extent) for every group.
template <int kPieces, bool kB = true>
struct QueryGroups {
  const ScoreInputs& in;
  int64_t n, first = 0, count = 0, panel;
  bool has_bias;
  Workspace<uint16_t> data;
  Workspace<float> bias;

  QueryGroups(const ScoreInputs& in_, int64_t n_, int64_t capacity)  // in groups
      : in(in_),
        n(n_),
        panel(score_panel(in_, kPieces)),
        has_bias(in_.query_bias.has_value()),
        data(capacity * 2 * panel),
        bias(capacity * kGroup) {}

  void start(int64_t first_, int64_t count_) {
    first = first_;
    count = count_;
  }
  int64_t groups() const { return panels_of(count, kGroup); }
  // Panel j (0 or 1) of group i.
  Piece at(int64_t i, int j) const { return data.data() + (2 * i + j) * panel; }
  const float* bias_of(int64_t i) const { return bias.data() + i * kGroup; }

  void pack(int64_t i, Extent& extent) {
    for (int j = 0; j < 2; ++j)
      pack_query_panel<kPieces, kB>(in, n, first + i * kGroup + j * kRows, data.data() + (2 * i + j) * panel,
                                    extent);
    if (!has_bias) return;
    const OptionalRow<float> row(in.query_bias, n, 0.f);
    for (int64_t p = 0; p < kGroup; ++p) {
      const int64_t query = first + i * kGroup + p;
      bias[i * kGroup + p] = query < in.queries() ? row[query] : 0.f;
    }
  }
};

// What makes the products of a block of memory positions scores in powers of two:
//   score = factor * product + (shrinkage * query_bias + shift).
// Positions after the last, up to a multiple of 32, and excluded ones have factor and shrinkage 0 and shift
// -inf.
struct KeyTerms {
  Workspace<float> factor, shrinkage, shift;

  explicit KeyTerms(int64_t capacity) : factor(capacity), shrinkage(capacity), shift(capacity) {}

  // The score of position m in lanes of queries from their products. query_bias: of these lanes; unused
  // without kQueryBias.
  template <bool kQueryBias>
  [[gnu::always_inline]] Reg score(Reg product, int64_t m, Reg query_bias) const {
    Reg constant = Lanes::set1(shift.data()[m]);
    if constexpr (kQueryBias) constant = Lanes::fma(Lanes::set1(shrinkage.data()[m]), query_bias, constant);
    return Lanes::fma(Lanes::set1(factor.data()[m]), product, constant);
  }
};

// A block of memory positions as key panels, and their terms.
template <int kPieces, bool kB = false>
struct KeyBlock : KeyTerms {
  const ScoreInputs& in;
  int64_t n, begin = 0, count = 0, panel;
  Workspace<uint16_t> data;

  KeyBlock(const ScoreInputs& in_, int64_t n_, int64_t capacity)  // in positions, a multiple of 32
      : KeyTerms(capacity),
        in(in_),
        n(n_),
        panel(score_panel(in_, kPieces)),
        data(capacity / kRows * panel) {}

  // Chooses positions [begin, begin + count); pack(i, extent) must follow for every panel.
  void start(int64_t begin_, int64_t count_) {
    begin = begin_;
    count = count_;
  }
  int64_t padded() const { return panels_of(count, kGroup) * kGroup; }
  int64_t panels() const { return padded() / kRows; }
  Piece at(int64_t panel_) const { return data.data() + panel_ * panel; }

  void pack(int64_t i, Extent& extent) {
    const int64_t first = i * kRows, used = std::clamp<int64_t>(count - first, 0, kRows);
    const OptionalRow<float> factors(in.shrinkage, n, 1.f), biases(in.key_bias, n, 0.f);
    uint32_t read = 0;
    for (int64_t j = 0; j < kRows; ++j) {
      const int64_t m = begin + first + j;
      const bool is_used = j < used && biases[m] != -std::numeric_limits<float>::infinity();
      constexpr float kUnit = static_cast<float>(kLog2E);
      shrinkage[first + j] = is_used ? factors[m] * kUnit : 0.f;
      factor[first + j] = shrinkage[first + j] * static_cast<float>(in.scale);
      shift[first + j] = is_used ? biases[m] * kUnit : -std::numeric_limits<float>::infinity();
      read |= static_cast<uint32_t>(is_used) << j;
    }
    pack_key_panel<kPieces, kB>(in, n, begin + first, used, read, data.data() + i * panel, extent);
  }
};

// The products of key panels k0, k1 with query panels q0, q1, to `to` (2, 32, 16): [query panel][position]
// [query]. Not inlined, so that every caller shares it.
template <int kPieces>
[[gnu::noinline]] void group_products(Piece k0, Piece k1, Piece q0, Piece q1, int64_t steps, float* to) {
  zero_sums();
  multiply_add<kPieces>(k0, k1, q0, q1, steps);
  tile_store<0>(to);
  tile_store<1>(to + 2 * kSums);
  tile_store<2>(to + kSums);
  tile_store<3>(to + 3 * kSums);
}

// Calls pack(i, extent) for every i in [0, count) on the pool, with vector arithmetic as in a Region.
template <class Pack>
void pack_each(int64_t count, Outside& outside, const Pack& pack) {
  parallel_tasks(count, [&] {
    return [&, region = Region()](int64_t i) mutable {
      Extent extent;
      pack(i, extent);
      outside.note(extent);
    };
  });
}

}  // namespace vosops::cpu::amx

#endif
