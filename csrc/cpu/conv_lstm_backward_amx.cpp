// The backward pass of sequences of the convolutional LSTM with 3x3 gates in bfloat16 by the matrix engine
// (amx_conv.h), from the saved gates, cells and hidden states.
//
// Steps are taken from the last to the first. The gradients of a step's gates are convolved with the turned
// weights: the sums for x's channels are its gradient, those for the hidden state's are turned at once, in
// float32, into the gradients of the gates of the step before. Neither the gradient of a hidden state nor
// that of the gates in float32 reaches memory. Gates' gradients are kept in bfloat16 for some steps, which
// then enter the weights' gradient at once.
//
// Floor: 4 * 9 (C + hidden) 4 hidden operations of the engine a pixel. Bytes of an entry of the cell: 18 read
// and 12 written, besides the convolutions'.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "cpu/conv_lstm.h"
#include "cpu/strided.h"

#if defined(VOSOPS_AMX)
#include "cpu/conv_lstm_amx.h"
#endif

namespace vosops::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

#if defined(VOSOPS_AMX)

using namespace amx;

constexpr int64_t kPixelsTogether = 16384;  // of the steps that enter the weights' gradient at once

Counter by_engine("conv_lstm.gradients");

// The tensors of a call in dense memory.
struct Arguments {
  Tensor grad_output, grad_cell, x, weight, output, saved;
  MaybeTensor hidden, cell;
};

const BFloat16* of(const Tensor& tensor) {
  return tensor.const_data_ptr<BFloat16>();
}

class Backward {
 public:
  Backward(const Arguments& given, Gradients& results)
      : given_(given),
        images_(given.x.size(0)),
        steps_(given.x.size(1)),
        inputs_(given.x.size(2)),
        hidden_(given.output.size(2)),
        plane_{given.x.size(3), given.x.size(4), kGateSide / 2, kGateSide / 2},
        area_(plane_.height * plane_.width),
        blocks_(plane_, hidden_),
        together_(std::clamp<int64_t>(kPixelsTogether / (images_ * area_), 1, steps_)),
        of_input_(turned(0, inputs_)),
        of_hidden_(turned(inputs_, hidden_)),
        packed_(input_size() + weight_size(of_hidden_, of_hidden_.steps(), 1)),
        grad_gates_(together_ * images_ * kGates * hidden_ * area_),
        grad_cell_(images_ * blocks_.blocks() * kSums),
        grad_bias_(kGates * hidden_),
        of_weight_({plane_.height, plane_.width, kGates * hidden_, inputs_ + hidden_, kGateSide, kGateSide}),
        to_x_(std::get<0>(results).mutable_data_ptr<BFloat16>()),
        to_weight_(std::get<1>(results).mutable_data_ptr<BFloat16>()),
        to_bias_(std::get<2>(results).mutable_data_ptr<BFloat16>()),
        to_hidden_(std::get<3>(results).mutable_data_ptr<BFloat16>()),
        to_cell_(std::get<4>(results).mutable_data_ptr<BFloat16>()) {}

  void run() {
    pack_weights(of_input_, 0, of_input_.steps(), 1, packed_.data());
    pack_weights(of_hidden_, 0, of_hidden_.steps(), 1, packed_.data() + input_size());
    start();
    for (int64_t last = steps_; last > 0; last -= std::min(last, together_)) {
      const int64_t first = std::max<int64_t>(0, last - together_);
      for (int64_t t = last - 1; t > first; --t) convolve_back(t);
      add_weights(first, last);
      add_bias(first, last);
      // This writes gradients of the step before the group, perhaps over those of its own step, whose map is
      // packed by then.
      convolve_back(first);
    }
    for (int64_t i = 0; i < kGates * hidden_; ++i) store_some(to_bias_ + i, Lanes::set1(grad_bias_[i]), 1);
  }

 private:
  // The weights from the gates to `count` columns of [x; h].
  ConvWeight turned(int64_t first, int64_t count) const {
    constexpr int64_t kTaps = kGateSide * kGateSide;
    return {of(given_.weight) + first * kTaps,
            ScalarType::BFloat16,
            count,
            kGates * hidden_,
            kTaps,
            (inputs_ + hidden_) * kTaps,
            1,
            kGateSide,
            kGateSide,
            true};
  }
  int64_t input_size() const { return weight_size(of_input_, of_input_.steps(), 1); }

  // Where the gradients of the gates (channel 0) of an image and step are.
  BFloat16* gates_at(int64_t n, int64_t t) {
    const int64_t place = together_ - 1 - (steps_ - 1 - t) % together_;
    return grad_gates_.data() + (place * images_ + n) * kGates * hidden_ * area_;
  }
  int64_t state_at(int64_t n, int64_t t, int64_t channel) const {
    return ((n * steps_ + t) * hidden_ + channel) * area_;
  }

