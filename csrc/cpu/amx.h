// Intel's matrix engine (AMX): tiles, matrices packed as tiles of bfloat16 pieces, and their products.
//
// A tile has 16 rows of 64 bytes. One instruction adds the products of a tile of 16 x 32 bfloat16 and one of
// 32 x 16 to a tile of 16 x 16 float32. A float32 is the sum of up to three bfloat16 pieces, each the
// rounding of what is left; the products of pieces i and j with i + j < pieces are kept: one product a step
// for one piece, three for two (errors of 2^-17), six for three (all 24 bits).
//
// Panels: 16 vectors (rows of A, columns of B) in steps of 32 of their elements, kTile bfloat16 a tile, the
// pieces of one step side by side:
//   A panel: [step][piece][vector][element]           B panel: [step][piece][element / 2][vector][element %
//   2]
// A B tile is the A tile of the same vectors with its 16 x 16 pairs transposed.
//
// Range: pieces are exact for zero and kLeastExact <= |x| <= kMostExact; Packer says whether it met others.
// The engine flushes denormals, reads and writes them as zero, and rounds to nearest whatever MXCSR says.
//
// With VOSOPS_AMX_TWIN the instructions are plain C++ of the same results, bit for bit (but the payload of
// NaN), so that the sources build, run and are sanitized on any processor.
#pragma once

#if defined(VOSOPS_AMX)

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "common/checks.h"
#include "cpu/gemm.h"
#include "cpu/strided.h"
#include "cpu/vec.h"

namespace vosops::cpu::amx {

using Lanes = Vec<float, 64>;
using Reg = Lanes::Reg;
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));

constexpr int kRows = 16;                  // of a tile, and the float32 in each
constexpr int kStep = 32;                  // bfloat16 in a row of a tile
constexpr int kTile = kRows * kStep;       // bfloat16 of a tile
constexpr int kSums = kRows * kRows;       // float32 of a tile
constexpr float kLeastExact = 0x1p-102f;   // three pieces of less would be denormals
constexpr float kMostExact = 0x1.fep127f;  // more would round to infinity

// ---- Permission

// Whether this process may use tiles. The first call asks the system, for all threads and for good, and
// counts as the process's first use: later signal stacks must hold the tiles.
bool ready();

// Why ready() is or would be false, "" where it is true.
const char* refusal();

// How often something happened, for tests: listed by torch.ops.vosops.amx_counts() as "name=count ...".
class Counter {
 public:
  explicit Counter(const char* name);
  void operator++() { count_.fetch_add(1, std::memory_order_relaxed); }

 private:
  friend class Counters;
  const char* name_;
  std::atomic<int64_t> count_{0};
  Counter* next_;
};
std::string counts();

// What torch.set_float32_matmul_precision says now: "highest", "high" or "medium". Traced programs give
// "default" for it as their precision.
std::string_view float32_precision();

// The pieces of a float32 at a precision: of vectors that are compared (scores), and of values.
struct Pieces {
  int scores, values;
};
inline Pieces pieces_of(std::string_view precision) {
  if (precision == "default") precision = float32_precision();
  if (precision == "highest" || precision == "ieee") return {3, 3};
  if (precision == "high" || precision == "tf32x3" || precision == "tf32") return {3, 2};
  STD_TORCH_CHECK(precision == "medium", "precision must be 'highest', 'high' or 'medium'");
  return {1, 1};
}

// The pieces that hold all of a dtype's numbers: 1 for bfloat16, 2 for float16, and `of_float` for float32.
inline int pieces_for(ScalarType dtype, int of_float) {
  return dtype == ScalarType::BFloat16 ? 1 : dtype == ScalarType::Half ? 2 : of_float;
}

// ---- Tiles

#if defined(VOSOPS_AMX_TWIN)

struct TwinTiles {
  alignas(64) unsigned char bytes[8][1024];
  bool configured = false;
  // Of a tile. The instructions, too, end the process where no Region lives.
  unsigned char* operator[](int tile) {
    if (!configured) __builtin_trap();
    return bytes[tile];
  }
};
inline thread_local TwinTiles twin_tiles;

