// Sequences of the convolutional LSTM with 3x3 gates in bfloat16 and float16 by the matrix engine
// (amx_conv.h).
//
// A panel is the four gates of 16 hidden channels: where all products of 32 pixels are summed, the gates are
// transposed, activated, and the cell updated at once, in float32; the gates reach no memory beyond the
// first-level cache. A step reads [x; h] as two maps. Floor: 2 * 9 (C + hidden) 4 hidden operations a pixel,
// and some hundred instructions for 16 entries of the cell, a fifth of the time at 128 channels.
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
#include <vector>

#include "cpu/amx_conv.h"
#endif

namespace vosops::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;

#if defined(VOSOPS_AMX)

using namespace amx;

constexpr int64_t kSide = 3;

Counter by_engine("conv_lstm.steps");
Counter out_of_range("conv_lstm.range");

bool takes(const Tensor& x) {
  const bool half = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
  return half && ready();
}

// The weights of the columns from `first` on.
ConvWeight columns_of(const Tensor& weight, int64_t first, int64_t count) {
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  return {data + first * weight.stride(1) * weight.element_size(),
          weight.scalar_type(),
          weight.size(0),
          count,
          weight.stride(0),
          weight.stride(1),
          weight.stride(3),
          kSide,
          kSide,
          false,
          kGates};
}

struct Weights {
  ConvWeight of_input, of_hidden;
  int64_t input_size, hidden_size;

  Weights(const Tensor& weight, int pieces)
      : of_input(columns_of(weight, 0, weight.size(1) - weight.size(0) / kGates)),
        of_hidden(columns_of(weight, of_input.inputs, weight.size(0) / kGates)),
        input_size(weight_size(of_input, of_input.steps(), pieces)),
        hidden_size(weight_size(of_hidden, of_hidden.steps(), pieces)) {}
};

// A step (N,C,H,W) of frames (N,T,C,H,W).
ConvMap step_of(const Tensor& frames, int64_t step) {
  const char* data = static_cast<const char*>(frames.const_data_ptr());
  return {data + step * frames.stride(1) * frames.element_size(),
          frames.scalar_type(),
          frames.size(2),
          frames.stride(0),
          frames.stride(2),
          frames.stride(3),
          frames.stride(4),
          frames.size(3)};
}

// Updates the cell in place: entry (n, c, y, x) of dense states.
template <class S>
class Cell {
 public:
  Cell(const ConvPlane& plane, const MaybeTensor& bias, float forget_bias, int64_t channels)
      : plane_(plane), channels_(channels), forget_bias_(forget_bias), biases_(kGates * channels) {
    if (!bias) return;
    for (int64_t i = 0; i < kGates * channels; ++i)
      biases_[i] = widen(bias->const_data_ptr<S>()[i * bias->stride(0)]);
  }

  void operator()(int64_t first, int64_t panel, const ConvSums& sums, const S* before, S* cell,
                  S* hidden) const {
    const int64_t begin = panel * kRows, count = std::min<int64_t>(kRows, channels_ - begin);
    for (int i = 0; i < 2; ++i) {
      const ConvPixels pixels(plane_, first + i * kRows);
      Reg gates[kGates][kRows];
      for (int g = 0; g < kGates; ++g) by_channel(sums.at(i, g), gates[g]);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t channel = begin + c, plane = channel * plane_.height * plane_.width;
        const auto at = [&](const ConvPixels::Part& part) {
          return plane + part.row * plane_.width + part.x - part.lane;
        };
        Reg old{};
        if (before != nullptr) {
          for (const auto& part : pixels) old += load_some(before + at(part), part.lanes);
        }
        const auto biased = [&](int g) { return gates[g][c] + biases_[g * channels_ + channel]; };
        const auto active =
            CellGates<Lanes>::activate(biased(0), biased(1), biased(2), biased(3), forget_bias_);
        const Reg next = active.update(old), out = active.hidden(next);
        for (const auto& part : pixels) {
          store_some(cell + at(part), next, part.lanes);
          store_some(hidden + at(part), out, part.lanes);
        }
      }
    }
  }

 private:
  const ConvPlane plane_;
  const int64_t channels_;
  const float forget_bias_;
  std::vector<float> biases_;
};

