// Local matching on the CPU, by direct correlation.
//
// A task owns a tile of up to kTileRows query rows (dilation apart) x one register of query columns. For
// every key row in reach it computes the dot products of the tile with D neighbouring displacements at a
// time: rows x D accumulators stay in registers over all channels, one unaligned key load serves every row of
// the tile. The score |k|^2 - 2 q.k goes into a running minimum per object and ring (the pixels between two
// nested radii) that lives in the first-level cache; the distance of the winner is computed again from q - k.
// Work that nobody needs is left out: key rows and displacements under which no object has a pixel, tiles
// without a wanted query, rows of a tile that a key row does not reach. Bytes: the key is repacked once
// (padded rows, C x W each), the query tile by tile; no distance is ever stored. Floor: 2 C operations per
// query pixel and in-image displacement at the FMA rate; the lanes waste at most half a register of columns
// at the right border.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/element.h"
#include "cpu/local_matching_amx.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"

namespace vosops::cpu {
namespace {

// ---- The register tile: rows x displacements dot products of one register of query columns.

constexpr int kTileRows = kRegisters == 32 ? 4 : 3;

// As many displacements as leave registers for the query rows and one key load.
constexpr int max_displacements(int rows) {
  const int free = kRegisters - rows - 1;
  return std::min(free / rows, 12);
}

// Where the scores of one register tile go: the running minima of the objects that have a pixel under it.
template <class V>
struct Minima {
  struct Object {
    int64_t slot;                                      // of the object's first ring
    std::array<uint32_t, max_displacements(1)> lanes;  // by displacement: which key pixels are the object's
  };
  typename V::T* best;          // (objects, rings, kTileRows, lanes), of the first row of the tile
  typename V::Code* code;       // alike: the displacement of the best, -1 for none
  typename V::Code first_code;  // of displacement 0; the others follow
  const Object* objects;
  int64_t object_count;
  const int64_t* ring;  // (rows, displacements): slot of the ring that a score belongs to
};

// Takes the scores norm[d * dilation] - 2 * sum over elements of query[e][r] * key[e][d * dilation] into the
// running minima.
template <class E, int R, int D>
[[gnu::noinline]] void correlate(const typename E::Lanes::T* query, const typename E::Lanes::T* key,
                                 const typename E::Lanes::T* norm, int64_t key_stride, int64_t dilation,
                                 int64_t elements, const Minima<typename E::Lanes>& minima) {
  using V = typename E::Lanes;
  typename V::Reg sum[D][R] = {};
  for (int64_t e = 0; e < elements; ++e) {
    typename V::Reg q[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) q[r] = V::load(query + r * V::kLanes);
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d) {
      typename V::Reg k = V::load(key + d * dilation);
      V::pin(k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[d][r] = E::dot(q[r], k, sum[d][r]);
    }
    query += kTileRows * V::kLanes;
    key += key_stride;
  }
#pragma GCC unroll 16
  for (int d = 0; d < D; ++d) {
    const typename V::Reg k2 = V::load(norm + d * dilation);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[d][r] = V::fma(sum[d][r], V::set1(-2), k2);
  }
  for (int64_t o = 0; o < minima.object_count; ++o) {
    const auto& object = minima.objects[o];
    typename V::T* const best_of = minima.best + object.slot;
    typename V::Code* const code_of = minima.code + object.slot;
    int64_t at[R];
    typename V::Reg best[R];
    typename V::CodeReg code[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      at[r] = minima.ring[r * D] + r * V::kLanes;
      best[r] = V::load(best_of + at[r]);
      code[r] = V::load_code(code_of + at[r]);
    }
    typename V::CodeReg candidate = minima.first_code - typename V::CodeReg{};
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d, candidate += 1) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if (d > 0 && minima.ring[r * D + d] != minima.ring[r * D + d - 1]) {
          V::store(best_of + at[r], best[r]);
          V::store_code(code_of + at[r], code[r]);
          at[r] = minima.ring[r * D + d] + r * V::kLanes;
          best[r] = V::load(best_of + at[r]);
          code[r] = V::load_code(code_of + at[r]);
        }
        V::take_less(best[r], code[r], sum[d][r], object.lanes[d], candidate);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V::store(best_of + at[r], best[r]);
      V::store_code(code_of + at[r], code[r]);
    }
  }
}

