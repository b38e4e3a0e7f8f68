// Winograd's F(4x4,3x3): 3x3 convolutions with 36 multiplications for 4x4 outputs instead of 144.
//
// The output plane is cut into tiles of 4x4; a tile's 6x6 patch of input, and every filter, are transformed
// to 36 numbers, one for each position; at each position the sum over the channels is a matrix product over
// the tiles, and a third transform gives the tile's outputs. Interpolation points 0, +-2/3, +-3/2 and
// infinity: the relative error of float32 is a third of that with the usual 0, +-1, +-2
// (docs/ops/conv_lstm.md).
//
// A band is some tile rows of one image, padded to whole registers of tiles (lanes). A task owns kBlockKeys
// output rows (channels, or gates) of one band: 36 products of packed panels (gemm.h) into a buffer of some
// hundred KB, then the output transform to scratch planes that stay in the second-level cache and go to the
// caller's epilogue. Floor: the products, 36/16 of the outputs' multiply-adds by channels; the bytes of a
// band's transformed input are read from the third-level cache once per task, those of the filters once per
// band.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace vosops::cpu::winograd {

using Lanes = Vec<float, kRegisterBytes>;
using Reg = Lanes::Reg;
using Element = FloatElement<Lanes>;

constexpr int kTile = 4;   // outputs of a tile in each direction
constexpr int kPatch = 6;  // inputs
constexpr int kTaps = 3;   // of a filter
constexpr int kPositions = kPatch * kPatch;
constexpr int kFilter = kTaps * kTaps;
// Output rows of a task: whole panels of keys, whole channels of four gates. Processors with AMX have 2 MB of
// second-level cache a core, where the products of 48 rows stay (1.4 MB), so that a band's input is read from
// the third level half as often (docs/performance.md has what that and prefetching gain).
constexpr int kBlockKeys = kPrefetches ? 48 : 24;
constexpr int kBlockPanels = kBlockKeys / kKeyPanel;
constexpr int64_t kBandTiles = 192;                 // tiles of a band at most, unless one tile row has more
constexpr int64_t kGroupFloats = int64_t{4} << 20;  // transformed input that is held at a time

constexpr int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// The transforms in one direction; the points are 0, +-kA, +-kB and infinity, with kA * kB = 1.
constexpr float kA = 2.f / 3, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;
constexpr float kScaleA = 1 / (2 * kA2 * (kA2 - kB2)), kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

template <class R>
[[gnu::always_inline]] inline void transform_input(const R (&d)[kPatch], R (&v)[kPatch]) {
  constexpr float kSum = kA2 + kB2;
  const R even_a = d[4] - kB2 * d[2], odd_a = kA * d[3] - kB * d[1];
  const R even_b = d[4] - kA2 * d[2], odd_b = kB * d[3] - kA * d[1];
  v[0] = d[0] - kSum * d[2] + d[4];
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = d[1] - kSum * d[3] + d[5];
}

template <class R>
[[gnu::always_inline]] inline void transform_filter(const R (&g)[kTaps], R (&u)[kPatch]) {
  const R even_a = kScaleA * g[0] + (kScaleA * kA2) * g[2], odd_a = (kScaleA * kA) * g[1];
  const R even_b = kScaleB * g[0] + (kScaleB * kB2) * g[2], odd_b = (kScaleB * kB) * g[1];
  u[0] = g[0];
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = g[2];
}

template <class R>
[[gnu::always_inline]] inline void transform_output(const R (&m)[kPatch], R (&y)[kTile]) {
  const R sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const R sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = kA * difference_a + kB * difference_b;
  y[2] = kA2 * sum_a + kB2 * sum_b;
  y[3] = kA3 * difference_a + kB3 * difference_b + m[5];
}

// The transposes of the last two, for the gradient of the filters.
template <class R>
[[gnu::always_inline]] inline void transform_grad(const R (&y)[kTile], R (&z)[kPatch]) {
  const R even_a = y[0] + kA2 * y[2], odd_a = kA * y[1] + kA3 * y[3];
  const R even_b = y[0] + kB2 * y[2], odd_b = kB * y[1] + kB3 * y[3];
  z[0] = y[0];
  z[1] = even_a + odd_a;
  z[2] = even_a - odd_a;
  z[3] = even_b + odd_b;
  z[4] = even_b - odd_b;
  z[5] = y[3];
}

