// The gradient of a line convolution's weights on the CPU: for every output channel m, input channel c and
// tap the sum over all pixels of grad[m] times x[c] that many pixels further.
//
// Winograd arithmetic in float32 with the roles exchanged (winograd_line.h): tiles of kOut gradients and the
// kPoints pixels that they meet give kTaps sums from kPoints products. Tiles are summed in blocks of at most
// kBlockTiles, and taken in rounds whose gradients, transformed, fit into kRoundFloats:
//
//   grads    [point][panel][tile][kLanePanel]   a round's gradients, transformed; lanes are output channels
//   values   [point][tile][kBlock]              its pixels, in a block of kBlock input channels
//   products [point][channel][kLanePanel]       the sums of one panel with one block
//
// A task owns a block of input channels and some panels of output channels. It transforms its pixels, and
// multiplies them panel by panel and point by point in register tiles of kKeyPanel input by kLanePanel output
// channels; then it transforms the products to taps, and transposes these to rows of weights, the only thing
// that is written to memory: no copy of the weights is made, of any layout. A point's values of one tile
// block and a panel's gradients (18 + 12 KB) fill the first-level cache, products and all values the second.
// The multiplications are 2 / 7 of the plain sum's for 7 taps in tiles of 6. No result depends on the number
// of threads.
#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "common/checks.h"
#include "cpu/global_conv.h"
#include "cpu/global_conv_amx.h"

namespace vosops::cpu {
namespace {

using namespace global_conv;

constexpr int64_t kBlock = 48;  // input channels: whole registers and whole key panels on any processor
static_assert(kBlock % kLanes == 0 && kBlock % kKeyPanel == 0 && kBlock <= kBlockChannels);
constexpr int64_t kSumTiles = 96;          // summed in registers at a time
constexpr int64_t kRoundFloats = 1 << 20;  // of transformed gradients, that they stay in a cache
constexpr int64_t kTasksPerThread = 4;     // at least, where there are panels enough

template <class W, class S>
class WeightGradient {
 public:
  WeightGradient(const Lines& lines, PixelMap<const float> x, int64_t inputs, PixelMap<const float> grad,
                 int64_t outputs, S* weight)
      : tiles_(lines),
        x_(x),
        grad_(grad),
        inputs_(inputs),
        outputs_(outputs),
        weight_(weight),
        panels_(ceil_div(outputs, kPanel)),
        rounds_(ceil_div(tiles_.count, most_tiles())),
        round_(ceil_div(tiles_.count, rounds_)),
        grads_(W::kPoints * panels_ * round_ * kPanel) {
    if constexpr (!std::is_same_v<S, float>) {
      if (rounds_ > 1) totals_.emplace(outputs * inputs * W::kTaps);
    }
  }

  void run() {
    for (int64_t round = 0; round < rounds_; ++round) {
      const int64_t first = round * round_, count = std::min(round_, tiles_.count - first);
      transform_grads(first, count);
      multiply_blocks(first, count);
    }
  }

 private:
  int64_t most_tiles() const { return std::max(kSumTiles, kRoundFloats / (W::kPoints * panels_ * kPanel)); }
  float* grads(int point, int64_t panel) {
    return grads_.data() + (point * panels_ + panel) * round_ * kPanel;
  }

  void transform_grads(int64_t first, int64_t count) {
    parallel_tasks(panels_, [&] {
      return [&](int64_t panel) {
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
            const int64_t channel = panel * kPanel + lane;
            const float* sources[W::kOut];
            tiles_.pixels(first + t, 0, grad_, channel, kZeros, sources);
            typename V::Reg inputs[W::kOut] = {}, points[W::kPoints];
            if (channel < outputs_) {
#pragma GCC unroll 16
              for (int i = 0; i < W::kOut; ++i) inputs[i] = V::load(sources[i]);
            }
            W::template transform_grad<V>(inputs, points);
#pragma GCC unroll 16
            for (int p = 0; p < W::kPoints; ++p) V::store(grads(p, panel) + t * kPanel + lane, points[p]);
          }
        }
      };
    });
  }