template <class E>
using CorrelateFn = decltype(&correlate<E, 1, 1>);

// The table of correlate<E, R, D> for one R, by D.
template <class E, int R, int... D>
constexpr std::array<CorrelateFn<E>, sizeof...(D)> correlate_row(std::integer_sequence<int, D...>) {
  return {&correlate<E, R, D + 1>...};
}

template <class E>
CorrelateFn<E> correlate_for(int rows, int displacements) {
  static constexpr auto one = correlate_row<E, 1>(std::make_integer_sequence<int, max_displacements(1)>{});
  static constexpr auto two = correlate_row<E, 2>(std::make_integer_sequence<int, max_displacements(2)>{});
  static constexpr auto three = correlate_row<E, 3>(std::make_integer_sequence<int, max_displacements(3)>{});
  static constexpr auto four = correlate_row<E, 4>(std::make_integer_sequence<int, max_displacements(4)>{});
  const int d = displacements - 1;
  return rows == 1 ? one[d] : rows == 2 ? two[d] : rows == 3 ? three[d] : four[d];
}

// ---- The problem of one batch element.

struct Window {
  int64_t dilation;
  int64_t steps_y, steps_x;  // displacements run over [-steps, steps] * dilation
  int64_t reach;             // steps_x * dilation: the padding left of each packed key row
  std::vector<int> ring;     // ring of a displacement of s steps, by s
  int rings;

  Window(const std::vector<int64_t>& radius, int64_t dilation_, int64_t height, int64_t width)
      : dilation(dilation_), rings(static_cast<int>(radius.size())) {
    const int64_t steps = radius.back() / dilation;
    steps_y = std::min(steps, (height - 1) / dilation);
    steps_x = std::min(steps, (width - 1) / dilation);
    reach = steps_x * dilation;
    for (int64_t s = 0; s <= std::max(steps_y, steps_x); ++s) {
      ring.push_back(
          static_cast<int>(std::lower_bound(radius.begin(), radius.end(), s * dilation) - radius.begin()));
    }
  }
  int64_t steps_across() const { return 2 * steps_x + 1; }
};

// The masks of a frame as bits in the padded coordinates of the packed key rows.
class MaskBits {
 public:
  MaskBits(const Tensor& mask, int64_t n, int64_t left, int64_t padded_width)
      : objects_(mask.size(1)), height_(mask.size(2)), words_(padded_width / 64 + 2) {
    const int64_t width = mask.size(3);
    bits_.assign(static_cast<size_t>((objects_ + 1) * height_ * words_), 0);
    const bool* base = mask.const_data_ptr<bool>() + n * mask.stride(0);
    const int64_t stride_o = mask.stride(1), stride_y = mask.stride(2), stride_x = mask.stride(3);
    for (int64_t o = 0; o < objects_; ++o) {
      for (int64_t y = 0; y < height_; ++y) {
        const bool* row = base + o * stride_o + y * stride_y;
        uint64_t* object_row = &bits_[row_of(o, y)];
        uint64_t* any_row = &bits_[row_of(objects_, y)];
        for (int64_t x = 0; x < width; ++x) {
          const uint64_t bit = row[x * stride_x] ? 1 : 0;
          object_row[(x + left) >> 6] |= bit << ((x + left) & 63);
        }
        for (int64_t w = 0; w < words_; ++w) any_row[w] |= object_row[w];
      }
    }
  }

  // 64 bits of object `o` in row `y` from padded column `x`.
  uint64_t word(int64_t o, int64_t y, int64_t x) const { return word_at(&bits_[row_of(o, y)], x); }

