// Local correlation on the CPU: the products of two maps at displacements of a patch, and its two
// derivatives.
//   correlate  out[p,o]  = sum over channels of query[c,u(o)] key[c,u(o) + d(p)]
//   query      gq[c,u]   = sum over p of grad[p,o] key[c,u + d(p)], u = u(o)
//   key        gk[c,v]   = sum over p of grad[p,o] query[c,v - d(p)], v - d(p) = u(o)
// A stride cuts the key into phases, each a smaller map in which the displacements are evenly spaced (Steps),
// so that every case is the same dense walk: neighbours of a row of outputs read neighbours of a row of the
// key. Maps are packed once (rows padded with zeros, C x W each), so that any stride is read and no load
// leaves its row. A task owns up to kTileRows rows a step apart, in tiles of one register of columns.
// correlate: for every key row in reach, rows x D sums of neighbouring displacements stay in registers over
// all channels; one unaligned load of the key serves every row of the tile. Floor: 2 C operations an output
// at the FMA rate, and one write of it, which for C below about 200 takes as long. Derivatives: the tile's
// part of grad, (rows of the patch, columns of it, kTileRows, lanes), is packed once and stays in the
// second-level cache while blocks of kBlock channels pass; rows x kBlock sums stay in registers over all
// displacements, kTileRows + kBlock loads for kTileRows x kBlock FMAs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <numeric>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "cpu/element.h"
#include "cpu/narrow.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"

namespace vosops::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int kTileRows = kRegisters == 32 ? 4 : 3;

// As many sums beside `rows` others as leave registers for them and for one load.
constexpr int max_beside(int rows) {
  return std::min((kRegisters - rows - 1) / rows, 12);
}
constexpr int kBlock = max_beside(kTileRows);  // channels of a derivative's sums

constexpr int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return -floor_div(-a, b);
}

// ---- The geometry of one axis.

// The displacements that lead from the query's pixels to one phase of the stride: of the query's pixel m (of
// those that outputs have, counted from the first), displacement i meets pixel m + shift + i * spacing of it.
struct Steps {
  int64_t plane, plane_step, count;  // displacement i is position plane + i * plane_step of the patch
  int64_t shift, spacing;
  int64_t phase, length;  // the key's pixels phase, phase + stride, ...: so many
  int64_t last() const { return shift + (count - 1) * spacing; }
};

struct Axis {
  int64_t size, patch, stride, padding, dilation;
  int64_t outputs;         // output o looks at pixel o * stride - padding of the query
  int64_t begin, sampled;  // outputs begin .. begin + sampled do so within the map
  int64_t first;           // the pixel of output `begin`
  int64_t spacing;         // of the displacements within a phase
  std::vector<Steps> steps;
  bool complete;  // every output has a pixel, and every position of the patch leads somewhere

  Axis(int64_t size_, int64_t patch_, int64_t stride_, int64_t padding_, int64_t dilation_)
      : size(size_),
        patch(patch_),
        stride(stride_),
        padding(padding_),
        dilation(dilation_),
        outputs(floor_div(size + 2 * padding - 1, stride) + 1),
        begin(ceil_div(padding, stride)),
        sampled(std::max<int64_t>(0, floor_div(size - 1 + padding, stride) + 1 - begin)),
        first(begin * stride - padding),
        spacing(dilation / std::gcd(dilation, stride)) {
    const int64_t phases = stride / std::gcd(dilation, stride);
    int64_t led = 0;
    for (int64_t p = 0; p < std::min(phases, patch); ++p) {
      const int64_t place = first + (p - (patch - 1) / 2) * dilation, shift = floor_div(place, stride);
      const int64_t phase = place - shift * stride,
                    length = std::max<int64_t>(0, ceil_div(size - phase, stride));
      // Of the displacements only those that meet a pixel of the phase.
      const int64_t all = ceil_div(patch - p, phases);
      const int64_t from = std::max<int64_t>(0, ceil_div(1 - sampled - shift, spacing));
      const int64_t to = std::min(all, ceil_div(length - shift, spacing));
      if (sampled == 0 || length == 0 || from >= to) continue;
      steps.push_back({p + from * phases, phases, to - from, shift + from * spacing, spacing, phase, length});
      led += to - from;
    }
    complete = begin == 0 && sampled == outputs && led == patch;
  }
};