template <class S>
bool run(const Tensor& x, const Weights& weights, const uint16_t* packed, int pieces, const MaybeTensor& bias,
         const MaybeTensor& hidden, const MaybeTensor& cell, float forget_bias, int64_t channels,
         Tensor& output, Tensor& cells) {
  const ConvPlane plane{x.size(3), x.size(4), kSide / 2, kSide / 2};
  const int64_t size = channels * plane.height * plane.width, steps = x.size(1);
  const Cell<S> update(plane, bias, forget_bias, channels);
  S* outputs = output.mutable_data_ptr<S>();
  S* next = cells.mutable_data_ptr<S>();
  const S* first = cell ? cell->const_data_ptr<S>() : nullptr;
  for (int64_t t = 0; t < steps; ++t) {
    std::vector<ConvTerm> terms{{step_of(x, t), weights.of_input, packed}};
    if (t > 0) {
      terms.push_back({step_of(output, t - 1), weights.of_hidden, packed + weights.input_size});
    } else if (hidden) {
      terms.push_back({ConvMap::of(*hidden), weights.of_hidden, packed + weights.input_size});
    }
    const S* before = t > 0 ? next : first;
    const bool done = convolve(plane, x.size(0), terms, pieces, kGates,
                               [&](int64_t n, int64_t pixel, int64_t panel, const ConvSums& sums) {
                                 update(pixel, panel, sums, before == nullptr ? nullptr : before + n * size,
                                        next + n * size, outputs + (n * steps + t) * size);
                               });
    if (!done) return false;
  }
  return true;
}

template <class F>
void dispatch_half(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) return f(BFloat16{});
  f(Half{});
}

#endif

// The weights in tiles; nothing where the engine is not to be used for them.
Tensor conv_lstm_direct_pack(const Tensor& weight) {
  check_shape("weight", weight, {kAnySize, kAnySize, 3, 3});
#if defined(VOSOPS_AMX)
  if (takes(weight)) {
    const Tensor dense = torch::stable::contiguous(weight);
    const int pieces = pieces_for(weight.scalar_type(), 0);
    const Weights weights(dense, pieces);
    Tensor packed =
        torch::stable::new_empty(weight, {weights.input_size + weights.hidden_size}, ScalarType::BFloat16);
    uint16_t* to = static_cast<uint16_t*>(packed.mutable_data_ptr());
    if (pack_weights(weights.of_input, 0, weights.of_input.steps(), pieces, to) &&
        pack_weights(weights.of_hidden, 0, weights.of_hidden.steps(), pieces, to + weights.input_size))
      return packed;
    ++out_of_range;
  }
#endif
  return torch::stable::new_empty(weight, {0}, ScalarType::BFloat16);
}

// All hidden states and the last cell; tensors without entries where the engine cannot: then another way must
// be taken.
std::tuple<Tensor, Tensor> conv_lstm_direct_packed(const Tensor& x, const Tensor& weight,
                                                   const Tensor& packed, const MaybeTensor& bias,
                                                   const MaybeTensor& hidden, const MaybeTensor& cell,
                                                   double forget_bias) {
  const int64_t channels = weight.size(0) / kGates;
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("weight", weight, {kAnySize, x.size(2) + channels, 3, 3});
  check_dtype("weight", weight, x.scalar_type());
  const int64_t n = x.size(0), h = x.size(3), w = x.size(4);
  if (bias) {
    check_shape("bias", *bias, {kGates * channels});
    check_dtype("bias", *bias, x.scalar_type());
  }
  for (const MaybeTensor* state : {&hidden, &cell}) {
    if (!*state) continue;
    check_shape("state", **state, {n, channels, h, w});
    check_dtype("state", **state, x.scalar_type());
  }
#if defined(VOSOPS_AMX)
  if (takes(x) && packed.numel() > 0) {
    const int pieces = pieces_for(x.scalar_type(), 0);
    const Weights weights(weight, pieces);  // their sizes only
    STD_TORCH_CHECK(packed.numel() == weights.input_size + weights.hidden_size,
                    "packed must be the weight's");
    Tensor output = torch::stable::new_empty(x, {n, x.size(1), channels, h, w});
    Tensor cells = torch::stable::new_empty(x, {n, channels, h, w});
    if (output.numel() == 0) return {output, cells};
    const MaybeTensor before = cell ? MaybeTensor(torch::stable::contiguous(*cell)) : std::nullopt;
    bool done = false;
    dispatch_half(x.scalar_type(), [&]<class S>(S) {
      done = run<S>(x, weights, static_cast<const uint16_t*>(packed.const_data_ptr()), pieces, bias, hidden,
                    before, static_cast<float>(forget_bias), channels, output, cells);
    });
    ++(done ? by_engine : out_of_range);
    if (done) return {output, cells};
  }
#endif
  return {torch::stable::new_empty(x, {0, x.size(1), channels, h, w}),
          torch::stable::new_empty(x, {0, channels, h, w})};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("conv_lstm_direct_pack", TORCH_BOX(&vosops::cpu::conv_lstm_direct_pack));
  m.impl("conv_lstm_direct_packed", TORCH_BOX(&vosops::cpu::conv_lstm_direct_packed));
}