  // The first and last column in [begin, end) of row y that any object needs; false where there is none.
  bool needed(int64_t y, int64_t begin, int64_t end, int64_t& first, int64_t& last) const {
    const uint64_t* row = &bits_[row_of(objects_, y)];
    first = -1;
    for (int64_t x = begin; x < end; x += 64) {
      uint64_t word = word_at(row, x);
      if (end - x < 64) word &= (uint64_t{1} << (end - x)) - 1;
      if (word == 0) continue;
      if (first < 0) first = x + __builtin_ctzll(word);
      last = x + 63 - __builtin_clzll(word);
    }
    return first >= 0;
  }

 private:
  size_t row_of(int64_t o, int64_t y) const { return static_cast<size_t>((o * height_ + y) * words_); }
  static uint64_t word_at(const uint64_t* row, int64_t x) {
    const int64_t shift = x & 63;
    const uint64_t low = row[x >> 6] >> shift;
    return shift == 0 ? low : low | (row[(x >> 6) + 1] << (64 - shift));
  }

  int64_t objects_, height_, words_;
  std::vector<uint64_t> bits_;
};

// One frame with padded rows: element e of pixel (y, x) lies at ((y * elements + e) * stride + reach + x).
template <class T>
struct PackedKey {
  int64_t elements, stride;
  Workspace<T> data;
  Workspace<T> norm;  // |k|^2, (height, stride)

  PackedKey(int64_t height, int64_t elements_, int64_t stride_)
      : elements(elements_), stride(stride_), data(height * elements_ * stride_), norm(height * stride_) {}
};

// Writes `count` packed elements of channel group `element` to `out`, adds their squares to `norm`.
template <class E, class S>
void pack_columns(const S* pixel, int64_t channel_stride, int64_t column_stride, int64_t channels,
                  int64_t element, int64_t count, typename E::Lanes::T* out, typename E::Lanes::T* norm) {
  // Channels lie far apart: the hardware does not see the next one coming.
  constexpr int64_t kAhead = 6;
  const int64_t ahead = E::kChannels * (element + kAhead);
  if (column_stride == 1 && ahead < channels) {
    for (int64_t x = 0; x < count; x += 64 / sizeof(S))
      __builtin_prefetch(pixel + ahead * channel_stride + x);
  }
  pack_element<E>(
      pixel, [=](int64_t x) { return x * column_stride; }, channel_stride, channels, element, count, out,
      norm);
}

template <class E, class S>
void pack_key(const Tensor& key, int64_t n, int64_t reach, PackedKey<typename E::Lanes::T>& packed) {
  using T = typename E::Lanes::T;
  const int64_t channels = key.size(1), height = key.size(2), width = key.size(3);
  const int64_t stride_c = key.stride(1), stride_y = key.stride(2), stride_x = key.stride(3);
  const S* base = key.const_data_ptr<S>() + n * key.stride(0);
  torch::stable::parallel_for(0, height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      T* norm = packed.norm.data() + y * packed.stride;
      std::fill_n(norm, packed.stride, T{0});
      for (int64_t e = 0; e < packed.elements; ++e) {
        T* row = packed.data.data() + (y * packed.elements + e) * packed.stride;
        std::fill_n(row, reach, T{0});
        std::fill_n(row + reach + width, packed.stride - reach - width, T{0});
        pack_columns<E>(base + y * stride_y, stride_c, stride_x, channels, e, width, row + reach,
                        norm + reach);
      }
    }
  });
}

// Everything that the tiles of one batch element read and write.
template <class T>
struct Problem {
  const Tensor& query;
  const bool* query_mask;  // of element n; null where every query is wanted
  int64_t query_mask_stride_y, query_mask_stride_x;
  int64_t n;
  const Window& window;
  const MaskBits& masks;
  PackedKey<T>& key;
  int64_t objects;
  T* distance;     // (objects, rings, height, width) of element n
  int64_t* index;  // alike
};

// One tile of queries: its running minima, and the walk over its window.
template <class E, class S>
class Tile {
  using V = typename E::Lanes;
  using T = typename V::T;
  using Code = typename V::Code;
  static constexpr int kLanes = V::kLanes;
  static constexpr T kAbsent = std::numeric_limits<T>::infinity();