// Two axes of a problem, y and x, from the lists that the op receives.
struct Geometry {
  Axis y, x;
  int64_t batch, channels;
  std::vector<int64_t> output_shape() const { return {batch, y.patch, x.patch, y.outputs, x.outputs}; }
  bool complete() const { return y.complete && x.complete; }
};

Geometry geometry_of(const Tensor& map, IntHeaderOnlyArrayRef patch, IntHeaderOnlyArrayRef stride,
                     IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation) {
  for (const auto& each : {patch, stride, padding, dilation})
    STD_TORCH_CHECK(each.size() == 2, "patch_size, stride, padding and dilation_patch must have two numbers");
  const auto axis = [&](int i) {
    STD_TORCH_CHECK(patch[i] >= 1 && stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1,
                    "patch_size, stride and dilation_patch must be at least 1, padding at least 0");
    return Axis(map.size(2 + i), patch[i], stride[i], padding[i], dilation[i]);
  };
  return {axis(0), axis(1), map.size(0), map.size(1)};
}

// Rows y, y + spacing, ...: `rows` of them.
struct RowTile {
  int64_t y;
  int rows;
};

std::vector<RowTile> row_tiles(int64_t height, int64_t spacing) {
  std::vector<RowTile> tiles;
  for (int64_t phase = 0; phase < std::min(spacing, height); ++phase)
    for (int64_t y = phase; y < height; y += kTileRows * spacing)
      tiles.push_back({y, static_cast<int>(std::min<int64_t>(kTileRows, ceil_div(height - y, spacing)))});
  return tiles;
}

// ---- Packed maps.

// Every pixel of one phase of one batch element: (channels, height, width), strides in entries.
template <class S>
struct View {
  S* data;
  int64_t channel, y, x;
  int64_t height, width;
};

template <class S>
View<const S> view_of(const Tensor& map, int64_t n, int64_t first_y, int64_t step_y, int64_t height,
                      int64_t first_x, int64_t step_x, int64_t width) {
  return {map.const_data_ptr<S>() + n * map.stride(0) + first_y * map.stride(2) + first_x * map.stride(3),
          map.stride(1),
          map.stride(2) * step_y,
          map.stride(3) * step_x,
          height,
          width};
}

// Packs element `element` of `count` pixels.
template <class E, class S>
void pack_columns(const S* pixel, int64_t channel_stride, int64_t column_stride, int64_t channels,
                  int64_t element, int64_t count, typename E::Lanes::T* out) {
  if constexpr (E::kChannels == 1) {
    const S* from = pixel + element * channel_stride;
    if (column_stride == 1) {
      for (int64_t x = 0; x < count; ++x) out[x] = widen(from[x]);
    } else {
      for (int64_t x = 0; x < count; ++x) out[x] = widen(from[x * column_stride]);
    }
  } else {
    const S* from = pixel + 2 * element * channel_stride;
    const bool second = 2 * element + 1 < channels;
    for (int64_t x = 0; x < count; ++x, from += column_stride)
      out[x] = E::pair(from[0], second ? from[channel_stride] : S(0.f));
  }
}

// A view with padded rows: element e of pixel (y, x) lies at row(y)[e * pitch + x], for every x from `least`
// to what a register or a block of displacements reads from `most` on.
template <class E>
struct PackedMap {
  using T = typename E::Lanes::T;
  int64_t elements, margin, pitch;
  Workspace<T> data;