  // Of 16 channels and 16 pixels of step t: the gradients of the gates and of the cell before, from those of
  // the hidden state by the next step; null: there is no next step.
  void step_back(int64_t n, int64_t t, int64_t panel, int64_t first, const StatePixels& pixels,
                 const Reg* grad_hidden) {
    const int64_t block = blocks_.block(panel, first), next_gate = hidden_ * area_;
    const BFloat16* saved =
        of(given_.saved) + (n * steps_ + t) * blocks_.size() + block * kSavedStates * kSums;
    const BFloat16* cell_before = saved - blocks_.size() + kGates * kSums;
    float* carried = grad_cell_.data() + (n * blocks_.blocks() + block) * kSums;
    for (int64_t c = 0; c < std::min<int64_t>(kRows, hidden_ - panel * kRows); ++c) {
      const int64_t channel = panel * kRows + c, in_image = (n * hidden_ + channel) * area_;
      const auto state = [&](int i) { return load_some(saved + i * kSums + c * kRows, 0xffffu); };
      const CellGates<Lanes> gates{state(0), state(1), state(2), state(3)};
      Reg before{}, of_hidden = pixels.load(of(given_.grad_output) + state_at(n, t, channel)), of_cell;
      if (t > 0) {
        before = load_some(cell_before + c * kRows, 0xffffu);
      } else if (given_.cell) {
        before = pixels.load(of(*given_.cell) + in_image);
      }
      if (grad_hidden != nullptr) {
        of_hidden += grad_hidden[c];
        of_cell = Lanes::load(carried + c * kRows);
      } else {
        of_cell = pixels.load(of(given_.grad_cell) + in_image);
      }
      const auto grads = CellGrads<Lanes>::of(gates, before, state(kGates), of_hidden, of_cell);
      BFloat16* to = gates_at(n, t) + channel * area_;
      pixels.store(to, grads.i);
      pixels.store(to + next_gate, grads.f);
      pixels.store(to + 2 * next_gate, grads.g);
      pixels.store(to + 3 * next_gate, grads.o);
      if (t > 0) {
        Lanes::store(carried + c * kRows, grads.cell);
      } else {
        pixels.store(to_cell_ + in_image, grads.cell);
      }
    }
  }

  // The last step.
  void start() {
    parallel_tasks(images_ * blocks_.panels(), [&] {
      return [&, region = Region()](int64_t task) {
        for (int64_t first = 0; first < plane_.span(); first += kRows)
          step_back(task / blocks_.panels(), steps_ - 1, task % blocks_.panels(), first,
                    StatePixels(plane_, first), nullptr);
      };
    });
  }

  // The gradients of x at step t and, by that of the hidden state before it, of the gates of step t - 1.
  void convolve_back(int64_t t) {
    // Tiles of columns of x, then of h, unless nobody asks for the latter.
    ConvWeight columns = of_input_;
    const int64_t input_tiles = of_input_.tiles();
    columns.outputs = input_tiles * kRows + (t > 0 || given_.hidden ? hidden_ : 0);
    const ConvMap map{gates_at(0, t),
                      ScalarType::BFloat16,
                      kGates * hidden_,
                      kGates * hidden_ * area_,
                      area_,
                      plane_.width,
                      1,
                      plane_.height};
    convolve(plane_, images_, {{map, columns, packed_.data()}}, 1, 2,
             [&](int64_t n, int64_t pixel, int64_t pair, const ConvSums& sums) {
               for (int i = 0; i < 2; ++i) {
                 const StatePixels pixels(plane_, pixel + i * kRows);
                 for (int j = 0; j < 2; ++j) {
                   const int64_t tile = 2 * pair + j;
                   Reg channels[kRows];
                   by_channel(sums.at(i, j), channels);
                   if (tile < input_tiles) {
                     store(to_x_ + (n * steps_ + t) * inputs_ * area_, tile, inputs_, pixels, channels);
                   } else if (t == 0) {
                     store(to_hidden_ + n * hidden_ * area_, tile - input_tiles, hidden_, pixels, channels);
                   } else {
                     step_back(n, t - 1, tile - input_tiles, pixel + i * kRows, pixels, channels);
                   }
                 }
               }
             });
  }
  void store(BFloat16* planes, int64_t panel, int64_t channels, const StatePixels& pixels,
             const Reg* values) const {
    for (int64_t c = 0; c < std::min<int64_t>(kRows, channels - panel * kRows); ++c)
      pixels.store(planes + (panel * kRows + c) * area_, values[c]);
  }

  // The channel's plane of [x; h] that the gates of step t read, null where it is zero.
  const BFloat16* input_plane(int64_t n, int64_t t, int64_t column) const {
    if (column < inputs_) return of(given_.x) + ((n * steps_ + t) * inputs_ + column) * area_;
    const int64_t channel = column - inputs_;
    if (t > 0) return of(given_.output) + state_at(n, t - 1, channel);
    return given_.hidden ? of(*given_.hidden) + (n * hidden_ + channel) * area_ : nullptr;
  }