 public:
  explicit Tile(const Problem<T>& problem)
      : p_(problem),
        height_(problem.query.size(2)),
        width_(problem.query.size(3)),
        slots_(problem.objects * problem.window.rings),
        best_(slots_ * kTileRows * kLanes),
        code_(slots_ * kTileRows * kLanes),
        present_(problem.objects + 1) {}

  // Starts on query rows y0 + r * dilation for r < rows and columns x0 .. x0 + kLanes (those inside the
  // image), packed as query (elements, kTileRows, kLanes); norm: |q|^2 of row r at norm + r * norm_stride.
  void begin(int64_t y0, int rows, int64_t x0, const T* query, const T* norm, int64_t norm_stride) {
    y0_ = y0;
    rows_ = rows;
    x0_ = x0;
    columns_ = std::min<int64_t>(kLanes, width_ - x0);
    query_ = query;
    norm_ = norm;
    norm_stride_ = norm_stride;
    any_wanted_ = any_wanted();
    std::fill_n(best_.data(), slots_ * kTileRows * kLanes, kAbsent);
    std::fill_n(code_.data(), slots_ * kTileRows * kLanes, Code{-1});
  }

  // Matches with the key row that lies j steps below row 0 of the tile.
  void match(int64_t j) {
    if (!any_wanted_) return;
    const int64_t key_y = y0_ + j * p_.window.dilation;
    const int first = static_cast<int>(std::max<int64_t>(0, j - p_.window.steps_y));
    const int last = static_cast<int>(std::min<int64_t>(rows_ - 1, j + p_.window.steps_y));
    match_row(key_y, j, first, last - first + 1);
  }

  void finish() {
    if (any_wanted_) {
      write_matches();
    } else {
      write_absent();
    }
  }

 private:
  bool wanted(int r, int64_t lane) const {
    return p_.query_mask == nullptr || p_.query_mask[(y0_ + r * p_.window.dilation) * p_.query_mask_stride_y +
                                                     (x0_ + lane) * p_.query_mask_stride_x];
  }

  bool any_wanted() const {
    for (int r = 0; r < rows_; ++r)
      for (int64_t lane = 0; lane < columns_; ++lane)
        if (wanted(r, lane)) return true;
    return false;
  }