inline Reg flushed(Reg x) {
  constexpr float kLeastNormal = 0x1p-126f;
  const Bits sign = (Bits)x & 0x80000000u;
  const Reg size = (Reg)((Bits)x & 0x7fffffffu);
  return size < kLeastNormal ? (Reg)sign : x;
}

// a * b + c, rounded once.
inline Reg fused(Reg a, Reg b, Reg c) {
#if defined(__AVX512F__)
  return (Reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  for (int i = 0; i < 16; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

template <int t>
inline void tile_zero() {
  std::memset(twin_tiles[t], 0, 1024);
}
template <int t>
inline void tile_load(const void* from) {
  std::memcpy(twin_tiles[t], from, 1024);
}
template <int t>
inline void tile_store(void* to) {
  std::memcpy(to, twin_tiles[t], 1024);
}
template <int t>
inline void tile_load_rows(const void* from, int64_t stride) {
  for (int i = 0; i < kRows; ++i)
    std::memcpy(twin_tiles[t] + i * 64, static_cast<const char*>(from) + i * stride, 64);
}
template <int t>
inline void tile_store_rows(void* to, int64_t stride) {
  for (int i = 0; i < kRows; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, twin_tiles[t] + i * 64, 64);
}
// Even and odd elements in two chains of fused multiply-adds from zero, then their sum, then the sum with the
// tile; every step flushes its result, and by MXCSR what only rounding to fewer bits would lift to 2^-126.
template <int c, int a, int b>
[[gnu::noinline]] void tile_dot() {
  const auto widened = [](Bits pairs, bool high) {
    return flushed((Reg)(high ? pairs & 0xffff0000u : pairs << 16));
  };
  for (int m = 0; m < kRows; ++m) {
    Reg even{}, odd{};
    for (int k = 0; k < kRows; ++k) {
      uint32_t pair;
      std::memcpy(&pair, twin_tiles[a] + m * 64 + k * 4, 4);
      Bits columns;
      std::memcpy(&columns, twin_tiles[b] + k * 64, 64);
      const Bits row = pair - Bits{};
      even = flushed(fused(widened(row, false), widened(columns, false), even));
      odd = flushed(fused(widened(row, true), widened(columns, true), odd));
    }
    Reg sum;
    std::memcpy(&sum, twin_tiles[c] + m * 64, 64);
    sum = flushed(flushed(sum) + flushed(even + odd));
    std::memcpy(twin_tiles[c] + m * 64, &sum, 64);
  }
}

#else

struct TileBytes {
  char bytes[1024];
};
// Tile numbers are literals of the instruction. The operands tell the compiler which bytes are read and
// written.
template <int t>
[[gnu::always_inline]] inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
[[gnu::always_inline]] inline void tile_load(const void* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{64}), "i"(t),
               "m"(*static_cast<const TileBytes*>(from)));
}
template <int t>
[[gnu::always_inline]] inline void tile_store(void* to) {
  asm volatile("tilestored %%tmm%c3, (%1,%2,1)"
               : "=m"(*static_cast<TileBytes*>(to))
               : "r"(to), "r"(int64_t{64}), "i"(t));
}
// From and to rows of 64 bytes that lie `stride` bytes apart.
template <int t>
[[gnu::always_inline]] inline void tile_load_rows(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
}
template <int t>
[[gnu::always_inline]] inline void tile_store_rows(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
}
template <int c, int a, int b>
[[gnu::always_inline]] inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#endif

// While it lives, the thread's eight tiles have 16 rows of 64 bytes and its vector arithmetic flushes
// denormals (pieces that are denormal cost an assist each); then both are as before, tiles released. PyTorch
// must not be called meanwhile. It is neither copied nor moved: a worker of parallel_tasks() may hold one.
class Region {
 public:
  Region();
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  uint32_t control() const { return control_; }

 private:
  uint32_t control_;  // MXCSR as it was
};

// Tiles 0 to 3 are the sums [0 1; 2 3] of two A panels (tiles 4, 5) and two B panels (tiles 6, 7).
[[gnu::always_inline]] inline void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
// Sums 0 to 3 from and to places `stride` float32 apart.
[[gnu::always_inline]] inline void load_sums(const float* from, int64_t stride = kSums) {
  tile_load<0>(from);
  tile_load<1>(from + stride);
  tile_load<2>(from + 2 * stride);
  tile_load<3>(from + 3 * stride);
}
[[gnu::always_inline]] inline void store_sums(float* to, int64_t stride = kSums) {
  tile_store<0>(to);
  tile_store<1>(to + stride);
  tile_store<2>(to + 2 * stride);
  tile_store<3>(to + 3 * stride);
}

// Adds sums 0 to 3 to those at `to`. Where there are many terms, the rounding errors of sums that are made in
// blocks and then added grow with the square root of the blocks, not of the terms.
inline void add_sums(float* to) {
  alignas(64) float block[4 * kSums];
  store_sums(block);
  for (int64_t i = 0; i < 4 * kSums; i += kRows)
    Lanes::store(to + i, Lanes::load(to + i) + Lanes::load(block + i));
}
// Around the products of one block: its share of the sums at `at`, of which the first block makes the first.
// Those of several pieces, kExact, are added afterwards; those of bfloat16 go on in the tiles.
template <bool kExact>
[[gnu::always_inline]] inline void begin_sums(bool first, const float* at) {
  if (kExact || first) {
    zero_sums();
  } else {
    load_sums(at);
  }
}
template <bool kExact>
[[gnu::always_inline]] inline void end_sums(bool first, float* at) {
  if (!kExact || first) {
    store_sums(at);
  } else {
    add_sums(at);
  }
}

using Piece = const uint16_t*;

[[gnu::always_inline]] inline void load_a(Piece a0, Piece a1, int piece) {
  tile_load<4>(a0 + piece * kTile);
  tile_load<5>(a1 + piece * kTile);
}
[[gnu::always_inline]] inline void load_b(Piece b0, Piece b1, int piece) {
  tile_load<6>(b0 + piece * kTile);
  tile_load<7>(b1 + piece * kTile);
}
[[gnu::always_inline]] inline void dot_sums() {
  tile_dot<0, 4, 6>();
  tile_dot<1, 4, 7>();
  tile_dot<2, 5, 6>();
  tile_dot<3, 5, 7>();
}

// Sums += [a0; a1] [b0 b1] over `steps` steps of panels of kPieces pieces; small products of a step first.
// Tile loads a product: 1, 2/3, 7/12 for 1, 2, 3 pieces.
template <int kPieces>
[[gnu::always_inline]] inline void multiply_add(Piece a0, Piece a1, Piece b0, Piece b1, int64_t steps) {
  constexpr int64_t kNext = kPieces * kTile;
  for (int64_t s = 0; s < steps; ++s, a0 += kNext, a1 += kNext, b0 += kNext, b1 += kNext) {
    if constexpr (kPieces == 1) {
      tile_load<6>(b0);
      tile_load<4>(a0);
      tile_dot<0, 4, 6>();
      tile_load<7>(b1);
      tile_dot<1, 4, 7>();
      tile_load<5>(a1);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    } else if constexpr (kPieces == 2) {
      load_a(a0, a1, 0);
      load_b(b0, b1, 1);
      dot_sums();
      load_b(b0, b1, 0);
      dot_sums();
      load_a(a0, a1, 1);
      dot_sums();
    } else {
      load_a(a0, a1, 0);
      load_b(b0, b1, 2);
      dot_sums();
      load_b(b0, b1, 1);
      dot_sums();
      load_a(a0, a1, 1);
      dot_sums();
      load_b(b0, b1, 0);
      dot_sums();
      load_a(a0, a1, 0);
      dot_sums();
      load_a(a0, a1, 2);
      dot_sums();
    }
  }
}

// Sums = [a0; a1] [b0 b1] with the small products of all steps first, so that they are not rounded at the
// size of the sum: for products that cancel a large constant.
template <int kPieces>
[[gnu::always_inline]] inline void multiply_small_first(Piece a0, Piece a1, Piece b0, Piece b1,
                                                        int64_t steps) {
  constexpr int64_t kNext = kPieces * kTile;
  zero_sums();
  if constexpr (kPieces == 1) return multiply_add<1>(a0, a1, b0, b1, steps);
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t at = s * kNext;
    if constexpr (kPieces == 2) {
      load_a(a0 + at, a1 + at, 0);
      load_b(b0 + at, b1 + at, 1);
      dot_sums();
      load_a(a0 + at, a1 + at, 1);
      load_b(b0 + at, b1 + at, 0);
      dot_sums();
    } else {
      load_a(a0 + at, a1 + at, 0);
      load_b(b0 + at, b1 + at, 2);
      dot_sums();
      load_b(b0 + at, b1 + at, 1);
      dot_sums();
      load_a(a0 + at, a1 + at, 1);
      dot_sums();
      load_b(b0 + at, b1 + at, 0);
      dot_sums();
      load_a(a0 + at, a1 + at, 2);
      dot_sums();
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t at = s * kNext;
    load_a(a0 + at, a1 + at, 0);
    load_b(b0 + at, b1 + at, 0);
    dot_sums();
  }
}

// ---- Pieces

inline Reg load_bits(const void* p) {
  Reg r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

// float32 rounded to bfloat16 in the upper halves of the lanes, as the processor's conversion does: to
// nearest even, denormals to zero, NaN quiet. The lower halves are zero.
inline Bits rounded(Reg x) {
  const Bits bits = (Bits)x, size = bits & 0x7fffffffu;
  const Bits near = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  const Bits quiet = (bits | 0x00400000u) & 0xffff0000u;
  return size > 0x7f800000u ? quiet : size < 0x00800000u ? bits & 0x80000000u : near;
}

// The roundings of two registers, side by side in each lane: low's in the lower half.
inline Bits round_pairs(Reg low, Reg high) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (Bits)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
#else
  return (rounded(low) >> 16) | rounded(high);
#endif
}
// The roundings of low's 16 numbers, then of high's.
inline Bits round_in_order(Reg low, Reg high) {
#if defined(__AVX512BF16__)
  return (Bits)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  const Halves a = (Halves)rounded(low), b = (Halves)rounded(high);
  return (Bits)__builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33,
                                       35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
#endif
}
// Writes those of 16 numbers whose bit is set.
template <class S>
[[gnu::always_inline]] inline void store_some(S* to, Reg value, uint32_t which) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
  const __mmask16 mask = static_cast<__mmask16>(which);
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(to, mask, (__m512)value);
  } else if constexpr (std::is_same_v<S, Half>) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_maskz_cvtps_ph(mask, (__m512)value, _MM_FROUND_TO_NEAREST_INT));
  } else {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh((__m512)value));
  }
