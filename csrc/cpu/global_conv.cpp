// The line convolutions of a global convolution on the CPU: PyTorch's own convolution.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "common/checks.h"
#include "cpu/strided.h"

namespace vosops::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::stable::detail::from;
using torch::stable::detail::to;
using MaybeTensor = std::optional<Tensor>;

// Calls `name`.`overload` of PyTorch, which returns one tensor.
template <class... Args>
Tensor call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor add(const Tensor& a, const Tensor& b) {
  return torch::stable::subtract(a, b, -1.0);  // the stable interface has no addition
}

// A "same" convolution with stride 1 of any number of channels.
Tensor line_conv(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const std::array<int64_t, 2> ones{1, 1}, zeros{0, 0}, padding{weight.size(2) / 2, weight.size(3) / 2};
  const IntHeaderOnlyArrayRef stride(ones.data(), 2), pad(padding.data(), 2), none(zeros.data(), 2);
  if (x.size(1) > 0)
    return call_aten("aten::convolution", "", x, weight, bias, stride, pad, stride, false, none, int64_t{1});
  const std::array<int64_t, 4> sizes{x.size(0), weight.size(0), x.size(2), x.size(3)};
  const Tensor zero = torch::stable::new_zeros(x, IntHeaderOnlyArrayRef(sizes.data(), 4));
  if (!bias.has_value()) return zero;
  const std::array<int64_t, 3> shape{bias->size(0), 1, 1};
  return add(zero, torch::stable::reshape(*bias, IntHeaderOnlyArrayRef(shape.data(), 3)));
}

void check_line(const char* name, const Tensor& weight, int64_t channels, ScalarType dtype) {
  check_shape(name, weight, {kAnySize, channels, kAnySize, kAnySize});
  check_dtype(name, weight, dtype);
  const int64_t height = weight.size(2), width = weight.size(3);
  STD_TORCH_CHECK((height == 1 || width == 1) && height % 2 == 1 && width % 2 == 1, name,
                  " must have shape (M,C,k,1) or (M,C,1,k) with k odd");
}

// An uninitialised (N,channels,H,W) in the memory format of x.
Tensor empty_like_map(const Tensor& x, int64_t channels) {
  const std::array<int64_t, 4> sizes{x.size(0), channels, x.size(2), x.size(3)};
  const bool last = x.stride(1) == 1 && !x.is_contiguous();
  const MemoryFormat format = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(IntHeaderOnlyArrayRef(sizes.data(), 4), x.scalar_type(), std::nullopt,
                              x.device(), std::nullopt, format);
}

Tensor split(const Tensor& x, const Tensor& first, const Tensor& second, const MaybeTensor& first_bias,
             const MaybeTensor& second_bias, const MaybeTensor& addend, const std::string& precision) {
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_line("first", first, x.size(1), x.scalar_type());
  check_line("second", second, x.size(1), x.scalar_type());
  Tensor out = empty_like_map(x, first.size(0) + second.size(0));
  if (out.numel() == 0) return out;
  Tensor parts[] = {torch::stable::narrow(out, 1, 0, first.size(0)),
                    torch::stable::narrow(out, 1, first.size(0), second.size(0))};
  if (first.size(0) > 0) torch::stable::copy_(parts[0], line_conv(x, first, first_bias));
  if (second.size(0) > 0) torch::stable::copy_(parts[1], line_conv(x, second, second_bias));
  return addend.has_value() ? torch::stable::copy_(out, add(out, *addend)) : out;
}

Tensor merge(const Tensor& x, const Tensor& first, const Tensor& second, const MaybeTensor& bias,
             const std::string& precision) {
  check_shape("x", x, {kAnySize, first.size(1) + second.size(1), kAnySize, kAnySize});
  check_line("first", first, kAnySize, x.scalar_type());
  check_line("second", second, kAnySize, x.scalar_type());
  check_shape("second", second, {first.size(0), kAnySize, kAnySize, kAnySize});
  Tensor out = empty_like_map(x, first.size(0));
  if (out.numel() == 0) return out;
  Tensor input = x;
  const Tensor left = line_conv(torch::stable::narrow(input, 1, 0, first.size(1)), first, bias);
  const Tensor right = line_conv(torch::stable::narrow(input, 1, first.size(1), second.size(1)), second, {});
  return torch::stable::copy_(out, add(left, right));
}

Tensor weight_gradient(const Tensor& x, const Tensor& grad, int64_t kernel_h, int64_t kernel_w,
                       const std::string& precision) {
  check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("grad", grad, {x.size(0), kAnySize, x.size(2), x.size(3)});
  check_dtype("grad", grad, x.scalar_type());
  const std::array<int64_t, 4> sizes{grad.size(1), x.size(1), kernel_h, kernel_w};
  const IntHeaderOnlyArrayRef shape(sizes.data(), 4);
  if (x.numel() == 0 || grad.numel() == 0) return torch::stable::new_zeros(x, shape);
  const Tensor weight = torch::stable::new_empty(x, shape);
  const std::array<int64_t, 2> ones{1, 1}, zeros{0, 0}, padding{kernel_h / 2, kernel_w / 2};
  const IntHeaderOnlyArrayRef stride(ones.data(), 2), pad(padding.data(), 2), none(zeros.data(), 2);
  const std::array<bool, 3> wanted{false, true, false};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(x),
                                     from(weight),
                                     from(std::optional<IntHeaderOnlyArrayRef>{}),
                                     from(stride),
                                     from(pad),
                                     from(stride),
                                     from(false),
                                     from(none),
                                     from(int64_t{1}),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[1]);
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("global_conv_split", TORCH_BOX(&vosops::cpu::split));
  m.impl("global_conv_merge", TORCH_BOX(&vosops::cpu::merge));
  m.impl("global_conv_weight", TORCH_BOX(&vosops::cpu::weight_gradient));
}