  // Matches rows [first, first + rows) of the tile with key row key_y, which lies j steps below row 0.
  void match_row(int64_t key_y, int64_t j, int first, int rows) {
    const Window& w = p_.window;
    int64_t left, right;
    if (!p_.masks.needed(key_y, x0_, x0_ + kLanes + 2 * w.reach, left, right)) return;
    // Only the displacements whose register of key columns [x0 + s * dilation, + kLanes) meets [left, right].
    const int64_t begin = std::max<int64_t>(0, (left - kLanes + 1 - x0_ + w.dilation - 1) / w.dilation);
    const int64_t end = std::min((right - x0_) / w.dilation, 2 * w.steps_x) + 1;
    const int64_t chunks = (end - begin + max_displacements(rows) - 1) / max_displacements(rows);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t s = begin + (end - begin) * i / chunks;
      const int count = static_cast<int>(begin + (end - begin) * (i + 1) / chunks - s);
      match_displacements(key_y, j, first, rows, s, count);
    }
  }

  // Displacements s .. s + count across.
  void match_displacements(int64_t key_y, int64_t j, int first, int rows, int64_t s, int count) {
    const Window& w = p_.window;
    const int64_t x = x0_ + s * w.dilation, span = (count - 1) * w.dilation + kLanes;
    int64_t unused_first, unused_last;
    if (!p_.masks.needed(key_y, x, x + span, unused_first, unused_last)) return;
    constexpr uint64_t kAllLanes = (uint64_t{1} << kLanes) - 1;
    typename Minima<V>::Object* present = present_.data();
    for (int64_t o = 0; o < p_.objects; ++o) {
      uint64_t any = 0;
      const uint64_t word = p_.masks.word(o, key_y, x);  // often the lanes of every displacement
      for (int d = 0; d < count; ++d) {
        const int64_t shift = d * w.dilation;
        const uint64_t lanes = (span <= 64 ? word >> shift : p_.masks.word(o, key_y, x + shift)) & kAllLanes;
        any |= lanes;
        present->lanes[d] = static_cast<uint32_t>(lanes);
      }
      if (any == 0) continue;
      present->slot = o * w.rings * kTileRows * kLanes;
      ++present;
    }
    const Minima<V> minima{.best = best_.data() + first * kLanes,
                           .code = code_.data() + first * kLanes,
                           .first_code = static_cast<Code>((j + w.steps_y) * w.steps_across() + s),
                           .objects = present_.data(),
                           .object_count = present - present_.data(),
                           .ring = rings_of(j - first, rows, s, count)};
    correlate_for<E>(rows, count)(
        query_ + first * kLanes, p_.key.data.data() + key_y * p_.key.elements * p_.key.stride + x,
        p_.key.norm.data() + key_y * p_.key.stride + x, p_.key.stride, w.dilation, p_.key.elements, minima);
  }

  // The slots of the rings that `count` displacements from s belong to, for `rows` rows, the first of which
  // lies `down` steps above the key row.
  const int64_t* rings_of(int64_t down, int rows, int64_t s, int count) {
    const Window& w = p_.window;
    if (w.rings == 1) return ring_.data();  // zeros
    for (int r = 0; r < rows; ++r) {
      for (int d = 0; d < count; ++d) {
        const int64_t steps = std::max(std::abs(s + d - w.steps_x), std::abs(down - r));
        ring_[r * count + d] = w.ring[steps] * int64_t{kTileRows * kLanes};
      }
    }
    return ring_.data();
  }

  void write_absent() {
    for (int64_t slot = 0; slot < slots_; ++slot)
      for (int r = 0; r < rows_; ++r)
        for (int64_t lane = 0; lane < columns_; ++lane) write(slot, r, lane, kAbsent, -1);
  }

  void write(int64_t slot, int r, int64_t lane, T distance, int64_t index) {
    const int64_t at = (slot * height_ + y0_ + r * p_.window.dilation) * width_ + x0_ + lane;
    p_.distance[at] = distance;
    p_.index[at] = index;
  }

  void write_matches() {
    for (int64_t o = 0; o < p_.objects; ++o) {
      for (int ring = 0; ring < p_.window.rings; ++ring) {
        const int64_t slot = o * p_.window.rings + ring;
        for (int r = 0; r < rows_; ++r) {
          T* best = best_.data() + (slot * kTileRows + r) * kLanes;
          Code* code = code_.data() + (slot * kTileRows + r) * kLanes;
          if (ring > 0) take_inner_ring(best, code);
          write_row(slot, r, code);
        }
      }
    }
  }

  // Makes a ring's best the best within its radius; on a tie the first pixel wins.
  void take_inner_ring(T* best, Code* code) const {
    const T* inner_best = best - kTileRows * kLanes;
    const Code* inner_code = code - kTileRows * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool first = inner_code[lane] >= 0 && inner_code[lane] < code[lane];
      if (inner_best[lane] < best[lane] || (inner_best[lane] == best[lane] && first)) {
        best[lane] = inner_best[lane];
        code[lane] = inner_code[lane];
      }
    }
  }

  // Computes the winners' distances from the differences and writes a row of the tile.
  void write_row(int64_t slot, int r, const Code* code) {
    const Window& w = p_.window;
    const Code across = static_cast<Code>(w.steps_across());
    for (int64_t lane = 0; lane < columns_; ++lane) {
      if (!wanted(r, lane)) {
        write(slot, r, lane, kAbsent, -1);
      } else if (std::isnan(norm_[r * norm_stride_ + lane])) {
        write(slot, r, lane, std::numeric_limits<T>::quiet_NaN(), -1);
      } else if (code[lane] < 0) {
        write(slot, r, lane, kAbsent, -1);
      } else {
        const int64_t key_y = y0_ + (code[lane] / across - w.steps_y) * w.dilation;
        const int64_t key_x = x0_ + lane + (code[lane] % across - w.steps_x) * w.dilation;
        const T distance =
            squared_distance(query_ + r * kLanes + lane,
                             p_.key.data.data() + key_y * p_.key.elements * p_.key.stride + w.reach + key_x);
        const bool finite = distance < kAbsent;
        write(slot, r, lane, finite ? distance : kAbsent, finite ? key_y * width_ + key_x : -1);
      }
    }
  }

  // Of a query pixel of the tile and a pixel of the key, in several sums to hide the latency of one.
  T squared_distance(const T* query, const T* key) const {
    constexpr int kSums = 4;
    constexpr int64_t kQueryStride = kTileRows * kLanes;
    const int64_t elements = p_.key.elements, stride = p_.key.stride;
    T sum[kSums] = {};
    int64_t e = 0;
    for (; e + kSums <= elements; e += kSums)
      for (int i = 0; i < kSums; ++i)
        sum[i] += E::squared_difference(query[(e + i) * kQueryStride], key[(e + i) * stride]);
    for (; e < elements; ++e) sum[0] += E::squared_difference(query[e * kQueryStride], key[e * stride]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  const Problem<T>& p_;
  const int64_t height_, width_, slots_;
  int64_t y0_ = 0, x0_ = 0, columns_ = 0;
  int rows_ = 0;
  Workspace<T> best_;     // (objects, rings, kTileRows, kLanes): the best score within a ring
  Workspace<Code> code_;  // its displacement, counted from the first key row of the tile; -1 for none
  std::vector<typename Minima<V>::Object> present_;
  std::array<int64_t, kTileRows * max_displacements(1)> ring_{};
  bool any_wanted_ = false;
  const T* query_ = nullptr;
  const T* norm_ = nullptr;
  int64_t norm_stride_ = 0;
};

// One worker thread: takes a band of kTileRows rows and up to kBandTiles registers of columns, packs its
// queries tile by tile (a long run of each source row at a time, for the sake of the caches) and runs the
// tiles. E is the element of a full register, H of half a one, which serves a right border of few columns.
template <class E, class H, class S>
class Band {
  using T = typename E::Lanes::T;
  static constexpr int kLanes = E::Lanes::kLanes;
  static constexpr int kHalf = H::Lanes::kLanes;
  static constexpr int kBandTiles = 8;

 public:
  static constexpr int kColumns = kBandTiles * kLanes;

  explicit Band(const Problem<T>& problem)
      : p_(problem), half_(problem), packed_(problem.key.elements * kTileRows * kColumns) {
    for (int i = 0; i < kBandTiles; ++i) tiles_.push_back(std::make_unique<Tile<E, S>>(problem));
  }

  // Key row by key row: each is read from memory once for all tiles of the band.
  void run(int64_t y0, int rows, int64_t x0) {
    const int64_t columns = std::min<int64_t>(kColumns, p_.query.size(3) - x0);
    const bool half_border = columns % kLanes != 0 && columns % kLanes <= kHalf;
    const int64_t full = columns / kLanes + (columns % kLanes != 0 && !half_border ? 1 : 0);
    pack(y0, rows, x0, columns);
    const auto each_tile = [&](const auto& act) {
      for (int64_t i = 0; i < full; ++i) act(*tiles_[i], i * kLanes);
      if (half_border) act(half_, full * kLanes);
    };
    each_tile([&](auto& tile, int64_t x) {
      tile.begin(y0, rows, x0 + x, packed_.data() + x * p_.key.elements * kTileRows, norm_ + x, kColumns);
    });
    const Window& w = p_.window;
    for (int64_t j = -w.steps_y; j < rows + w.steps_y; ++j) {
      const int64_t key_y = y0 + j * w.dilation;
      if (key_y < 0 || key_y >= p_.query.size(2)) continue;
      each_tile([&](auto& tile, int64_t) { tile.match(j); });
    }
    each_tile([&](auto& tile, int64_t) { tile.finish(); });
  }

 private:
  void pack(int64_t y0, int rows, int64_t x0, int64_t columns) {
    const Tensor& q = p_.query;
    const int64_t channels = q.size(1), stride_c = q.stride(1), stride_y = q.stride(2),
                  stride_x = q.stride(3);
    const S* base = q.const_data_ptr<S>() + p_.n * q.stride(0) + x0 * stride_x;
    std::fill_n(norm_, kTileRows * kColumns, T{0});
    alignas(64) T row[kColumns] = {};
    for (int64_t e = 0; e < p_.key.elements; ++e) {
      for (int r = 0; r < rows; ++r) {
        pack_columns<E>(base + (y0 + r * p_.window.dilation) * stride_y, stride_c, stride_x, channels, e,
                        columns, row, norm_ + r * kColumns);
        // Whole registers: std::copy_n becomes `rep movs`, which starts slowly for so few bytes.
        for (int64_t x = 0; x < columns; x += kLanes) {
          T* tile = packed_.data() + x * p_.key.elements * kTileRows;
          if (columns - x <= kHalf) {
            H::Lanes::store(tile + (e * kTileRows + r) * kHalf, H::Lanes::load(row + x));
          } else {
            E::Lanes::store(tile + (e * kTileRows + r) * kLanes, E::Lanes::load(row + x));
          }
        }
      }
    }
  }

  const Problem<T>& p_;
  std::vector<std::unique_ptr<Tile<E, S>>> tiles_;
  Tile<H, S> half_;
  Workspace<T> packed_;                       // a tile after the other, each (elements, kTileRows, its lanes)
  alignas(64) T norm_[kTileRows * kColumns];  // |q|^2
};

// Runs every band of one batch element.
template <class E, class H, class S>
void match_frame(const Tensor& query, const Tensor& key, const Tensor& mask,
                 const std::optional<Tensor>& query_mask, int64_t n, const Window& window,
                 PackedKey<typename E::Lanes::T>& packed, typename E::Lanes::T* distance, int64_t* index) {
  const int64_t height = query.size(2), width = query.size(3), objects = mask.size(1);
  const MaskBits masks(mask, n, window.reach, packed.stride);
  pack_key<E, S>(key, n, window.reach, packed);
  const Problem<typename E::Lanes::T> problem{
      .query = query,
      .query_mask = query_mask ? query_mask->const_data_ptr<bool>() + n * query_mask->stride(0) : nullptr,
      .query_mask_stride_y = query_mask ? query_mask->stride(1) : 0,
      .query_mask_stride_x = query_mask ? query_mask->stride(2) : 0,
      .n = n,
      .window = window,
      .masks = masks,
      .key = packed,
      .objects = objects,
      .distance = distance,
      .index = index};

  struct RowTile {
    int64_t y;
    int rows;
  };
  std::vector<RowTile> row_tiles;  // rows of a tile are dilation apart
  for (int64_t phase = 0; phase < std::min(window.dilation, height); ++phase) {
    for (int64_t y = phase; y < height; y += kTileRows * window.dilation) {
      const int64_t rows = std::min<int64_t>(kTileRows, (height - y + window.dilation - 1) / window.dilation);
      row_tiles.push_back({y, static_cast<int>(rows)});
    }
  }
  const int64_t columns = Band<E, H, S>::kColumns, bands = (width + columns - 1) / columns;
  parallel_tasks(static_cast<int64_t>(row_tiles.size()) * bands, [&] {
    return [&, band = Band<E, H, S>(problem)](int64_t task) mutable {
      const RowTile& rows = row_tiles[task / bands];
      band.run(rows.y, rows.rows, task % bands * columns);
    };
  });
}

// All batch elements with operands of E (H: half a register) read from tensors of S.
template <class E, class H, class S>
void match_batch(const Tensor& query, const Tensor& key, const Tensor& mask,
                 const std::optional<Tensor>& query_mask, const std::vector<int64_t>& radius,
                 int64_t dilation, Tensor& distance, Tensor& index) {
  using T = typename E::Lanes::T;
  constexpr int64_t kLanes = E::Lanes::kLanes;
  const int64_t channels = query.size(1), height = query.size(2), width = query.size(3);
  const Window window(radius, dilation, height, width);
  // An odd number of cache lines apart, channels of one pixel do not compete for the same cache set.
  const int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t lines = ((width + kLanes - 1) / kLanes * kLanes + 2 * window.reach + line - 1) / line;
  PackedKey<T> packed(height, elements_of<E>(channels), (lines | 1) * line);
  const int64_t frame = mask.size(1) * window.rings * height * width;
  for (int64_t n = 0; n < query.size(0); ++n) {
    match_frame<E, H, S>(query, key, mask, query_mask, n, window, packed,
                         distance.mutable_data_ptr<T>() + n * frame,
                         index.mutable_data_ptr<int64_t>() + n * frame);
  }
}

std::tuple<Tensor, Tensor> local_matching(const Tensor& query, const Tensor& key, const Tensor& mask,
                                          torch::headeronly::IntHeaderOnlyArrayRef radius, int64_t dilation,
                                          const std::optional<Tensor>& query_mask, std::string_view) {
  check_shape("query", query, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = query.size(0), height = query.size(2), width = query.size(3);
  check_shape("key", key, {batch, query.size(1), height, width});
  check_dtype("key", key, query.scalar_type());
  check_shape("mask", mask, {batch, kAnySize, height, width});
  check_dtype("mask", mask, ScalarType::Bool);
  if (query_mask) {
    check_shape("query_mask", *query_mask, {batch, height, width});
    check_dtype("query_mask", *query_mask, ScalarType::Bool);
  }
  const std::vector<int64_t> radii(radius.begin(), radius.end());
  STD_TORCH_CHECK(!radii.empty() && radii.front() >= 0 &&
                      std::adjacent_find(radii.begin(), radii.end(), std::greater_equal<>()) == radii.end(),
                  "radius must be ascending and not negative");
  STD_TORCH_CHECK(dilation >= 1, "dilation must be at least 1");
  constexpr int64_t kLongestSide = 16384;  // the code of a displacement fits 31 bits
  STD_TORCH_CHECK(height <= kLongestSide && width <= kLongestSide, "frames are limited to ",
                  std::to_string(kLongestSide), " pixels a side");

  const int64_t objects = mask.size(1), rings = static_cast<int64_t>(radii.size());
  const std::vector<int64_t> shape{batch, objects, rings, height, width};
  Tensor distance = torch::stable::new_empty(query, shape, accumulator_dtype(query.scalar_type()));
  Tensor index = torch::stable::new_empty(query, shape, ScalarType::Long);
  if (distance.numel() == 0) return {distance, index};
#if defined(VOSOPS_AMX)
  if (amx::match_locally(query, key, mask, query_mask, radii, dilation, distance, index)) {
    return {distance, index};
  }
#endif

  dispatch_floating(query.scalar_type(), [&](auto sample) {
    using S = decltype(sample);
    constexpr int kHalfBytes = kRegisterBytes > 16 ? kRegisterBytes / 2 : kRegisterBytes;
#if defined(VOSOPS_BF16_DOT)
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (has_bf16_dot()) {
        return match_batch<Bf16PairElement<Vec<float, kRegisterBytes>>,
                           Bf16PairElement<Vec<float, kHalfBytes>>, S>(query, key, mask, query_mask, radii,
                                                                       dilation, distance, index);
      }
    }
#endif
    using T = Accumulator<S>;
    match_batch<FloatElement<Vec<T, kRegisterBytes>>, FloatElement<Vec<T, kHalfBytes>>, S>(
        query, key, mask, query_mask, radii, dilation, distance, index);
  });
  return {distance, index};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("local_matching", TORCH_BOX(&vosops::cpu::local_matching));
}