template <class R>
[[gnu::always_inline]] inline void transform_filter_grad(const R (&u)[kPatch], R (&g)[kTaps]) {
  const R sum_a = kScaleA * (u[1] + u[2]), sum_b = kScaleB * (u[3] + u[4]);
  g[0] = u[0] + sum_a + sum_b;
  g[1] = (kScaleA * kA) * (u[1] - u[2]) + (kScaleB * kB) * (u[3] - u[4]);
  g[2] = kA2 * sum_a + kB2 * sum_b + u[5];
}

// to[i][j] = the transform of from[..][..] in both directions.
template <int kFrom, int kTo, class R, class Transform, class Load, class Store>
[[gnu::always_inline]] inline void transform_both(const Transform& transform, const Load& load,
                                                  const Store& store) {
  R half[kTo][kFrom];
#pragma GCC unroll 6
  for (int j = 0; j < kFrom; ++j) {
    R column[kFrom], transformed[kTo];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) column[i] = load(i, j);
    transform(column, transformed);
#pragma GCC unroll 6
    for (int i = 0; i < kTo; ++i) half[i][j] = transformed[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTo; ++i) {
    R transformed[kTo];
    transform(half[i], transformed);
#pragma GCC unroll 6
    for (int j = 0; j < kTo; ++j) store(i, j, transformed[j]);
  }
}

// Planes of one height and width, cut into tiles.
struct Plane {
  int64_t height, width;
  int64_t tile_rows() const { return (height + kTile - 1) / kTile; }
  int64_t tile_columns() const { return (width + kTile - 1) / kTile; }
  int64_t size() const { return height * width; }
};

// Tile rows [first_row, first_row + rows) of one image.
struct Band {
  int64_t image, first_row, rows, tiles;
  int64_t lanes() const { return round_up(tiles, Lanes::kLanes); }
};

// The bands of one image: as many tile rows each as waste the fewest lanes.
inline std::vector<Band> cut_into_bands(const Plane& plane, int64_t images) {
  if (plane.size() == 0) return {};
  const int64_t rows = plane.tile_rows(), columns = plane.tile_columns();
  const auto lanes_with = [&](int64_t step) {
    const int64_t rest = rows % step;
    return rows / step * round_up(step * columns, Lanes::kLanes) + round_up(rest * columns, Lanes::kLanes);
  };
  int64_t best = 1;
  for (int64_t step = 1; step <= std::min(rows, std::max<int64_t>(1, kBandTiles / columns)); ++step) {
    if (lanes_with(step) <= lanes_with(best)) best = step;
  }
  std::vector<Band> bands;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t row = 0; row < rows; row += best) {
      const int64_t count = std::min(best, rows - row);
      bands.push_back({image, row, count, count * columns});
    }
  }
  return bands;
}

// Where the rows of a channel lie that a convolution reads: output row 0 is centred on row `above`.
struct Rows {
  int64_t height, stride, above;
  static Rows of(const Plane& plane) { return {plane.height, plane.width, 0}; }
};

// Channels of an image; a convolution may read several such maps as one.
struct Maps {
  const float* data;
  int64_t image_stride, channel_stride, channels;
  Rows rows;
};

struct Channel {
  const float* data;
  Rows rows;
};

struct Source {
  Plane plane;  // of the output
  std::vector<Maps> maps;
  int64_t channels() const {
    int64_t sum = 0;
    for (const Maps& map : maps) sum += map.channels;
    return sum;
  }
  Channel channel(int64_t image, int64_t c) const {
    size_t i = 0;
    for (; c >= maps[i].channels; ++i) c -= maps[i].channels;
    const Maps& map = maps[i];
    return {map.data + image * map.image_stride + c * map.channel_stride, map.rows};
  }
};

// Transforms one channel of a band after the other to kPositions rows of stride() floats: at position
// i * kPatch + j the tiles in row order. Entries after the last tile are undefined.
class BandTransform {
 public:
  // `halo`: how many pixels a patch begins before its tile; 1 for the input, 0 for the output's gradient.
  BandTransform(const Plane& plane, int64_t most_rows, int64_t most_lanes, int halo)
      : plane_(plane),
        halo_(halo),
        pitch_(round_up(plane.tile_columns(), Lanes::kLanes) + Lanes::kLanes),
        stride_(most_lanes + Lanes::kLanes),
        phases_((kTile * most_rows + 2 * halo) * kTile * pitch_) {}

  int64_t stride() const { return stride_; }