  template <class S>
  PackedMap(const View<const S>& view, int64_t channels, int64_t least, int64_t most)
      : elements(elements_of<E>(channels)),
        margin(std::max<int64_t>(0, -least)),
        pitch(pitch_of(margin + std::max(view.width, most + E::Lanes::kLanes))),
        data(static_cast<size_t>(view.height * elements * pitch)) {
    parallel_each(view.height, [&](int64_t y) {
      for (int64_t e = 0; e < elements; ++e) {
        T* to = data.data() + (y * elements + e) * pitch;
        std::fill_n(to, margin, T{0});
        pack_columns<E>(view.data + y * view.y, view.channel, view.x, channels, e, view.width, to + margin);
        std::fill(to + margin + view.width, to + pitch, T{0});
      }
    });
  }
  const T* row(int64_t y) const { return data.data() + y * elements * pitch + margin; }

 private:
  // An odd number of cache lines apart, channels of one pixel do not compete for the same cache set.
  static int64_t pitch_of(int64_t width) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    return (ceil_div(width, kLine) | 1) * kLine;
  }
};

// ---- correlate

// sums[d][r] = sum over elements of query[e][r] * key[e][d * spacing], registers of lanes.
template <class E, int R, int D>
[[gnu::noinline]] void products(const typename E::Lanes::T* query, const typename E::Lanes::T* key,
                                int64_t key_pitch, int64_t spacing, int64_t elements,
                                typename E::Lanes::T* sums) {
  using V = typename E::Lanes;
  typename V::Reg sum[D][R] = {};
  for (int64_t e = 0; e < elements; ++e) {
    typename V::Reg q[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) q[r] = V::load(query + r * V::kLanes);
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d) {
      typename V::Reg k = V::load(key + d * spacing);
      V::pin(k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[d][r] = E::dot(q[r], k, sum[d][r]);
    }
    query += kTileRows * V::kLanes;
    key += key_pitch;
  }
#pragma GCC unroll 16
  for (int d = 0; d < D; ++d)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) V::store(sums + (d * R + r) * V::kLanes, sum[d][r]);
}

template <class E>
using ProductsFn = decltype(&products<E, 1, 1>);

template <class E, int R, int... D>
constexpr std::array<ProductsFn<E>, sizeof...(D)> products_row(std::integer_sequence<int, D...>) {
  return {&products<E, R, D + 1>...};
}

template <class E>
ProductsFn<E> products_for(int rows, int displacements) {
  static constexpr auto one = products_row<E, 1>(std::make_integer_sequence<int, max_beside(1)>{});
  static constexpr auto two = products_row<E, 2>(std::make_integer_sequence<int, max_beside(2)>{});
  static constexpr auto three = products_row<E, 3>(std::make_integer_sequence<int, max_beside(3)>{});
  static constexpr auto four = products_row<E, 4>(std::make_integer_sequence<int, max_beside(4)>{});
  const int d = displacements - 1;
  return rows == 1 ? one[d] : rows == 2 ? two[d] : rows == 3 ? three[d] : four[d];
}

// Writes `count` sums to a row of the output; those outside [begin, end) have no pixel and are 0.
template <class V, class S>
void store_sums(const typename V::T* sums, int64_t count, int64_t begin, int64_t end, S* to) {
  if (begin <= 0 && end >= count) {
    if (count < V::kLanes) return narrow_row(sums, count, to);
    if constexpr (std::is_same_v<S, typename V::T>) {
      V::store(to, V::load(sums));
    } else {
      narrow_row(sums, V::kLanes, to);
    }
  } else {
    typename V::T kept[V::kLanes];
    for (int64_t i = 0; i < count; ++i) kept[i] = i >= begin && i < end ? sums[i] : 0;
    narrow_row(kept, count, to);
  }
}

// One worker thread: the rows of a tile against every displacement.
template <class E, class S>
class Correlator {
  using V = typename E::Lanes;
  using T = typename V::T;
  static constexpr int kLanes = V::kLanes;

 public:
  // `keys` holds the packed phases, those of steps i in y and j in x at i * (steps in x) + j.
  Correlator(const Geometry& geometry, const View<const S>& query, const std::deque<PackedMap<E>>& keys,
             S* out)
      : g_(geometry),
        query_(query),
        keys_(keys),
        out_(out),
        elements_(elements_of<E>(geometry.channels)),
        packed_(static_cast<size_t>(ceil_div(query.width, kLanes) * elements_ * kTileRows * kLanes)) {}