#else
  for (int i = 0; i < kRows; ++i) {
    if (!(which >> i & 1)) continue;
    if constexpr (std::is_same_v<S, BFloat16>) {
      to[i].x = static_cast<uint16_t>(rounded(value)[i] >> 16);
    } else {
      to[i] = static_cast<S>(value[i]);
    }
  }
#endif
}

// Writes the first `count` of 16 numbers.
template <class S>
[[gnu::always_inline]] inline void store_first(S* to, Reg value, int64_t count) {
  store_some(to, value, count >= kRows ? 0xffffu : (1u << count) - 1);
}

// The halves of round_pairs() as float32.
inline Reg low_of(Bits pairs) {
  return (Reg)(pairs << 16);
}
inline Reg high_of(Bits pairs) {
  return (Reg)(pairs & 0xffff0000u);
}

// kPieces registers of pairs from two registers of float32.
template <int kPieces>
[[gnu::always_inline]] inline void split_pairs(Reg low, Reg high, Bits* pieces) {
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i) {
    pieces[i] = round_pairs(low, high);
    if (i + 1 < kPieces) {
      low -= low_of(pieces[i]);
      high -= high_of(pieces[i]);
    }
  }
}

inline void transpose_pairs(Bits rows[16]) {
  Reg lanes[16];
  std::memcpy(lanes, rows, sizeof lanes);
  transpose_lanes<Lanes>(reinterpret_cast<const float*>(lanes), 16, reinterpret_cast<float*>(rows), 16);
}

