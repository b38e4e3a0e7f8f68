// Exact searches on the matrix engine: an approximate score of one bfloat16 product with a strict error bound
// leaves few vectors, whose scores are then computed in float32 as the kernels without the engine do.
//
// The score is s(q, k) = q.k - |k|^2 / 2, greatest for the nearest key; S is what gemm.h's multiply() makes
// of it in float32. A shift m of all vectors (the keys' mean, say) changes s by a constant of the query
// alone, so with x = q - m and y = k - m the approximation is A = x'.y' - |y|^2 / 2 where ' rounds to
// bfloat16. With u = 2^-24 and g(n) = n u / (1 - n u), whatever the order of n roundings,
//   |A - S - constant of q| <= |x - x'| |y| + |x'| |y - y'|                    (Cauchy and Schwarz)
//                            + g(C + 4) |y|^2 / 2                              (|y|^2 and the shift)
//                            + g(S + 22) (|x'| |y'| + |y|^2 / 2)               (the tiles)
//                            + g(C) (|q| |k| + |k|^2)                          (S and its |k|^2)
//                            + what is flushed to zero.
// The tiles' chains are of 16 additions, one of even and odd, and one a step of 32 channels, S steps; then
// come the norm's addition and those of the bound. Of each product of lengths in a small term the sum of half
// their squares is taken, so that the bound becomes
//   E(q, k) = q.lost * k.length + q.length * k.lost + q.rest + k.rest,
// and of a panel of 16 keys the greatest of each. Numbers below 2^-126 are read and written as 0: every step
// and channel may lose that much, squares of less than 2^-63 their length too.
//
// So every key of a panel has S + constant <= upper = max A + E, and one has S + constant >= lower =
// max A - E. A list keeps the k-th greatest lower, its bar: a panel whose upper is below holds none of the k
// greatest S. What it notes is compacted when it is full; a list that is full of panels above the bar
// overflows, and its query is for the kernel without the filter. Then nothing that is chosen depends on the
// filter, its blocks or its lists: the result is that kernel's, ties included.
#pragma once

#if defined(VOSOPS_AMX)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/amx.h"
#include "cpu/parallel.h"

namespace vosops::cpu::amx {

constexpr int64_t kMostFiltered = 1 << 16;    // channels for which the bound is derived
constexpr float kMostSquared = 0x1p100f;      // squared length up to which nothing overflows
constexpr float kFlushedSquares = 0x1p-120f;  // what the square of one channel loses at most, with room
constexpr int kNormPieces = 3;                // bfloat16 that hold a float32

// g(n) for n <= 2^20.
constexpr float rounding_bound(int64_t n) {
  return static_cast<float>(n) * 0x1.1p-24f;
}

// What the bound takes of one vector, or of the vectors of a panel.
struct Side {
  float length;  // at least that of the shifted vector and of its rounding
  float lost;    // at least the length of what rounding to bfloat16 and the shift's own rounding take away
  float rest;    // of the small terms
};

// A length that is at least that of a vector whose sum of squares was computed.
inline float length_at_least(float squares, int64_t channels) {
  const float most = squares * (1 + rounding_bound(channels + 8));
  return std::sqrt(most + static_cast<float>(channels) * kFlushedSquares) * (1 + 0x1p-20f);
}

// Length and lost of a vector by what squared_lengths() and round_panel() give. `exact`: it is of bfloat16
// and was not shifted.
inline Side side_of(float squared_length, float squared_loss, int64_t channels, bool exact) {
  const float length = length_at_least(squared_length, channels);
  const float lost = exact ? static_cast<float>(channels) * kFlushedSquares
                           : length_at_least(squared_loss, channels) + 0x1.1p-24f * length;
  return {length + lost, lost, 0};
}

// The rest of a query and of a key of the score q.k - |k|^2 / 2; `squared` is that of the unshifted vector.
inline float rest_of_query(const Side& side, float squared, int64_t channels, int64_t steps) {
  return rounding_bound(steps + 22) * side.length * side.length * 0.52f +
         rounding_bound(channels) * squared * 0.52f;
}
inline float rest_of_key(const Side& side, float squared, int64_t channels, int64_t steps) {
  const float y = side.length * side.length;
  return rounding_bound(channels + 4) * y * 0.52f + rounding_bound(steps + 22) * y * 1.05f +
         rounding_bound(channels) * squared * 1.55f + static_cast<float>(steps + 2) * 0x1p-116f;
}

// E of a panel's keys for 16 queries.
inline Reg error_bound(Reg query_length, Reg query_lost, Reg query_rest, const Side& keys) {
  return query_lost * keys.length + (query_length * keys.lost + (query_rest + keys.rest));
}

// The steps that hold so many channels.
constexpr int64_t steps_for(int64_t channels) {
  return (channels + kStep - 1) / kStep;
}

// Whether the last step has room for a number of each vector in three pieces.
constexpr bool holds_norms(int64_t channels) {
  return steps_for(channels) * kStep - channels >= kNormPieces;
}

// The three bfloat16 whose sum is x, as float32; -inf is the first of them.
inline void split_number(Reg x, Reg* pieces) {
  const Bits infinite = (Bits)x == 0xff800000u;
  for (int i = 0; i < kNormPieces; ++i) {
    pieces[i] = (Reg)rounded(x);
    x = infinite ? Reg{} : x - pieces[i];
  }
}

// Vectors that lie side by side, element by element, (channels, 16), as gemm.h's pack_panel() writes them,
// less `shift` (null: nothing).
struct Columns {
  const float* data;
  int64_t channels;
  const float* shift;

