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

#include "cpu/conv_lstm_amx.h"
#endif

namespace vosops::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;

#if defined(VOSOPS_AMX)

using namespace amx;

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
          kGateSide,
          kGateSide,
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

// The gates of 16 hidden channels and 16 pixels from their sums.
template <class S>
class Gates {
 public:
  Gates(const MaybeTensor& bias, float forget_bias, int64_t channels)
      : channels_(channels), forget_bias_(forget_bias), biases_(kGates * channels) {
    if (!bias) return;
    for (int64_t i = 0; i < kGates * channels; ++i)
      biases_[i] = widen(bias->const_data_ptr<S>()[i * bias->stride(0)]);
  }

  // Calls visit(channel, activated gates) for the channels of a panel.
  template <class Visit>
  void operator()(int64_t panel, const ConvSums& sums, int half, const Visit& visit) const {
    Reg gates[kGates][kRows];
    for (int g = 0; g < kGates; ++g) by_channel(sums.at(half, g), gates[g]);
    const int64_t begin = panel * kRows, count = std::min<int64_t>(kRows, channels_ - begin);
    for (int64_t c = 0; c < count; ++c) {
      const auto biased = [&](int g) { return gates[g][c] + biases_[g * channels_ + begin + c]; };
      visit(begin + c, CellGates<Lanes>::activate(biased(0), biased(1), biased(2), biased(3), forget_bias_));
    }
  }

 private:
  const int64_t channels_;
  const float forget_bias_;
  std::vector<float> biases_;
};

// All steps of a sequence (N,T,C,H,W). The last cell goes to `cells` (N,hidden,H,W); with `saved` also what
// the backward pass needs of every step (N,T,SavedBlocks).
template <class S>
class Sequence {
 public:
  Sequence(const Tensor& x, const Weights& weights, const uint16_t* packed, int pieces,
           const MaybeTensor& bias, const MaybeTensor& hidden, const MaybeTensor& cell, float forget_bias,
           Tensor& output, Tensor& cells, S* saved)
      : x_(x),
        weights_(weights),
        packed_(packed),
        pieces_(pieces),
        hidden_(hidden),
        output_(output),
        steps_(x.size(1)),
        channels_(output.size(2)),
        plane_{x.size(3), x.size(4), kGateSide / 2, kGateSide / 2},
        area_(plane_.height * plane_.width),
        blocks_(plane_, channels_),
        gates_(bias, forget_bias, channels_),
        first_(cell ? cell->const_data_ptr<S>() : nullptr),
        outputs_(output.mutable_data_ptr<S>()),
        cells_(cells.mutable_data_ptr<S>()),
        saved_(saved) {}

  // False if a number was out of range.
  bool run() {
    for (int64_t t = 0; t < steps_; ++t) {
      std::vector<ConvTerm> terms{{step_of(x_, t), weights_.of_input, packed_}};
      const uint16_t* of_hidden = packed_ + weights_.input_size;
      if (t > 0) {
        terms.push_back({step_of(output_, t - 1), weights_.of_hidden, of_hidden});
      } else if (hidden_) {
        terms.push_back({ConvMap::of(*hidden_), weights_.of_hidden, of_hidden});
      }
      const bool done = convolve(plane_, x_.size(0), terms, pieces_, kGates,
                                 [&](int64_t n, int64_t pixel, int64_t panel, const ConvSums& sums) {
                                   for (int half = 0; half < 2; ++half)
                                     saved_ ? update_saving(n, t, pixel + half * kRows, panel, sums, half)
                                            : update(n, t, pixel + half * kRows, panel, sums, half);
                                 });
      if (!done) return false;
    }
    return true;
  }

 private:
  // Updates the cell in place.
  void update(int64_t n, int64_t t, int64_t first, int64_t panel, const ConvSums& sums, int half) const {
    const StatePixels pixels(plane_, first);
    const S* before = t > 0 ? cells_ : first_;
    gates_(panel, sums, half, [&](int64_t channel, const CellGates<Lanes>& gates) {
      const int64_t at = (n * channels_ + channel) * area_;
      const Reg next = gates.update(before == nullptr ? Reg{} : pixels.load(before + at));
      pixels.store(cells_ + at, next);
      pixels.store(outputs_ + ((n * steps_ + t) * channels_ + channel) * area_, gates.hidden(next));
    });
  }

  void update_saving(int64_t n, int64_t t, int64_t first, int64_t panel, const ConvSums& sums,
                     int half) const {
    const StatePixels pixels(plane_, first);
    const int64_t block = blocks_.block(panel, first) * kSavedStates * kSums;
    S* saved = saved_ + (n * steps_ + t) * blocks_.size() + block;
    const S* before = saved - blocks_.size() + kGates * kSums;
    gates_(panel, sums, half, [&](int64_t channel, const CellGates<Lanes>& gates) {
      const int64_t at = (n * channels_ + channel) * area_, row = channel % kRows * kRows;
      Reg old{};
      if (t > 0) {
        old = load_some(before + row, 0xffffu);
      } else if (first_ != nullptr) {
        old = pixels.load(first_ + at);
      }
      const Reg next = gates.update(old);
      const Reg states[kSavedStates] = {gates.i, gates.f, gates.g, gates.o, next};
      for (int64_t i = 0; i < kSavedStates; ++i) store_some(saved + i * kSums + row, states[i], 0xffffu);
      if (t + 1 == steps_) pixels.store(cells_ + at, next);
      pixels.store(outputs_ + ((n * steps_ + t) * channels_ + channel) * area_, gates.hidden(next));
    });
    const int64_t rows = std::min<int64_t>(kRows, channels_ - panel * kRows);
    for (int64_t i = 0; rows < kRows && i < kSavedStates; ++i)
      std::fill_n(saved + i * kSums + rows * kRows, (kRows - rows) * kRows, S(0.f));
  }