  void operator()(const Channel& channel, const Band& band, float* tiles) {
    split_phases(channel, band);
    const int64_t columns = plane_.tile_columns();
    for (int64_t row = 0; row < band.rows; ++row) {
      for (int64_t first = 0; first < columns; first += Lanes::kLanes) {
        const float* from = phases_.data() + kTile * row * kTile * pitch_ + first;
        float* to = tiles + row * columns + first;
        const auto load = [&](int i, int j) {
          return Lanes::load(from + (i * kTile + j % kTile) * pitch_ + j / kTile);
        };
        const auto store = [&](int i, int j, Reg value) {
          Lanes::store(to + (i * kPatch + j) * stride_, value);
        };
        if (halo_ == 1) {
          transform_both<kPatch, kPatch, Reg>([](const auto& d, auto& v) { transform_input(d, v); }, load,
                                              store);
        } else {
          transform_both<kTile, kPatch, Reg>([](const auto& y, auto& z) { transform_grad(y, z); }, load,
                                             store);
        }
      }
    }
  }

 private:
  // Pixel (y, 4 k + q - halo) of the band, zero outside of the plane, becomes entry k of phase q of its row.
  void split_phases(const Channel& channel, const Band& band) {
    for (int64_t row = 0; row < kTile * band.rows + 2 * halo_; ++row) {
      const int64_t y = kTile * band.first_row + row - halo_ + channel.rows.above;
      float* phases = phases_.data() + row * kTile * pitch_;
      if (y < 0 || y >= channel.rows.height) {
        std::fill_n(phases, kTile * pitch_, 0.f);
        continue;
      }
      const float* pixels = channel.data + y * channel.rows.stride;
      for (int64_t q = 0; q < kTile; ++q) {
        float* phase = phases + q * pitch_;
        int64_t k = 0, x = q - halo_;
        if (x < 0) phase[k++] = 0, x += kTile;
        for (; x < plane_.width; x += kTile) phase[k++] = pixels[x];
        std::fill(phase + k, phase + pitch_, 0.f);
      }
    }
  }

  Plane plane_;
  int64_t halo_, pitch_, stride_;
  Workspace<float> phases_;
};

// Where the panels of a band's transformed input lie: (position, panel, channel, lane).
struct BandLayout {
  int64_t lanes, channels;
  int64_t panels() const { return (lanes + kLanePanel<Lanes> - 1) / kLanePanel<Lanes>; }
  int64_t width(int64_t panel) const {
    return std::min<int64_t>(kLanePanel<Lanes>, lanes - panel * kLanePanel<Lanes>);
  }
  int64_t floats() const { return kPositions * lanes * channels; }
  int64_t offset(int64_t position, int64_t panel) const {
    return (position * lanes + panel * kLanePanel<Lanes>)*channels;
  }
};

// The filters of a convolution: key k and channel c have taps at data + offset(k) + c * channel_stride.
struct Filters {
  const float* data;
  int64_t keys, channels, key_stride, channel_stride;
  int64_t gates =
      1;  // more: key k is that of channel k / gates and gate k % gates, in planes of keys / gates
  bool flipped = false;

  int64_t offset(int64_t key) const {
    return gates == 1 ? key * key_stride : (key % gates * (keys / gates) + key / gates) * key_stride;
  }
  int64_t panels() const { return (keys + kKeyPanel - 1) / kKeyPanel; }
};

// Floats between two positions of a panel; stores of whole registers may overrun a panel's last channel.
inline int64_t position_stride(int64_t channels) {
  return channels * kKeyPanel + round_up(kKeyPanel, Lanes::kLanes);
}

inline int64_t panel_floats(int64_t channels) {
  return kPositions * position_stride(channels);
}

// Transforms one panel of filters, zeros after the last key: (position, channel, key).
inline void transform_filters(const Filters& filters, int64_t panel, float* to) {
  constexpr int kWidth = (kKeyPanel + Lanes::kLanes - 1) / Lanes::kLanes * Lanes::kLanes;
  const int64_t first = panel * kKeyPanel, stride = position_stride(filters.channels);
  const int64_t count = std::min<int64_t>(kKeyPanel, filters.keys - first);
  const float* rows[kKeyPanel];
  for (int64_t k = 0; k < count; ++k) rows[k] = filters.data + filters.offset(first + k);
  float taps[kFilter][kWidth] = {};
  for (int64_t c = 0; c < filters.channels; ++c) {
    for (int64_t k = 0; k < count; ++k) {
      const float* filter = rows[k] + c * filters.channel_stride;
      for (int t = 0; t < kFilter; ++t) taps[filters.flipped ? kFilter - 1 - t : t][k] = filter[t];
    }
    for (int lane = 0; lane < kWidth; lane += Lanes::kLanes) {
      transform_both<kTaps, kPatch, Reg>(
          [](const auto& g, auto& u) { transform_filter(g, u); },
          [&](int i, int j) { return Lanes::load(taps[i * kTaps + j] + lane); },
          [&](int i, int j, Reg value) {
            Lanes::store(to + (i * kPatch + j) * stride + c * kKeyPanel + lane, value);
          });
    }
  }
}