  void run(const RowTile& rows) {
    pack(rows);
    for (int64_t x0 = 0; x0 < query_.width; x0 += kLanes) {
      const T* query = packed_.data() + x0 * elements_ * kTileRows;
      for (size_t part = 0; part < g_.y.steps.size(); ++part) {
        const Steps& down = g_.y.steps[part];
        for (int64_t j = 0; j < down.count + rows.rows - 1; ++j) correlate(rows, x0, query, part, j);
      }
    }
  }

 private:
  // The rows of the tile as (elements, kTileRows, lanes) for each register of columns.
  void pack(const RowTile& rows) {
    const int64_t columns = ceil_div(query_.width, kLanes) * kLanes;
    Workspace<T> line(static_cast<size_t>(columns));
    std::fill(line.data() + query_.width, line.data() + columns, T{0});
    for (int64_t e = 0; e < elements_; ++e) {
      for (int r = 0; r < rows.rows; ++r) {
        pack_columns<E>(query_.data + (rows.y + r * g_.y.spacing) * query_.y, query_.channel, query_.x,
                        g_.channels, e, query_.width, line.data());
        for (int64_t x = 0; x < columns; x += kLanes)
          V::store(packed_.data() + (x * elements_ + e * kLanes) * kTileRows + r * kLanes,
                   V::load(line.data() + x));
      }
    }
  }

  // Row r of the tile meets, by displacement j - r, the key row that lies j steps below the first one's.
  void correlate(const RowTile& rows, int64_t x0, const T* query, size_t part, int64_t j) {
    const Steps& down = g_.y.steps[part];
    const int first = static_cast<int>(std::max<int64_t>(0, j - down.count + 1));
    const int count = static_cast<int>(std::min<int64_t>(rows.rows - 1, j)) - first + 1;
    const int64_t y = rows.y + down.shift + j * down.spacing,
                  columns = std::min<int64_t>(kLanes, query_.width - x0);
    const bool exists = y >= 0 && y < down.length;
    const int most = max_beside(count);
    for (size_t across = 0; across < g_.x.steps.size(); ++across) {
      const Steps& steps = g_.x.steps[across];
      const PackedMap<E>& key = keys_[part * g_.x.steps.size() + across];
      const int64_t chunks = ceil_div(steps.count, most);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {  // of nearly equal size
        const int64_t begin = steps.count * chunk / chunks, end = steps.count * (chunk + 1) / chunks;
        const int64_t shift = steps.shift + begin * steps.spacing;
        const int width = static_cast<int>(end - begin);
        if (exists) {
          products_for<E>(count, width)(query + first * kLanes, key.row(y) + x0 + shift, key.pitch,
                                        steps.spacing, elements_, sums_);
        }
        for (int d = 0; d < width; ++d) {
          const int64_t left = -(x0 + shift + d * steps.spacing), right = exists ? left + steps.length : left;
          for (int r = 0; r < count; ++r) {
            const int64_t i = down.plane + (j - first - r) * down.plane_step;
            const int64_t plane = i * g_.x.patch + steps.plane + (begin + d) * steps.plane_step;
            const int64_t row = g_.y.begin + rows.y + (first + r) * down.spacing;
            S* to = out_ + (plane * g_.y.outputs + row) * g_.x.outputs + g_.x.begin + x0;
            store_sums<V>(sums_ + (d * count + r) * kLanes, columns, left, right, to);
          }
        }
      }
    }
  }

  const Geometry& g_;
  const View<const S> query_;
  const std::deque<PackedMap<E>>& keys_;
  S* const out_;
  const int64_t elements_;
  Workspace<T> packed_;
  alignas(64) T sums_[kRegisters * kLanes] = {};
};

// The packed phases of a batch element of the key.
template <class E, class S>
std::deque<PackedMap<E>> pack_phases(const Geometry& g, const Tensor& key, int64_t n) {
  std::deque<PackedMap<E>> maps;
  for (const Steps& y : g.y.steps) {
    for (const Steps& x : g.x.steps) {
      const auto view = view_of<S>(key, n, y.phase, g.y.stride, y.length, x.phase, g.x.stride, x.length);
      maps.emplace_back(view, g.channels, x.shift, g.x.sampled + x.last());
    }
  }
  return maps;
}

