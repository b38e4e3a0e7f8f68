// 3x3 convolutions of maps on the CPU in float32, by Winograd's F(4x4,3x3) (winograd.h), for inference.
//
// A task owns 24 output channels of a band of tiles. What follows a convolution in the refinement of masks,
// the bias, the sum with the map beside it and the ReLU, is done while the outputs are in the second-level
// cache. Operations: 72 / 16 C per output, a quarter of the direct sum's; filters are transformed by each
// task, which costs 1 / 4 of the products where a band has 36 tiles and little where it has the 192 of a
// large map.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/checks.h"
#include "cpu/conv_lstm.h"
#include "cpu/winograd.h"

namespace vosops::cpu {
namespace {

using namespace winograd;

Tensor conv3x3_winograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& addend, bool relu) {
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_dtype("x", x, ScalarType::Float);
  const int64_t images = x.size(0), channels = x.size(1), keys = weight.size(0);
  const Plane plane{x.size(2), x.size(3)};
  check_shape("weight", weight, {kAnySize, channels, kTaps, kTaps});
  check_dtype("weight", weight, ScalarType::Float);
  const Tensor input = torch::stable::contiguous(x), weights = torch::stable::contiguous(weight);
  std::optional<Tensor> biases, added;
  if (bias) {
    check_shape("bias", *bias, {keys});
    check_dtype("bias", *bias, ScalarType::Float);
    biases = torch::stable::contiguous(*bias);
  }
  if (addend) {
    check_shape("addend", *addend, {images, keys, plane.height, plane.width});
    check_dtype("addend", *addend, ScalarType::Float);
    added = torch::stable::contiguous(*addend);
  }
  Tensor output = torch::stable::new_empty(x, {images, keys, plane.height, plane.width});
  if (output.numel() == 0) return output;
  const float* more = added ? added->const_data_ptr<float>() : nullptr;
  const float* of_keys = biases ? biases->const_data_ptr<float>() : nullptr;
  float* to = output.mutable_data_ptr<float>();
  const Reg least = relu ? Reg{} : Lanes::set1(-std::numeric_limits<float>::infinity());

  const Source source{
      plane, {Maps{input.const_data_ptr<float>(), channels * plane.size(), channels}, {nullptr, 0, 0}}};
  const Filters filters{weights.const_data_ptr<float>(), keys, channels, channels * kFilter, kFilter};
  convolve(source, images, filters, nullptr, 1,
           [&](Block& block, const Band& band, int64_t first_key, int64_t count) {
             const int64_t first_row = kTile * band.first_row;
             const int64_t rows = std::min(kTile * band.rows, plane.height - first_row);
             for (int64_t key = 0; key < count; ++key) {
               block.transform(key, band, 0);
               const Reg start = Lanes::set1(of_keys ? of_keys[first_key + key] : 0.f);
               int64_t at = ((band.image * keys + first_key + key) * plane.height + first_row) * plane.width;
               for (int64_t y = 0; y < rows; ++y, at += plane.width) {
                 const float* from = block.output(0) + y * block.pitch();
                 for (int64_t i = 0; i < plane.width; i += Lanes::kLanes) {
                   const int64_t left = plane.width - i;
                   Reg value = Lanes::load(from + i) + start;
                   if (more) value += load_lanes<Lanes>(more + at + i, left);
                   value = value < least ? least : value;  // NaN stays NaN
                   store_lanes<Lanes>(to + at + i, value, left);
                 }
               }
             }
           });
  return output;
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("conv3x3_winograd", TORCH_BOX(&vosops::cpu::conv3x3_winograd));
}