  void multiply_blocks(int64_t first, int64_t count) {
    const int64_t blocks = ceil_div(inputs_, kBlock);
    const int64_t wanted = kTasksPerThread * static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t groups = std::min(panels_, ceil_div(wanted, blocks));
    const int64_t group = ceil_div(panels_, groups);
    parallel_tasks(blocks * groups, [&] {
      return [&, values = Workspace<float>(W::kPoints * count * kBlock),
              products = Workspace<float>(W::kPoints * kBlock * kPanel),
              taps = Workspace<float>(kBlock * W::kTaps * kPanel),
              rows = Workspace<float>(kBlock * W::kTaps * kPanel)](int64_t task) mutable {
        const int64_t channel = task / groups * kBlock, channels = std::min(kBlock, inputs_ - channel);
        const int64_t begin = task % groups * group, end = std::min(begin + group, panels_);
        if (begin >= end) return;
        transform_values(first, count, channel, channels, values.data());
        for (int64_t panel = begin; panel < end; ++panel) {
          multiply_panel(panel, count, channels, values.data(), products.data());
          transform_products(products.data(), channels, taps.data());
          write(panel, channel, channels, first, count, taps.data(), rows.data());
        }
      };
    });
  }

  // The values of a round's tiles in a block of channels, zeros around the map.
  void transform_values(int64_t first, int64_t count, int64_t channel, int64_t channels, float* values) {
    for (int64_t t = 0; t < count; ++t) {
      const float* sources[W::kPoints];
      tiles_.pixels(first + t, W::kTaps / 2, x_, channel, kZeros, sources);
      for (int64_t c = 0; c < channels; c += kLanes) {
        typename V::Reg inputs[W::kPoints], points[W::kPoints];
#pragma GCC unroll 16
        for (int j = 0; j < W::kPoints; ++j) inputs[j] = V::load(sources[j] + c);
        W::template transform_input<V>(inputs, points);
#pragma GCC unroll 16
        for (int p = 0; p < W::kPoints; ++p) V::store(values + (p * count + t) * kBlock + c, points[p]);
      }
    }
  }

  void multiply_panel(int64_t panel, int64_t count, int64_t channels, const float* values, float* products) {
    const int64_t step = ceil_div(count, ceil_div(count, kSumTiles));
    for (int p = 0; p < W::kPoints; ++p) {
      for (int64_t t = 0; t < count; t += step) {
        const float* lanes = grads(p, panel) + t * kPanel;
        for (int64_t c = 0; c < channels; c += kKeyPanel)
          multiply_tile(lanes, values + (p * count + t) * kBlock + c, std::min(step, count - t), t > 0,
                        products + (p * kBlock + c) * kPanel);
      }
    }
  }

  // products (kKeyPanel,kPanel) = or += those of `tiles` tiles. Every block's sum begins at zero.
  static void multiply_tile(const float* lanes, const float* keys, int64_t tiles, bool add, float* products) {
    multiply<Element>(
        lanes, keys, tiles, [](int, int) { return typename V::Reg{}; },
        [&](const TileSums<Element>& sums) {
#pragma GCC unroll 16
          for (int j = 0; j < kKeyPanel; ++j) {
#pragma GCC unroll 16
            for (int r = 0; r < kTileRegisters; ++r) {
              float* to = products + j * kPanel + r * kLanes;
              V::store(to, add ? V::load(to) + sums[j][r] : sums[j][r]);
            }
          }
        },
        kPanel, kBlock);
  }