// Four registers (a, b, c, d) as one row a0 b0 c0 d0 a1 b1 ...
inline void store_interleaved(const Reg (&columns)[kTile], float* to) {
  constexpr int kLanes = Lanes::kLanes;
  const Reg even_low = interleave<kLanes, false>(columns[0], columns[2]);
  const Reg even_high = interleave<kLanes, true>(columns[0], columns[2]);
  const Reg odd_low = interleave<kLanes, false>(columns[1], columns[3]);
  const Reg odd_high = interleave<kLanes, true>(columns[1], columns[3]);
  Lanes::store(to, interleave<kLanes, false>(even_low, odd_low));
  Lanes::store(to + kLanes, interleave<kLanes, true>(even_low, odd_low));
  Lanes::store(to + 2 * kLanes, interleave<kLanes, false>(even_high, odd_high));
  Lanes::store(to + 3 * kLanes, interleave<kLanes, true>(even_high, odd_high));
}

// A task's products and the output planes made of them.
class Block {
 public:
  Block(const Plane& plane, int64_t most_rows, int64_t most_lanes, int64_t planes)
      : plane_(plane),
        stride_(most_lanes + Lanes::kLanes),
        pitch_(kTile * round_up(plane.tile_columns(), Lanes::kLanes)),
        products_(kPositions * kBlockKeys * stride_),
        outputs_(planes * kTile * most_rows * pitch_),
        plane_floats_(kTile * most_rows * pitch_) {}

  // The products of `panels` panels of filters with the first `elements` channels of a band.
  void multiply_panels(const float* input, const BandLayout& layout, const float* filters, int64_t panels,
                       int64_t filter_channels, int64_t elements) {
    for (int64_t p = 0; p < kPositions; ++p) {
      for (int64_t q = 0; q < layout.panels(); ++q) {
        const float* lanes = input + layout.offset(p, q);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const float* keys =
              filters + panel * panel_floats(filter_channels) + p * position_stride(filter_channels);
          float* to =
              products_.data() + (p * kBlockKeys + panel * kKeyPanel) * stride_ + q * kLanePanel<Lanes>;
          const bool first_panel = panel == 0, last_lanes = q + 1 == layout.panels();
          const auto ahead = [&](int64_t e) __attribute__((always_inline)) {
            if (first_panel) {  // the next lanes, and the keys of the next position
              for (int r = 0; r < kTileRegisters; ++r)
                prefetch_second(lanes + (elements + e) * kLanePanel<Lanes> + r * Lanes::kLanes);
            }
            if (last_lanes) prefetch_second(keys + position_stride(filter_channels) + e * kKeyPanel);
          };
          const auto run = [&](auto columns) {
            constexpr int kColumns = columns;
            multiply<Element, kColumns>(
                lanes, keys, elements, [](int, int) { return Reg{}; },
                [&](const TileSums<Element, kColumns>& sums) {
#pragma GCC unroll 16
                  for (int j = 0; j < kKeyPanel; ++j) {
#pragma GCC unroll 16
                    for (int r = 0; r < kColumns; ++r)
                      Lanes::store(to + j * stride_ + r * Lanes::kLanes, sums[j][r]);
                  }
                },
                kColumns * Lanes::kLanes, kKeyPanel, ahead);
          };
          if (layout.width(q) == kLanePanel<Lanes>) {
            run(std::integral_constant<int, kTileRegisters>{});
          } else {
            run(std::integral_constant<int, 1>{});
          }
        }
      }
    }
  }

  // The output rows of `key` (of this block) of the band, to scratch plane `plane`.
  void transform(int64_t key, const Band& band, int64_t plane) {
    const int64_t columns = plane_.tile_columns();
    for (int64_t row = 0; row < band.rows; ++row) {
      for (int64_t first = 0; first < columns; first += Lanes::kLanes) {
        const float* from = products_.data() + key * stride_ + row * columns + first;
        Reg outputs[kTile][kTile];
        transform_both<kPatch, kTile, Reg>(
            [](const auto& m, auto& y) { transform_output(m, y); },
            [&](int i, int j) { return Lanes::load(from + (i * kPatch + j) * kBlockKeys * stride_); },
            [&](int i, int j, Reg value) { outputs[i][j] = value; });
        float* to = output(plane) + kTile * (row * pitch_ + first);
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) store_interleaved(outputs[i], to + i * pitch_);
      }
    }
  }

  // Scratch plane: row y of the band begins at y * pitch().
  float* output(int64_t plane) { return outputs_.data() + plane * plane_floats_; }
  int64_t pitch() const { return pitch_; }

 private:
  Plane plane_;
  int64_t stride_, pitch_;
  Workspace<float> products_, outputs_;
  int64_t plane_floats_;
};