  // Adds the shares of steps [first, last).
  void add_weights(int64_t first, int64_t last) {
    const auto bits = [](const BFloat16* plane) { return reinterpret_cast<const uint16_t*>(plane); };
    of_weight_.add(
        (last - first) * images_,
        [&](int64_t i, int64_t c) { return bits(input_plane(i % images_, first + i / images_, c)); },
        [&](int64_t i, int64_t m) { return bits(gates_at(i % images_, first + i / images_) + m * area_); },
        last == steps_, first == 0 ? to_weight_ : nullptr);
  }
  void add_bias(int64_t first, int64_t last) {
    parallel_tasks(kGates * hidden_, [&] {
      return [&](int64_t row) {
        Reg sum = {};
        for (int64_t t = first; t < last; ++t) {
          for (int64_t n = 0; n < images_; ++n) {
            const BFloat16* plane = gates_at(n, t) + row * area_;
            for (int64_t i = 0; i < area_; i += kRows)
              sum += load_some(plane + i, area_ - i >= kRows ? 0xffffu : (1u << (area_ - i)) - 1);
          }
        }
        float total = last == steps_ ? 0.f : grad_bias_[row];
        for (int i = 0; i < kRows; ++i) total += sum[i];
        grad_bias_[row] = total;
      };
    });
  }

  const Arguments& given_;
  const int64_t images_, steps_, inputs_, hidden_;
  const ConvPlane plane_;
  const int64_t area_;
  const SavedBlocks blocks_;
  const int64_t together_;                 // steps whose gates' gradients are kept
  const ConvWeight of_input_, of_hidden_;  // turned: from gates to x and to h
  Workspace<uint16_t> packed_;
  Workspace<BFloat16> grad_gates_;  // (step, image, channel) of planes
  Workspace<float> grad_cell_;      // (image, block)
  Workspace<float> grad_bias_;
  ConvWeightGradient of_weight_;
  BFloat16 *to_x_, *to_weight_, *to_bias_, *to_hidden_, *to_cell_;
};

#endif

// Gradients of x, weight, bias, hidden and cell; tensors without entries where the engine cannot: then
// another way must be taken. That of `hidden` is zero where there is none.
Gradients conv_lstm_direct_gradients(const Tensor& grad_output, const Tensor& grad_cell, const Tensor& x,
                                     const Tensor& weight, const MaybeTensor& hidden, const MaybeTensor& cell,
                                     const Tensor& output, const Tensor& saved) {
  const int64_t channels = weight.size(0) / kGates, n = x.size(0), steps = x.size(1);
  const int64_t h = x.size(3), w = x.size(4);
  check_shape("weight", weight, {kGates * channels, x.size(2) + channels, 3, 3});
  check_shape("grad_output", grad_output, {n, steps, channels, h, w});
  check_shape("output", output, {n, steps, channels, h, w});
  check_shape("grad_cell", grad_cell, {n, channels, h, w});
  for (const Tensor* each : {&weight, &grad_output, &output, &grad_cell, &saved})
    check_dtype("each tensor", *each, x.scalar_type());
  for (const MaybeTensor* state : {&hidden, &cell}) {
    if (!*state) continue;
    check_shape("state", **state, {n, channels, h, w});
    check_dtype("state", **state, x.scalar_type());
  }
#if defined(VOSOPS_AMX)
  if (x.scalar_type() == ScalarType::BFloat16 && x.numel() > 0 && ready()) {
    const SavedBlocks blocks({h, w, kGateSide / 2, kGateSide / 2}, channels);
    check_shape("saved", saved, {n, steps, blocks.size()});
    const auto dense = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
    const auto dense_state = [&](const MaybeTensor& state) {
      return state ? MaybeTensor(dense(*state)) : std::nullopt;
    };
    const Arguments given{dense(grad_output),  dense(grad_cell), dense(x),
                          dense(weight),       dense(output),    dense(saved),
                          dense_state(hidden), dense_state(cell)};
    const auto states = [&](bool wanted) {
      return wanted ? torch::stable::new_empty(x, {n, channels, h, w})
                    : torch::stable::new_zeros(x, {n, channels, h, w});
    };
    Gradients results{torch::stable::new_empty(x, {n, steps, x.size(2), h, w}),
                      torch::stable::new_empty(x, {weight.size(0), weight.size(1), 3, 3}),
                      torch::stable::new_empty(x, {weight.size(0)}), states(hidden.has_value()),
                      states(true)};
    Backward(given, results).run();
    ++by_engine;
    return results;
  }
#endif
  const Tensor none = torch::stable::new_empty(x, {0, steps, x.size(2), h, w});
  return {none, none, none, none, none};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("conv_lstm_direct_gradients", TORCH_BOX(&vosops::cpu::conv_lstm_direct_gradients));
}