  Reg operator[](int64_t e) const {
    const Reg x = Lanes::load(data + e * kRows);
    return shift == nullptr ? x : x - shift[e];
  }
};

inline Reg squared_lengths(const Columns& columns) {
  Reg sums[4]{};
  for (int64_t e = 0; e < columns.channels; ++e)
    sums[e % 4] = Lanes::fma(columns[e], columns[e], sums[e % 4]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Packs 16 vectors, and behind their channels kNormPieces further elements unless null, as a panel of one
// piece. Returns the squared lengths of what rounding took from the vectors.
template <bool kB>
Reg round_panel(const Columns& columns, const Reg* more, uint16_t* to) {
  Reg loss{};
  const auto element = [&](int64_t e) -> Reg {
    if (e < columns.channels) return columns[e];
    return more != nullptr && e < columns.channels + kNormPieces ? more[e - columns.channels] : Reg{};
  };
  const int64_t steps = steps_for(columns.channels);
  for (int64_t s = 0; s < steps; ++s, to += kTile) {
    alignas(64) Bits rows[kRows];
    for (int i = 0; i < kRows; ++i) {
      const int64_t e = s * kStep + 2 * i;
      const Reg low = element(e), high = element(e + 1);
      rows[i] = round_pairs(low, high);
      const Reg low_loss = low - low_of(rows[i]), high_loss = high - high_of(rows[i]);
      if (e < columns.channels) loss = Lanes::fma(low_loss, low_loss, loss);
      if (e + 1 < columns.channels) loss = Lanes::fma(high_loss, high_loss, loss);
    }
    if constexpr (!kB) transpose_pairs(rows);
    std::memcpy(to, rows, sizeof rows);
  }
  return loss;
}

// The greatest of a tile's rows, lane by lane. `norms` are added to the rows, or null.
[[gnu::always_inline]] inline Reg greatest_row(const float* tile, const float* norms) {
  const auto row = [&](int i) -> Reg {
    const Reg r = Lanes::load(tile + i * kRows);
    return norms == nullptr ? r : r + norms[i];
  };
  Reg a = row(0), b = row(1);
#pragma GCC unroll 8
  for (int i = 2; i < kRows; i += 2) {
    const Reg x = row(i), y = row(i + 1);
    a = a > x ? a : x;
    b = b > y ? b : y;
  }
  return a > b ? a : b;
}

// The bits of a tile's rows that are at least `least` in one lane.
inline uint32_t rows_at_least(const float* tile, const float* norms, int lane, float least) {
#if defined(__AVX512F__)
  const __m512i rows =
      _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
  __m512 scores = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, rows, tile + lane, 4);
  if (norms != nullptr) scores = _mm512_add_ps(scores, _mm512_loadu_ps(norms));
  return _mm512_cmp_ps_mask(scores, _mm512_set1_ps(least), _CMP_GE_OQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kRows; ++i) {
    const float score = tile[i * kRows + lane] + (norms == nullptr ? 0 : norms[i]);
    bits |= static_cast<uint32_t>(score >= least) << i;
  }
  return bits;
#endif
}

// `lists` lists of the panels that may hold one of the k greatest scores.
class NoteLists {
 public:
  struct Note {
    float upper;
    int32_t panel;
    uint32_t rows;  // of the panel, that may
  };
  // Lists longer than this cost more than they save.
  static constexpr int kCapacity = 64;
  static constexpr int64_t kMostNeighbors = 16;
  static constexpr int64_t bytes(int64_t lists, int64_t k) {
    return lists * (kCapacity * static_cast<int64_t>(sizeof(Note)) + (k + 1) * 4 + 4);
  }

  NoteLists(int64_t lists, int64_t k)
      : k_(k), bars_(lists), lowers_(lists * k), counts_(lists), notes_(lists * kCapacity) {}

  void clear(int64_t list) {
    bars_[list] = -std::numeric_limits<float>::infinity();
    std::fill_n(lowers_.data() + list * k_, k_, -std::numeric_limits<float>::infinity());
    counts_[list] = 0;
  }
  // Nothing reaches a closed list.
  void close(int64_t list) {
    bars_[list] = std::numeric_limits<float>::quiet_NaN();
    counts_[list] = 0;
  }

  // A panel whose upper is below its list's bar need not be noted.
  const float* bars() const { return bars_.data(); }

  // Raises the bar by a panel with such a lower.
  void raise(int64_t list, float lower) {
    if (!(lower > bars_[list])) return;
    float* lowers = lowers_.data() + list * k_;  // descending
    int64_t at = k_ - 1;
    for (; at > 0 && lowers[at - 1] < lower; --at) lowers[at] = lowers[at - 1];
    lowers[at] = lower;
    bars_[list] = lowers[k_ - 1];
  }

  // Notes a panel; false if the list overflows.
  bool add(int64_t list, const Note& note) {
    Note* notes = notes_.data() + list * kCapacity;
    if (counts_[list] == kCapacity) {
      counts_[list] = compact(notes, kCapacity, bars_[list]);
      if (counts_[list] == kCapacity) return false;
    }
    notes[counts_[list]++] = note;
    return true;
  }

  // Calls f with every note that may still hold one of the k greatest.
  template <class F>
  void each(int64_t list, const F& f) const {
    const Note* notes = notes_.data() + list * kCapacity;
    for (int i = 0; i < counts_.data()[list]; ++i)
      if (notes[i].upper >= bars()[list]) f(notes[i]);
  }

 private:
  static int compact(Note* notes, int count, float bar) {
    int kept = 0;
    for (int i = 0; i < count; ++i)
      if (notes[i].upper >= bar) notes[kept++] = notes[i];
    return kept;
  }

  int64_t k_;
  Workspace<float> bars_, lowers_;
  Workspace<int32_t> counts_;
  Workspace<Note> notes_;
};

// What a pair of vectors in rows gives, kPairs pairs at a time: each a chain of its own.
constexpr int kPairs = 4;

// sums[i] += q[i].k[i], rounded in the order of gemm.h's multiply().
inline void add_products(const float* const* q, const float* const* k, int64_t channels, float* sums) {
  float s[kPairs];
  for (int i = 0; i < kPairs; ++i) s[i] = sums[i];
  const float *q0 = q[0], *q1 = q[1], *q2 = q[2], *q3 = q[3], *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3];
  for (int64_t e = 0; e < channels; ++e) {
    s[0] = std::fma(q0[e], k0[e], s[0]);
    s[1] = std::fma(q1[e], k1[e], s[1]);
    s[2] = std::fma(q2[e], k2[e], s[2]);
    s[3] = std::fma(q3[e], k3[e], s[3]);
  }
  for (int i = 0; i < kPairs; ++i) sums[i] = s[i];
}

// sums[i] = |q[i] - k[i]|^2, channel after channel.
inline void squared_distances(const float* const* q, const float* const* k, int64_t channels, float* sums) {
  float s[kPairs] = {};
  const float *q0 = q[0], *q1 = q[1], *q2 = q[2], *q3 = q[3], *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3];
  for (int64_t e = 0; e < channels; ++e) {
    const float d0 = q0[e] - k0[e], d1 = q1[e] - k1[e], d2 = q2[e] - k2[e], d3 = q3[e] - k3[e];
    s[0] = std::fma(d0, d0, s[0]);
    s[1] = std::fma(d1, d1, s[1]);
    s[2] = std::fma(d2, d2, s[2]);
    s[3] = std::fma(d3, d3, s[3]);
  }
  for (int i = 0; i < kPairs; ++i) sums[i] = s[i];
}

}  // namespace vosops::cpu::amx

#endif