template <class S>
View<const S> sampled_pixels(const Geometry& g, const Tensor& query, int64_t n) {
  return view_of<S>(query, n, g.y.first, g.y.stride, g.y.sampled, g.x.first, g.x.stride, g.x.sampled);
}

template <class E, class S>
void correlate_batch(const Geometry& g, const Tensor& query, const Tensor& key, S* out) {
  const auto tiles = row_tiles(g.y.sampled, g.y.spacing);
  const int64_t each = g.y.patch * g.x.patch * g.y.outputs * g.x.outputs;
  for (int64_t n = 0; n < g.batch; ++n) {
    const auto keys = pack_phases<E, S>(g, key, n);
    const auto pixels = sampled_pixels<S>(g, query, n);
    parallel_tasks(static_cast<int64_t>(tiles.size()), [&] {
      return [&, correlator = Correlator<E, S>(g, pixels, keys, out + n * each)](int64_t task) mutable {
        correlator.run(tiles[task]);
      };
    });
  }
}

Tensor local_correlation(const Tensor& query, const Tensor& key, IntHeaderOnlyArrayRef patch,
                         IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
                         IntHeaderOnlyArrayRef dilation) {
  check_shape("query", query, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("key", key, {query.size(0), query.size(1), query.size(2), query.size(3)});
  check_dtype("key", key, query.scalar_type());
  const Geometry g = geometry_of(query, patch, stride, padding, dilation);
  Tensor out = g.complete() ? torch::stable::new_empty(query, g.output_shape())
                            : torch::stable::new_zeros(query, g.output_shape());
  if (out.numel() == 0) return out;
  dispatch_floating(query.scalar_type(), [&](auto sample) {
    using S = decltype(sample);
    S* to = out.mutable_data_ptr<S>();
#if defined(VOSOPS_BF16_DOT)
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (has_bf16_dot())
        return correlate_batch<Bf16PairElement<Vec<float, kRegisterBytes>>, S>(g, query, key, to);
    }
#endif
    correlate_batch<FloatElement<Vec<Accumulator<S>, kRegisterBytes>>, S>(g, query, key, to);
  });
  return out;
}

// ---- The derivatives: maps weighted by grad.

// Which displacements along an axis lead from the pixels of a target to those of a source.
struct Walk {
  int64_t shift, spacing, count;
  int64_t length;  // pixels of the source
  int64_t first,
      step;  // of the weights, in entries: displacement i's of the target's pixel 0 is at first + i * step
  int64_t last() const { return shift + (count - 1) * spacing; }
  bool exists(int64_t pixel) const { return pixel >= 0 && pixel < length; }
};

// A source, and the weights of its pixels: those of grad, of any stride.
template <class V, class S>
struct Term {
  const PackedMap<FloatElement<V>>* map;
  Walk y, x;
  const S* weights;
  int64_t weights_y, weights_x;  // their strides along the target

  int64_t packed_rows() const { return y.count + kTileRows - 1; }
  int64_t packed_weights() const { return packed_rows() * x.count * kTileRows * V::kLanes; }
};

// The pixels that receive sums: target[c,p] = sum over terms and displacements i of weights[i,p] map[c,p +
// i].
template <class V, class S>
struct Target {
  View<S> out;
  int64_t spacing;  // of the rows of a tile
  std::vector<Term<V, S>> terms;
};