// The bands of some images of one size, and the greatest of them.
struct Bands {
  std::vector<Band> all;
  int64_t most_rows = 0, most_lanes = 0;

  Bands(const Plane& plane, int64_t images) : all(cut_into_bands(plane, images)) {
    for (const Band& band : all) {
      most_rows = std::max(most_rows, band.rows);
      most_lanes = std::max(most_lanes, band.lanes());
    }
  }
  int64_t count() const { return static_cast<int64_t>(all.size()); }
};

// Convolves with `filters`, transformed before in `packed` or else per task here, and calls
// finish(block, band, first key, count of keys) for each block of keys of each band, with `planes` scratch
// planes.
template <class Finish>
void convolve(const Source& source, int64_t images, const Filters& filters, const float* packed,
              int64_t planes, const Finish& finish) {
  const Plane& plane = source.plane;
  const int64_t channels = source.channels();
  const Bands bands(plane, images);
  if (bands.count() == 0) return;
  const int64_t band_floats = kPositions * bands.most_lanes * channels;
  const int64_t group =
      std::clamp<int64_t>(kGroupFloats / std::max<int64_t>(1, band_floats), 1, bands.count());
  Workspace<float> input(group * band_floats);
  const int64_t blocks = (filters.keys + kBlockKeys - 1) / kBlockKeys;
  for (int64_t first = 0; first < bands.count(); first += group) {
    const int64_t count = std::min(group, bands.count() - first);
    parallel_tasks(count * channels, [&] {
      return
          [&, transform = BandTransform(plane, bands.most_rows, bands.most_lanes, 1),
           tiles = Workspace<float>(kPositions * (bands.most_lanes + Lanes::kLanes))](int64_t task) mutable {
            const Band& band = bands.all[first + task / channels];
            const int64_t c = task % channels;
            const BandLayout layout{band.lanes(), channels};
            transform(source.channel(band.image, c), band, tiles.data());
            float* to = input.data() + task / channels * band_floats;
            for (int64_t p = 0; p < kPositions; ++p) {
              const float* from = tiles.data() + p * transform.stride();
              for (int64_t q = 0; q < layout.panels(); ++q) {
                const int64_t width = layout.width(q);
                float* panel = to + layout.offset(p, q) + c * width;
                std::memcpy(panel, from + q * kLanePanel<Lanes>, width * sizeof(float));
              }
            }
          };
    });
    parallel_tasks(count * blocks, [&] {
      return [&, block = Block(plane, bands.most_rows, bands.most_lanes, planes),
              own = Workspace<float>(packed ? 0 : kBlockPanels * panel_floats(filters.channels))](
                 int64_t task) mutable {
        const Band& band = bands.all[first + task / blocks];
        const int64_t first_key = task % blocks * kBlockKeys, first_panel = task % blocks * kBlockPanels;
        const int64_t keys = std::min<int64_t>(kBlockKeys, filters.keys - first_key);
        const int64_t panels = (keys + kKeyPanel - 1) / kKeyPanel;
        const float* transformed = own.data();
        if (packed) {
          transformed = packed + first_panel * panel_floats(filters.channels);
        } else {
          for (int64_t i = 0; i < panels; ++i)
            transform_filters(filters, first_panel + i, own.data() + i * panel_floats(filters.channels));
        }
        const float* panel = input.data() + task / blocks * band_floats;
        block.multiply_panels(panel, {band.lanes(), channels}, transformed, panels, filters.channels,
                              channels);
        finish(block, band, first_key, keys);
      };
    });
  }
}

}  // namespace vosops::cpu::winograd
