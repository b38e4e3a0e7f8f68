// The gradient of a line convolution's bfloat16 weights by the matrix engine (amx_conv_weight.cpp).
#include <cstdint>

#include "cpu/global_conv_amx.h"

#if defined(VOSOPS_AMX)
#include "cpu/amx_conv.h"
#endif

namespace vosops::cpu::global_conv {

#if defined(VOSOPS_AMX)

namespace {

amx::Counter by_engine("global_conv.weights");

}  // namespace

bool amx_weights(const Tensor& x, const Tensor& grad, Tensor& weight) {
  if (x.scalar_type() != ScalarType::BFloat16 || std::min(x.size(1), grad.size(1)) < kLeastChannels ||
      !amx::ready())
    return false;
  const auto planes = [area = x.size(2) * x.size(3)](const Tensor& dense) {
    const auto* data = static_cast<const uint16_t*>(dense.const_data_ptr());
    return [=, channels = dense.size(1)](int64_t image, int64_t channel) {
      return data + (image * channels + channel) * area;
    };
  };
  const Tensor input = torch::stable::contiguous(x), output_grad = torch::stable::contiguous(grad);
  amx::ConvWeightGradient gradient(
      {x.size(2), x.size(3), grad.size(1), x.size(1), weight.size(2), weight.size(3)});
  gradient.add(x.size(0), planes(input), planes(output_grad), true, weight.mutable_data_ptr<BFloat16>());
  ++by_engine;
  return true;
}

#else

bool amx_weights(const Tensor&, const Tensor&, Tensor&) {
  return false;
}

#endif

}  // namespace vosops::cpu::global_conv