// sums[k][r] += sum over j, i of weights[j][i][r] * map[j][place k + i * spacing], registers of lanes.
template <class V, int R>
[[gnu::noinline]] void weigh(const typename V::T* weights, int64_t weights_row, const typename V::T* map,
                             int64_t map_row, const std::array<int64_t, kBlock>& places, int64_t rows,
                             int64_t count, int64_t spacing, typename V::T* sums) {
  typename V::Reg sum[kBlock][R];
#pragma GCC unroll 16
  for (int k = 0; k < kBlock; ++k)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[k][r] = V::load(sums + (k * kTileRows + r) * V::kLanes);
  for (int64_t j = 0; j < rows; ++j, weights += weights_row, map += map_row) {
    for (int64_t i = 0; i < count; ++i) {
      typename V::Reg w[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) w[r] = V::load(weights + (i * kTileRows + r) * V::kLanes);
#pragma GCC unroll 16
      for (int k = 0; k < kBlock; ++k) {
        typename V::Reg value = V::load(map + places[k] + i * spacing);
        V::pin(value);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[k][r] = V::fma(w[r], value, sum[k][r]);
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kBlock; ++k)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) V::store(sums + (k * kTileRows + r) * V::kLanes, sum[k][r]);
}

// One worker thread: the rows of a tile of a target.
template <class V, class S>
class Weigher {
  using T = typename V::T;
  static constexpr int kLanes = V::kLanes;

 public:
  Weigher(int64_t channels, int64_t most_weights)
      : channels_(channels), weights_(static_cast<size_t>(most_weights)) {}

  void run(const Target<V, S>& target, const RowTile& rows) {
    for (int64_t x0 = 0; x0 < target.out.width; x0 += kLanes) {
      const int64_t columns = std::min<int64_t>(kLanes, target.out.width - x0);
      T* packed = weights_.data();
      for (const auto& term : target.terms) {
        pack(term, rows, x0, columns, packed);
        packed += term.packed_weights();
      }
      for (int64_t first = 0; first < channels_; first += kBlock) {
        std::fill_n(sums_, kBlock * kTileRows * kLanes, T{0});
        const T* weights = weights_.data();
        for (const auto& term : target.terms) {
          add(term, rows, x0, first, weights);
          weights += term.packed_weights();
        }
        store(target, rows, x0, columns, first);
      }
    }
  }

 private:
  struct Rows {
    int first, count;
  };
  // Which rows of the tile meet the source's row that lies j steps below the first one's.
  static Rows meeting(const Walk& y, const RowTile& rows, int64_t j) {
    if (!y.exists(rows.y + y.shift + j * y.spacing)) return {0, 0};
    const int first = static_cast<int>(std::max<int64_t>(0, j - y.count + 1));
    return {first, static_cast<int>(std::min<int64_t>(rows.rows - 1, j)) - first + 1};
  }

  // The term's weights of the tile as (j, displacement in x, kTileRows, lanes), 0 where the source has no
  // pixel.
  static void pack(const Term<V, S>& term, const RowTile& rows, int64_t x0, int64_t columns, T* packed) {
    for (int64_t j = 0; j < term.packed_rows(); ++j) {
      const Rows meet = meeting(term.y, rows, j);
      for (int r = meet.first; r < meet.first + meet.count; ++r) {
        const S* row = term.weights + term.y.first + (j - r) * term.y.step +
                       (rows.y + r * term.y.spacing) * term.weights_y + x0 * term.weights_x;
        for (int64_t i = 0; i < term.x.count; ++i) {
          T* to = packed + ((j * term.x.count + i) * kTileRows + r) * kLanes;
          const S* from = row + term.x.first + i * term.x.step;
          const int64_t column = x0 + term.x.shift + i * term.x.spacing;
          const int64_t begin = std::clamp<int64_t>(-column, 0, columns);
          const int64_t end = std::clamp<int64_t>(term.x.length - column, begin, columns);
          if (begin == 0 && end == kLanes && term.weights_x == 1) {
            for (int lane = 0; lane < kLanes; ++lane) to[lane] = widen(from[lane]);
          } else {
            std::fill_n(to, kLanes, T{0});
            for (int64_t lane = begin; lane < end; ++lane) to[lane] = widen(from[lane * term.weights_x]);
          }
        }
      }
    }
  }

  void add(const Term<V, S>& term, const RowTile& rows, int64_t x0, int64_t channel, const T* weights) {
    const auto& map = *term.map;
    std::array<int64_t, kBlock>
        places;  // of the block's channels; of what is beyond the last, the last again
    for (int k = 0; k < kBlock; ++k) places[k] = std::min(channel + k, channels_ - 1) * map.pitch;
    const int64_t weights_row = term.x.count * kTileRows * kLanes;
    const int64_t map_row = term.y.spacing * map.elements * map.pitch;
    for (int64_t j = 0, next; j < term.packed_rows(); j = next) {
      const Rows meet = meeting(term.y, rows, j);
      next = j + 1;  // past all steps that the same rows take
      while (next < term.packed_rows() && meeting(term.y, rows, next).first == meet.first &&
             meeting(term.y, rows, next).count == meet.count)
        ++next;
      if (meet.count <= 0) continue;
      static constexpr decltype(&weigh<V, 1>) kBy[] = {&weigh<V, 1>, &weigh<V, 2>, &weigh<V, 3>,
                                                       &weigh<V, 4>};
      const T* from = map.row(rows.y + term.y.shift + j * term.y.spacing) + x0 + term.x.shift;
      kBy[meet.count - 1](weights + j * weights_row + meet.first * kLanes, weights_row, from, map_row, places,
                          next - j, term.x.count, term.x.spacing, sums_ + meet.first * kLanes);
    }
  }

  void store(const Target<V, S>& target, const RowTile& rows, int64_t x0, int64_t columns, int64_t first) {
    const View<S>& out = target.out;
    for (int64_t k = 0; k < std::min<int64_t>(kBlock, channels_ - first); ++k) {
      for (int r = 0; r < rows.rows; ++r) {
        const T* sums = sums_ + (k * kTileRows + r) * kLanes;
        S* to = out.data + (first + k) * out.channel + (rows.y + r * target.spacing) * out.y + x0 * out.x;
        if (out.x == 1) {
          narrow_row(sums, columns, to);
        } else {
          for (int64_t lane = 0; lane < columns; ++lane) to[lane * out.x] = static_cast<S>(sums[lane]);
        }
      }
    }
  }

  const int64_t channels_;
  Workspace<T> weights_;
  alignas(64) T sums_[kBlock * kTileRows * kLanes] = {};
};

// Runs every tile of every target.
template <class V, class S>
void weigh_targets(const std::vector<Target<V, S>>& targets, int64_t channels) {
  struct Task {
    const Target<V, S>* target;
    RowTile rows;
  };
  std::vector<Task> tasks;
  int64_t most_weights = 0;
  for (const auto& target : targets) {
    for (const RowTile& rows : row_tiles(target.out.height, target.spacing)) tasks.push_back({&target, rows});
    int64_t weights = 0;
    for (const auto& term : target.terms) weights += term.packed_weights();
    most_weights = std::max(most_weights, weights);
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&] {
    return [&, weigher = Weigher<V, S>(channels, most_weights)](int64_t task) mutable {
      weigher.run(*tasks[task].target, tasks[task].rows);
    };
  });
}

