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
#include <vector>

#include "common/checks.h"
#include "cpu/conv_lstm.h"
#include "cpu/winograd.h"

namespace vosops::cpu {
namespace {

using namespace winograd;

// What becomes of a sum, and where: rows of `width` floats at any stride.
struct Target {
  float* data;
  int64_t image_stride, channel_stride, row_stride;
};
struct Addend {
  const float* data = nullptr;
  int64_t image_stride = 0, channel_stride = 0, row_stride = 0;
};

// The sum with bias and addend, times `slope` where it is negative: 0 is a ReLU, also of -inf, 1 the sum
// itself.
void convolve_to(const Target& to, const Source& source, int64_t images, const Filters& filters,
                 const float* bias, const Addend& addend, float slope) {
  const Plane& plane = source.plane;
  const Reg slopes = Lanes::set1(slope);
  const bool relu = slope == 0;
  convolve(source, images, filters, nullptr, 1,
           [&](Block& block, const Band& band, int64_t first_key, int64_t count) {
             const int64_t first_row = kTile * band.first_row;
             const int64_t rows = std::min(kTile * band.rows, plane.height - first_row);
             for (int64_t key = 0; key < count; ++key) {
               block.transform(key, band, 0);
               const int64_t k = first_key + key;
               const Reg start = Lanes::set1(bias ? bias[k] : 0.f);
               for (int64_t y = 0; y < rows; ++y) {
                 const float* from = block.output(0) + y * block.pitch();
                 const float* more = addend.data + band.image * addend.image_stride +
                                     k * addend.channel_stride + (first_row + y) * addend.row_stride;
                 float* row = to.data + band.image * to.image_stride + k * to.channel_stride +
                              (first_row + y) * to.row_stride;
                 for (int64_t i = 0; i < plane.width; i += Lanes::kLanes) {
                   const int64_t left = plane.width - i;
                   Reg value = Lanes::load(from + i) + start;
                   if (addend.data) value += load_lanes<Lanes>(more + i, left);
                   value = value < Reg{} ? (relu ? Reg{} : slopes * value) : value;  // NaN stays NaN
                   store_lanes<Lanes>(row + i, value, left);
                 }
               }
             }
           });
}

std::optional<Tensor> dense_bias(const std::optional<Tensor>& bias, int64_t keys) {
  if (!bias) return std::nullopt;
  check_shape("bias", *bias, {keys});
  check_dtype("bias", *bias, ScalarType::Float);
  return torch::stable::contiguous(*bias);
}

Tensor conv3x3_winograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& addend, bool relu) {
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_dtype("x", x, ScalarType::Float);
  const int64_t images = x.size(0), channels = x.size(1), keys = weight.size(0);
  const Plane plane{x.size(2), x.size(3)};
  check_shape("weight", weight, {kAnySize, channels, kTaps, kTaps});
  check_dtype("weight", weight, ScalarType::Float);
  const Tensor input = torch::stable::contiguous(x), weights = torch::stable::contiguous(weight);
  const std::optional<Tensor> biases = dense_bias(bias, keys);
  std::optional<Tensor> added;
  if (addend) {
    check_shape("addend", *addend, {images, keys, plane.height, plane.width});
    check_dtype("addend", *addend, ScalarType::Float);
    added = torch::stable::contiguous(*addend);
  }
  Tensor output = torch::stable::new_empty(x, {images, keys, plane.height, plane.width});
  if (output.numel() == 0) return output;
  const int64_t size = plane.size();
  const Source source{
      plane, {Maps{input.const_data_ptr<float>(), channels * size, size, channels, Rows::of(plane)}}};
  const Filters filters{weights.const_data_ptr<float>(), keys, channels, channels * kFilter, kFilter};
  convolve_to({output.mutable_data_ptr<float>(), keys * size, size, plane.width}, source, images, filters,
              biases ? biases->const_data_ptr<float>() : nullptr,
              added ? Addend{added->const_data_ptr<float>(), keys * size, size, plane.width} : Addend{},
              relu ? 0.f : 1.f);
  return output;
}

void check_rows(const char* name, const Tensor& map) {
  check_dtype(name, map, ScalarType::Float);
  STD_TORCH_CHECK(map.stride(3) == 1 || map.size(3) == 1, name, " must have columns one after the other");
}

// Some rows of a convolution of several maps as if they were one: output row y is centred on row y + above of
// the maps, zeros beyond them. Maps, addend and output may be parts of larger ones.
void conv3x3_winograd_rows(const std::vector<Tensor>& maps, const Tensor& weight,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& addend, Tensor out,
                           double slope, int64_t above) {
  const int64_t images = out.size(0), keys = weight.size(0);
  const Plane plane{out.size(2), out.size(3)};
  check_shape("out", out, {images, keys, plane.height, plane.width});
  check_rows("out", out);
  STD_TORCH_CHECK(!maps.empty(), "maps must hold one or more");
  Source source{plane, {}};
  const int64_t height = maps[0].size(2);
  for (const Tensor& map : maps) {
    check_shape("maps", map, {images, kAnySize, height, plane.width});
    check_rows("maps", map);
    source.maps.push_back({map.const_data_ptr<float>(),
                           map.stride(0),
                           map.stride(1),
                           map.size(1),
                           {height, map.stride(2), above}});
  }
  const int64_t channels = source.channels();
  check_shape("weight", weight, {keys, channels, kTaps, kTaps});
  check_dtype("weight", weight, ScalarType::Float);
  const Tensor weights = torch::stable::contiguous(weight);
  const std::optional<Tensor> biases = dense_bias(bias, keys);
  Addend added;
  if (addend) {
    check_shape("addend", *addend, {images, keys, plane.height, plane.width});
    check_rows("addend", *addend);
    added = {addend->const_data_ptr<float>(), addend->stride(0), addend->stride(1), addend->stride(2)};
  }
  if (out.numel() == 0) return;
  const Filters filters{weights.const_data_ptr<float>(), keys, channels, channels * kFilter, kFilter};
  convolve_to({out.mutable_data_ptr<float>(), out.stride(0), out.stride(1), out.stride(2)}, source, images,
              filters, biases ? biases->const_data_ptr<float>() : nullptr, added, static_cast<float>(slope));
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("conv3x3_winograd", TORCH_BOX(&vosops::cpu::conv3x3_winograd));
  m.impl("conv3x3_winograd_rows", TORCH_BOX(&vosops::cpu::conv3x3_winograd_rows));
}