  // taps (channel,tap,kPanel)
  static void transform_products(const float* products, int64_t channels, float* taps) {
    for (int64_t i = 0; i < channels * kPanel; i += kLanes) {
      typename V::Reg points[W::kPoints], sums[W::kTaps];
#pragma GCC unroll 16
      for (int p = 0; p < W::kPoints; ++p) points[p] = V::load(products + p * kBlock * kPanel + i);
      W::template transform_products<V>(points, sums);
      float* to = taps + i / kPanel * W::kTaps * kPanel + i % kPanel;
#pragma GCC unroll 16
      for (int tap = 0; tap < W::kTaps; ++tap) V::store(to + tap * kPanel, sums[tap]);
    }
  }

  // Writes a panel's weights of a block of channels, or adds them to those of earlier rounds.
  void write(int64_t panel, int64_t channel, int64_t channels, int64_t first, int64_t count,
             const float* taps, float* rows) {
    constexpr bool kFloat = std::is_same_v<S, float>;
    const int64_t row = inputs_ * W::kTaps, length = channels * W::kTaps;
    const int64_t lanes = std::min<int64_t>(kPanel, outputs_ - panel * kPanel);
    const int64_t at = panel * kPanel * row + channel * W::kTaps;
    const bool last = first + count == tiles_.count;
    if constexpr (kFloat) {
      if (first == 0) return transpose(taps, kPanel, length, lanes, weight_ + at, row, length);
    }
    transpose(taps, kPanel, length, lanes, rows, length, length);
    for (int64_t m = 0; m < lanes; ++m) {
      float* sums = rows + m * length;
      const int64_t to = at + m * row;
      if constexpr (kFloat) {
        add_row(sums, length, weight_ + to);
      } else {
        if (first > 0) add_row(totals_->data() + to, length, sums);
        if (last) {
          narrow_row(sums, length, weight_ + to);
        } else {
          std::copy_n(sums, length, totals_->data() + to);
        }
      }
    }
  }

  static void add_row(const float* __restrict from, int64_t count, float* __restrict to) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }

  const Tiles<W> tiles_;
  const PixelMap<const float> x_, grad_;
  const int64_t inputs_, outputs_;
  S* const weight_;
  const int64_t panels_, rounds_, round_;
  Workspace<float> grads_;
  std::optional<Workspace<float>> totals_;  // of the rounds so far, where the weights are too short to add to
};

Tensor weight_gradient(const Tensor& x, const Tensor& grad, int64_t kernel_h, int64_t kernel_w,
                       const std::string& precision) {
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("grad", grad, {x.size(0), kAnySize, x.size(2), x.size(3)});
  check_dtype("grad", grad, x.scalar_type());
  const int64_t outputs = grad.size(1), inputs = x.size(1);
  const std::array<int64_t, 4> sizes{outputs, inputs, kernel_h, kernel_w};
  const IntHeaderOnlyArrayRef shape(sizes.data(), 4);
  if (x.numel() == 0 || grad.numel() == 0) return torch::stable::new_zeros(x, shape);
  Tensor weight = torch::stable::new_empty(x, shape);
  const Lines lines{x.size(0), x.size(2), x.size(3), kernel_h == 1};
  const int64_t taps = std::max(kernel_h, kernel_w);
  if (precision == "winograd" && amx_weights(x, grad, weight)) return weight;
  if (precision != "winograd" || x.scalar_type() == ScalarType::Double ||
      !winograd_helps(outputs, inputs, taps, lines.length()))
    return torch::stable::contiguous(conv_backward(grad, x, weight, kOfWeight));
  const ChannelsLastMap x_map(x), grad_map(grad);
  dispatch_low(x.scalar_type(), [&]<class S>(S) {
    cheapest_winograd(taps, lines.length(), [&]<class W>(W) {
      WeightGradient<W, S>(lines, x_map.map(), inputs, grad_map.map(), outputs, weight.mutable_data_ptr<S>())
          .run();
    });
  });
  return weight;
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("global_conv_weight", TORCH_BOX(&vosops::cpu::weight_gradient));
}