// How grad is read along an axis: `plane` entries from one position of the patch to the next, `output` from
// one output to the next.
struct GradStrides {
  int64_t plane, output;
  // Walks from the query's sampled pixels to those of a phase of the key.
  Walk to_key(const Axis& axis, const Steps& steps) const {
    return {steps.shift,
            steps.spacing,
            steps.count,
            steps.length,
            steps.plane * plane + axis.begin * output,
            steps.plane_step * plane};
  }
  // The same walk backwards, from the pixels of the phase to those of the query: the last displacement first.
  Walk to_query(const Axis& axis, const Steps& steps) const {
    const int64_t last = steps.plane + (steps.count - 1) * steps.plane_step;
    return {-steps.last(),
            steps.spacing,
            steps.count,
            axis.sampled,
            last * plane + (axis.begin - steps.last()) * output,
            steps.spacing * output - steps.plane_step * plane};
  }
};

template <class S>
View<S> written_view(Tensor& map, int64_t n, const Axis& y, int64_t first_y, int64_t height, const Axis& x,
                     int64_t first_x, int64_t width) {
  S* data = map.mutable_data_ptr<S>() + n * map.stride(0) + first_y * map.stride(2) + first_x * map.stride(3);
  return {data, map.stride(1), map.stride(2) * y.stride, map.stride(3) * x.stride, height, width};
}