  const Tensor& x_;
  const Weights& weights_;
  const uint16_t* packed_;
  const int pieces_;
  const MaybeTensor& hidden_;
  const Tensor& output_;
  const int64_t steps_, channels_;
  const ConvPlane plane_;
  const int64_t area_;
  const SavedBlocks blocks_;
  const Gates<S> gates_;
  const S* first_;  // the cell before the first step, or null
  S *outputs_, *cells_, *saved_;
};

template <class F>
void dispatch_half(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) return f(BFloat16{});
  f(Half{});
}

#endif

void check_arguments(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                     const MaybeTensor& hidden, const MaybeTensor& cell) {
  const int64_t channels = weight.size(0) / kGates;
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("weight", weight, {kGates * channels, x.size(2) + channels, 3, 3});
  check_dtype("weight", weight, x.scalar_type());
  if (bias) {
    check_shape("bias", *bias, {kGates * channels});
    check_dtype("bias", *bias, x.scalar_type());
  }
  for (const MaybeTensor* state : {&hidden, &cell}) {
    if (!*state) continue;
    check_shape("state", **state, {x.size(0), channels, x.size(3), x.size(4)});
    check_dtype("state", **state, x.scalar_type());
  }
}

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
  check_arguments(x, weight, bias, hidden, cell);
  const int64_t channels = weight.size(0) / kGates, h = x.size(3), w = x.size(4);
#if defined(VOSOPS_AMX)
  if (takes(x) && packed.numel() > 0) {
    const int pieces = pieces_for(x.scalar_type(), 0);
    const Weights weights(weight, pieces);  // their sizes only
    STD_TORCH_CHECK(packed.numel() == weights.input_size + weights.hidden_size,
                    "packed must be the weight's");
    Tensor output = torch::stable::new_empty(x, {x.size(0), x.size(1), channels, h, w});
    Tensor cells = torch::stable::new_empty(x, {x.size(0), channels, h, w});
    if (output.numel() == 0) return {output, cells};
    const MaybeTensor before = cell ? MaybeTensor(torch::stable::contiguous(*cell)) : std::nullopt;
    bool done = false;
    dispatch_half(x.scalar_type(), [&]<class S>(S) {
      done = Sequence<S>(x, weights, static_cast<const uint16_t*>(packed.const_data_ptr()), pieces, bias,
                         hidden, before, static_cast<float>(forget_bias), output, cells, nullptr)
                 .run();
    });
    ++(done ? by_engine : out_of_range);
    if (done) return {output, cells};
  }
#endif
  return {torch::stable::new_empty(x, {0, x.size(1), channels, h, w}),
          torch::stable::new_empty(x, {0, channels, h, w})};
}

// All hidden states, the last cell, and what the backward pass needs (N,T,SavedBlocks), which is padded to
// the same size where this library has no engine; tensors without entries where the engine cannot: then
// another way must be taken.
std::tuple<Tensor, Tensor, Tensor> conv_lstm_direct_states(const Tensor& x, const Tensor& weight,
                                                           const MaybeTensor& bias, const MaybeTensor& hidden,
                                                           const MaybeTensor& cell, double forget_bias) {
  check_arguments(x, weight, bias, hidden, cell);
  const int64_t channels = weight.size(0) / kGates, steps = x.size(1), h = x.size(3), w = x.size(4);
#if defined(VOSOPS_AMX)
  if (x.scalar_type() == ScalarType::BFloat16 && x.numel() > 0 && ready()) {
    const SavedBlocks blocks({h, w, kGateSide / 2, kGateSide / 2}, channels);
    Tensor output = torch::stable::new_empty(x, {x.size(0), steps, channels, h, w});
    Tensor cells = torch::stable::new_empty(x, {x.size(0), channels, h, w});
    Tensor saved = torch::stable::new_empty(x, {x.size(0), steps, blocks.size()});
    const Tensor dense = torch::stable::contiguous(weight);
    const Weights weights(dense, 1);
    Workspace<uint16_t> packed(weights.input_size + weights.hidden_size);
    pack_weights(weights.of_input, 0, weights.of_input.steps(), 1, packed.data());
    pack_weights(weights.of_hidden, 0, weights.of_hidden.steps(), 1, packed.data() + weights.input_size);
    const MaybeTensor before = cell ? MaybeTensor(torch::stable::contiguous(*cell)) : std::nullopt;
    Sequence<BFloat16>(x, weights, packed.data(), 1, bias, hidden, before, static_cast<float>(forget_bias),
                       output, cells, saved.mutable_data_ptr<BFloat16>())
        .run();
    ++by_engine;
    return {output, cells, saved};
  }
#endif
  return {torch::stable::new_empty(x, {0, steps, channels, h, w}),
          torch::stable::new_empty(x, {0, channels, h, w}), torch::stable::new_empty(x, {0, steps, 0})};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("conv_lstm_direct_pack", TORCH_BOX(&vosops::cpu::conv_lstm_direct_pack));
  m.impl("conv_lstm_direct_packed", TORCH_BOX(&vosops::cpu::conv_lstm_direct_packed));
  m.impl("conv_lstm_direct_states", TORCH_BOX(&vosops::cpu::conv_lstm_direct_states));
}
