// Line convolutions of bfloat16 and float16 by the matrix engine: direct sums of their pieces (one, or two),
// the two of a merge added in the tiles. Float32 stays with Winograd arithmetic: six products a sum take 1 /
// 6 of 2250 GFLOP/s, F(6, 7) asks for 2 / 7 of the multiplications at 174 GFLOP/s, that is 1.6 times as much,
// and three pieces take longer to pack (4096x15x27: 78 ms against 48, 256x60x107: 108 against 112; one thread
// of an Xeon of Emerald Rapids' kind, `vosops bench global_conv`).
//
// Taps along the width ask for zeros beside every row, 3 of 30 pixels in a map 27 wide. Weights are packed
// anew in each call, from memory: 29 MB of bfloat16 in the deepest case, a third of its time.
#include "cpu/global_conv_amx.h"

#if defined(VOSOPS_AMX)
#include "cpu/amx_conv.h"
#endif

namespace vosops::cpu::global_conv {

#if defined(VOSOPS_AMX)

namespace {

amx::Counter by_engine("global_conv.lines");
amx::Counter out_of_range("global_conv.range");

bool takes(const LineTerm& term) {
  const ScalarType dtype = term.map.scalar_type();
  return (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) &&
         std::min(term.weight.size(0), term.weight.size(1)) >= kLeastChannels;
}

amx::ConvWeight weight_of(const LineTerm& term) {
  const Tensor& w = term.weight;
  const int to = term.input_gradient ? 1 : 0, from = 1 - to, tap = w.size(2) == 1 ? 3 : 2;
  return {w.const_data_ptr(), w.scalar_type(), w.size(to), w.size(from), w.stride(to),
          w.stride(from),     w.stride(tap),   w.size(2),  w.size(3),    term.input_gradient};
}

template <class S>
class Writer {
 public:
  Writer(const amx::ConvPlane& plane, const MaybeTensor& bias, Tensor& out)
      : plane_(plane),
        data_(out.mutable_data_ptr<S>()),
        channels_(out.size(1)),
        image_stride_(out.stride(0)),
        channel_stride_(out.stride(1)),
        row_stride_(out.stride(2)),
        column_stride_(out.stride(3)),
        bias_((channels_ + amx::kGroup) / amx::kGroup * amx::kGroup) {
    for (int64_t i = 0; bias.has_value() && i < channels_; ++i)
      bias_[i] = widen(bias->const_data_ptr<S>()[i * bias->stride(0)]);
  }

  void operator()(int64_t image, int64_t first, int64_t panel, const amx::ConvSums& sums) const {
    for (int i = 0; i < 2; ++i) {
      const amx::ConvPixels pixels(plane_, first + i * amx::kRows);
      for (int j = 0; j < 2; ++j) {
        const int64_t channel = panel * amx::kGroup + j * amx::kRows;
        const int64_t count = std::min<int64_t>(amx::kRows, channels_ - channel);
        if (count <= 0) continue;
        S* to = data_ + image * image_stride_ + channel * channel_stride_;
        if (channel_stride_ == 1) {
          write_pixels(pixels, sums.at(i, j), channel, count, to);
        } else {
          write_planes(pixels, sums.at(i, j), channel, count, to);
        }
      }
    }
  }

 private:
  void write_pixels(const amx::ConvPixels& pixels, const float* sums, int64_t channel, int64_t count,
                    S* to) const {
    const uint32_t lanes = (1u << count) - 1;
    const amx::Reg bias = amx::Lanes::load(bias_.data() + channel);
    for (const auto& part : pixels) {
      for (int64_t k = 0; k < part.count; ++k) {
        const amx::Reg value = amx::Lanes::load(sums + (part.lane + k) * amx::kRows) + bias;
        amx::store_some(to + part.row * row_stride_ + (part.x + k) * column_stride_, value, lanes);
      }
    }
  }
  // Columns are adjacent.
  void write_planes(const amx::ConvPixels& pixels, const float* sums, int64_t channel, int64_t count,
                    S* to) const {
    amx::Reg values[amx::kRows];
    amx::by_channel(sums, values);
    for (int64_t c = 0; c < count; ++c) {
      const amx::Reg value = values[c] + bias_[channel + c];
      for (const auto& part : pixels)
        amx::store_some(to + c * channel_stride_ + part.row * row_stride_ + part.x - part.lane, value,
                        part.lanes);
    }
  }

  const amx::ConvPlane plane_;
  S* const data_;
  const int64_t channels_, image_stride_, channel_stride_, row_stride_, column_stride_;
  std::vector<float> bias_;
};

}  // namespace

bool amx_lines(const std::vector<LineTerm>& terms, const MaybeTensor& bias, Tensor& out) {
  amx::ConvPlane plane{out.size(2), out.size(3), 0, 0};
  std::vector<amx::ConvTerm> products;
  for (const LineTerm& term : terms) {
    if (term.weight.numel() == 0) continue;
    if (!takes(term)) return false;
    plane.reach_y = std::max(plane.reach_y, term.weight.size(2) / 2);
    plane.reach_x = std::max(plane.reach_x, term.weight.size(3) / 2);
    products.push_back({amx::ConvMap::of(term.map), weight_of(term)});
  }
  if (products.empty() || !(out.stride(1) == 1 || out.stride(3) == 1) || !amx::ready()) return false;
  const int pieces = amx::pieces_for(out.scalar_type(), 0);
  bool done = false;
  dispatch_low(out.scalar_type(), [&]<class S>(S) {
    done = amx::convolve(plane, out.size(0), products, pieces, 2, Writer<S>(plane, bias, out));
  });
  ++(done ? by_engine : out_of_range);
  return done;
}

#else

bool amx_lines(const std::vector<LineTerm>&, const MaybeTensor&, Tensor&) {
  return false;
}

#endif

}  // namespace vosops::cpu::global_conv