template <class S>
void add_to_query(const Geometry& g, const Tensor& grad, const Tensor& key, Tensor& out) {
  using V = Vec<Accumulator<S>, kRegisterBytes>;
  const GradStrides down{grad.stride(1), grad.stride(3)}, across{grad.stride(2), grad.stride(4)};
  for (int64_t n = 0; n < g.batch; ++n) {
    const auto keys = pack_phases<FloatElement<V>, S>(g, key, n);
    Target<V, S> target{
        written_view<S>(out, n, g.y, g.y.first, g.y.sampled, g.x, g.x.first, g.x.sampled), g.y.spacing, {}};
    auto map = keys.begin();
    for (const Steps& y : g.y.steps)
      for (const Steps& x : g.x.steps)
        target.terms.push_back({&*map++, down.to_key(g.y, y), across.to_key(g.x, x),
                                grad.const_data_ptr<S>() + n * grad.stride(0), down.output, across.output});
    weigh_targets<V, S>({target}, g.channels);
  }
}

template <class S>
void add_to_key(const Geometry& g, const Tensor& grad, const Tensor& query, Tensor& out) {
  using V = Vec<Accumulator<S>, kRegisterBytes>;
  const GradStrides down{grad.stride(1), grad.stride(3)}, across{grad.stride(2), grad.stride(4)};
  int64_t least = 0, most = 0;
  for (const Steps& x : g.x.steps) {
    least = std::min(least, -x.last());
    most = std::max(most, x.length - x.shift);
  }
  for (int64_t n = 0; n < g.batch; ++n) {
    const PackedMap<FloatElement<V>> map(sampled_pixels<S>(g, query, n), g.channels, least, most);
    std::vector<Target<V, S>> targets;
    for (const Steps& y : g.y.steps)
      for (const Steps& x : g.x.steps)
        targets.push_back({written_view<S>(out, n, g.y, y.phase, y.length, g.x, x.phase, x.length),
                           g.y.spacing,
                           {{&map, down.to_query(g.y, y), across.to_query(g.x, x),
                             grad.const_data_ptr<S>() + n * grad.stride(0), down.output, across.output}}});
    weigh_targets(targets, g.channels);
  }
}

template <bool kOfQuery>
Tensor local_correlation_gradient(const Tensor& grad, const Tensor& map, IntHeaderOnlyArrayRef patch,
                                  IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
                                  IntHeaderOnlyArrayRef dilation) {
  const char* name = kOfQuery ? "key" : "query";
  check_shape(name, map, {kAnySize, kAnySize, kAnySize, kAnySize});
  const Geometry g = geometry_of(map, patch, stride, padding, dilation);
  check_shape("grad", grad, {g.batch, g.y.patch, g.x.patch, g.y.outputs, g.x.outputs});
  check_dtype("grad", grad, map.scalar_type());
  // A stride passes pixels over; without one, what is sampled or led to is a whole map or nothing.
  const bool whole = g.y.stride == 1 && g.x.stride == 1 && !g.y.steps.empty() && !g.x.steps.empty();
  Tensor out =
      whole ? torch::stable::new_empty(map, map.sizes()) : torch::stable::new_zeros(map, map.sizes());
  if (out.numel() == 0) return out;
  dispatch_floating(map.scalar_type(), [&](auto sample) {
    using S = decltype(sample);
    if constexpr (kOfQuery) {
      add_to_query<S>(g, grad, map, out);
    } else {
      add_to_key<S>(g, grad, map, out);
    }
  });
  return out;
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("local_correlation", TORCH_BOX(&vosops::cpu::local_correlation));
  m.impl("local_correlation_query", TORCH_BOX(&vosops::cpu::local_correlation_gradient<true>));
  m.impl("local_correlation_key", TORCH_BOX(&vosops::cpu::local_correlation_gradient<false>));
}