// The sizes of the numbers that were split, and whether three (or two) pieces hold them.
struct Extent {
  Bits most{}, least = ~Bits{};  // of the bits of |x|, and of those less one: zero is last

  void see(Reg x) {
    const Bits size = (Bits)x & 0x7fffffffu, before = size - 1;
    most = size > most ? size : most;
    least = before < least ? before : least;
  }
  bool outside() const {
    bool found = false;
    for (int i = 0; i < 16; ++i) {
      found |= most[i] > std::bit_cast<uint32_t>(kMostExact);
      found |= least[i] < std::bit_cast<uint32_t>(kLeastExact) - 1;
    }
    return found;
  }
};

// Whether any worker met a number that its pieces do not hold.
class Outside {
 public:
  void note(const Extent& extent) { note(extent.outside()); }
  void note(bool outside) {
    if (outside) found_.store(true, std::memory_order_relaxed);
  }
  bool found() const { return found_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> found_{false};
};

// 16 numbers of which those whose bit is set are read, the others are 0.
template <class S>
[[gnu::always_inline]] inline Reg load_some(const S* from, uint32_t which) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 mask = static_cast<__mmask16>(which);
  if constexpr (std::is_same_v<S, float>) {
    return (Reg)_mm512_maskz_loadu_ps(mask, from);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, from);
    if constexpr (std::is_same_v<S, Half>) return (Reg)_mm512_maskz_cvtph_ps(0xffff, halves);
    return (Reg)((Bits)_mm512_maskz_cvtepu16_epi32(0xffff, halves) << 16);
  }
#else
  Reg r{};
  for (int i = 0; i < 16; ++i) {
    if (which >> i & 1) r[i] = widen(from[i]);
  }
  return r;
#endif
}

// Packs one tile of pieces of 16 vectors and 32 of their elements: entry (vector, element) is
// factor * from[vector * stride + element] (kAdjacentElements) or factor * from[element * stride + vector].
// Only the vectors and elements whose bits are set are read, the others are 0. The pieces' tiles lie side by
// side. `factor` is a power of two.
template <int kPieces, bool kAdjacentElements, bool kB, class S>
void pack_tile(const S* from, int64_t stride, uint32_t vectors, uint32_t elements, float factor, uint16_t* to,
               Extent& extent) {
  alignas(64) Bits rows[kPieces][16];
  for (int i = 0; i < 16; ++i) {
    Reg low, high;
    if constexpr (kAdjacentElements) {
      const S* row = from + i * stride;
      const uint32_t which = vectors >> i & 1 ? elements : 0;
      low = load_some(row, which & 0xffffu), high = load_some(row + 16, which >> 16);
    } else {
      const S* row = from + 2 * i * stride;
      low = load_some(row, elements >> (2 * i) & 1 ? vectors : 0);
      high = load_some(row + stride, elements >> (2 * i + 1) & 1 ? vectors : 0);
    }
    if constexpr (kPieces > 1) extent.see(low), extent.see(high);
    if (factor != 1.f) {  // a product in a Region is 0 where the number was denormal
      low *= factor, high *= factor;
      if constexpr (kPieces > 1) extent.see(low), extent.see(high);
    }
#pragma GCC unroll 3
    for (int n = 0; n < kPieces; ++n) {
      const Bits pairs = kAdjacentElements ? round_in_order(low, high) : round_pairs(low, high);
      rows[n][i] = pairs;
      if (n + 1 == kPieces) break;
      if constexpr (kAdjacentElements) {
        Halves halves;
        std::memcpy(&halves, &pairs, sizeof halves);
        typedef uint16_t Half16 __attribute__((vector_size(32)));
        const Half16 first =
            __builtin_shufflevector(halves, halves, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const Half16 second = __builtin_shufflevector(halves, halves, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
                                                      26, 27, 28, 29, 30, 31);
        low -= (Reg)(__builtin_convertvector(first, Bits) << 16);
        high -= (Reg)(__builtin_convertvector(second, Bits) << 16);
      } else {
        low -= low_of(pairs), high -= high_of(pairs);
      }
    }
  }
#pragma GCC unroll 3
  for (int n = 0; n < kPieces; ++n) {
    if constexpr (kB == kAdjacentElements) transpose_pairs(rows[n]);
    std::memcpy(to + n * kTile, rows[n], sizeof rows[n]);
  }
}

// Packs vectors [first, first + count) of a matrix, count <= 16, as a panel of `steps` steps in kPieces
// pieces; what lies past the matrix's elements is 0. Vectors are the matrix's pixels and elements its
// channels. keep(element) == false reads that element of every vector as 0, whatever lies there; `vectors`
// does so for vectors by bits.
template <int kPieces, bool kB>
void pack_panel(const StridedMatrix& matrix, int64_t first, int64_t count, int64_t steps, uint16_t* to,
                Extent& extent, float factor = 1.f, uint32_t vectors = 0xffffu, const bool* keep = nullptr) {
  vectors &= count >= kRows ? 0xffffu : (1u << count) - 1;
  dispatch_floating(matrix.dtype, [&]<class S>(S) {
    if constexpr (!std::is_same_v<S, double>) {
      const S* base = static_cast<const S*>(matrix.data) + first * matrix.pixel_stride;
      for (int64_t s = 0; s < steps; ++s, to += kPieces * kTile) {
        const int64_t e = s * kStep, left = matrix.channels - e;
        uint32_t elements = left >= kStep ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
        if (keep != nullptr) {
          for (int64_t i = 0; i < std::min<int64_t>(left, kStep); ++i)
            if (!keep[e + i]) elements &= ~(1u << i);
        }
        const S* from = base + e * matrix.channel_stride;
        if (matrix.channel_stride == 1) {
          pack_tile<kPieces, true, kB>(from, matrix.pixel_stride, vectors, elements, factor, to, extent);
        } else if (matrix.pixel_stride == 1) {
          pack_tile<kPieces, false, kB>(from, matrix.channel_stride, vectors, elements, factor, to, extent);
        } else {
          S copy[kStep][kRows];
          for (int i = 0; i < kStep; ++i) {
            for (int j = 0; j < kRows; ++j) {
              const bool read = elements >> i & 1 && vectors >> j & 1;
              copy[i][j] = read ? from[i * matrix.channel_stride + j * matrix.pixel_stride] : S(0.f);
            }
          }
          pack_tile<kPieces, false, kB>(&copy[0][0], kRows, vectors, elements, factor, to, extent);
        }
      }
    } else {
      STD_TORCH_CHECK(false, "float64 is not for AMX");
    }
  });
}

// ---- Weights

// 2^x for x <= 0 or a little more; below 2^-100 it is 0, so that no piece is denormal. Relative error 1 ulp
// with kDegree 6, 1e-4 with 3, for weights that are rounded to bfloat16. NaN stays NaN.
template <int kDegree>
[[gnu::always_inline]] inline Reg exp2_weight(Reg x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: the integer part stays in the low bits of the sum
  const Reg sum = x + kRound, fraction = x - (sum - kRound);
  Reg power;
  if constexpr (kDegree == 3) {
    power = Lanes::set1(0.05588034f);
    for (float c : {0.24261677f, 0.69310677f, 0.99992520f})
      power = Lanes::fma(power, fraction, Lanes::set1(c));
  } else {
    static_assert(kDegree == 6);
    power = Lanes::set1(1.535336188319500e-4f);
    for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                    2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f})
      power = Lanes::fma(power, fraction, Lanes::set1(c));
  }
#if defined(__AVX512F__)
  const __mmask16 live = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-100.f), _CMP_NLT_UQ);
  return (Reg)_mm512_maskz_scalef_ps(live, (__m512)power, (__m512)(sum - kRound));
#else
  const Reg scaled = (Reg)((Bits)power + ((Bits)sum << 23));
  return x < -100.f ? Reg{} : x == x ? scaled : power;
#endif
}

}  // namespace vosops::cpu::amx

#endif
