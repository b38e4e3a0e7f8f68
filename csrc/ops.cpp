// Every schema of the library, in one place. The kernels register themselves: csrc/cpu/*.cpp under CPU,
// csrc/cuda/*.cu under CUDA; fake kernels, autograd, autocast and vmap are registered in vosops/ops/*.py.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {
#ifndef VOSOPS_CAPABILITY
#error "VOSOPS_CAPABILITY names the instruction set that this library is compiled for"
#endif
std::string cpu_capability() {
  return VOSOPS_CAPABILITY;
}
}  // namespace

STABLE_TORCH_LIBRARY(vosops, m) {
  m.def("cpu_capability() -> str");
  m.def("cuda_version() -> int");
  m.def("peak_operations(int rounds) -> int");
  m.def("peak_bf16_operations(int rounds) -> int");
  m.def("peak_amx_operations(int rounds, int pieces) -> int");
  m.def("amx_refusal() -> str");
  m.def("amx_counts() -> str");
  m.def(
      "memory_select_bounds(Tensor query, Tensor key, Tensor? shrinkage, Tensor? query_bias, Tensor? "
      "key_bias, "
      "float scale) -> (Tensor approximation, Tensor bound)");  // for tests, by libraries for AMX alone
  m.def("amx_pieces(str precision) -> int");
  m.def(
      "local_matching(Tensor query, Tensor key, Tensor mask, int[] radius, int dilation, Tensor? query_mask, "
      "str precision) -> (Tensor distance, Tensor index)");
  m.def(
      "global_matching(Tensor query, Tensor key, Tensor mask, int neighbors, Tensor? query_mask, str "
      "precision)"
      " -> (Tensor distance, Tensor index)");
  m.def(
      "matching_backward(Tensor grad, Tensor query, Tensor key, Tensor index) -> (Tensor grad_query, Tensor "
      "grad_key)");
  m.def(
      "memory_read(Tensor query, Tensor key, Tensor value, Tensor? shrinkage, Tensor? query_bias, Tensor? "
      "key_bias,"
      " float scale, str precision) -> (Tensor out, Tensor lse)");
  m.def(
      "memory_read_list(Tensor query, Tensor key, Tensor[] values, Tensor? shrinkage, Tensor? query_bias, "
      "Tensor? key_bias, float scale, str precision) -> (Tensor out, Tensor lse)");
  m.def(
      "memory_read_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor? shrinkage, Tensor? query_bias, Tensor? key_bias, float scale, str precision, Tensor out, "
      "Tensor lse)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_shrinkage, "
      "Tensor grad_query_bias, Tensor grad_key_bias)");
  m.def(
      "memory_usage(Tensor query, Tensor key, Tensor? shrinkage, Tensor? query_bias, Tensor? key_bias, float "
      "scale,"
      " str precision, Tensor lse) -> Tensor");
  m.def(
      "memory_select(Tensor query, Tensor key, Tensor? shrinkage, Tensor? query_bias, Tensor? key_bias, "
      "float scale,"
      " str precision, int top_k) -> (Tensor score, Tensor index)");
  m.def("memory_gather(Tensor weight, Tensor index, Tensor value) -> Tensor");
  m.def(
      "memory_gather_backward(Tensor grad, Tensor weight, Tensor index, Tensor value) -> (Tensor "
      "grad_weight, "
      "Tensor grad_value)");
  m.def("local_attention_dot(Tensor a, Tensor b, int reach, int dilation) -> Tensor");
  m.def("local_attention_weigh(Tensor weights, Tensor b, int reach, int dilation) -> Tensor");
  m.def("local_attention_spread(Tensor weights, Tensor a, int reach, int dilation) -> Tensor");
  m.def(
      "local_attention_fused(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? relative_key, "
      "Tensor? relative_value, int heads, int reach, int dilation, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "local_attention_fused_backward(Tensor grad, Tensor grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor? bias, Tensor lse, int heads, int reach, int dilation, float scale) -> (Tensor grad_query, "
      "Tensor grad_key, Tensor grad_value, Tensor grad_bias)");
  m.def(
      "local_correlation(Tensor query, Tensor key, int[] patch_size, int[] stride, int[] padding, int[] "
      "dilation_patch) -> Tensor");
  m.def(
      "local_correlation_query(Tensor grad, Tensor key, int[] patch_size, int[] stride, int[] padding, int[] "
      "dilation_patch) -> Tensor");
  m.def(
      "local_correlation_key(Tensor grad, Tensor query, int[] patch_size, int[] stride, int[] padding, int[] "
      "dilation_patch) -> Tensor");
  m.def(
      "global_conv_split(Tensor x, Tensor first, Tensor second, Tensor? first_bias, Tensor? second_bias, "
      "Tensor? addend, str precision) -> Tensor");
  m.def("global_conv_merge(Tensor x, Tensor first, Tensor second, Tensor? bias, str precision) -> Tensor");
  m.def("global_conv_split_input(Tensor grad, Tensor first, Tensor second, str precision) -> Tensor");
  m.def("global_conv_merge_input(Tensor grad, Tensor first, Tensor second, str precision) -> Tensor");
  m.def("global_conv_weight(Tensor x, Tensor grad, int kernel_h, int kernel_w, str precision) -> Tensor");
  m.def(
      "conv_lstm_pointwise(Tensor gates, Tensor? more_gates, Tensor cell, float forget_bias) -> (Tensor "
      "hidden, Tensor new_cell, Tensor saved)");
  m.def(
      "conv_lstm_pointwise_backward(Tensor grad_hidden, Tensor grad_cell, Tensor saved, Tensor cell, Tensor "
      "new_cell) -> (Tensor grad_gates, Tensor grad_previous_cell)");
  m.def("conv3x3_winograd(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, bool relu) -> Tensor");
  m.def(
      "conv3x3_winograd_rows(Tensor[] maps, Tensor weight, Tensor? bias, Tensor? addend, Tensor(a!) out, "
      "float "
      "slope, int above) -> ()");
  m.def("conv_lstm_direct_pack(Tensor weight) -> Tensor");
  m.def(
      "conv_lstm_direct_packed(Tensor x, Tensor weight, Tensor packed, Tensor? bias, Tensor? hidden, Tensor? "
      "cell, float forget_bias) -> (Tensor output, Tensor new_cell)");
  m.def(
      "conv_lstm_direct_states(Tensor x, Tensor weight, Tensor? bias, Tensor? hidden, Tensor? cell, float "
      "forget_bias) -> (Tensor output, Tensor new_cell, Tensor saved)");
  m.def(
      "conv_lstm_direct_gradients(Tensor grad_output, Tensor grad_cell, Tensor x, Tensor weight, Tensor? "
      "hidden, Tensor? cell, Tensor output, Tensor saved) -> (Tensor grad_x, Tensor grad_weight, Tensor "
      "grad_bias, Tensor grad_hidden, Tensor grad_previous_cell)");
  m.def("conv_lstm_winograd_pack(Tensor weight) -> Tensor");
  m.def(
      "conv_lstm_winograd_packed(Tensor x, Tensor packed, Tensor? bias, Tensor? hidden, Tensor? cell, float "
      "forget_bias, int hidden_channels) -> (Tensor output, Tensor new_cell)");
  m.def(
      "conv_lstm_winograd(Tensor x, Tensor weight, Tensor? bias, Tensor? hidden, Tensor? cell, float "
      "forget_bias) -> (Tensor output, Tensor cells)");
  m.def(
      "conv_lstm_winograd_backward(Tensor grad_output, Tensor grad_cells, Tensor x, Tensor weight, Tensor? "
      "bias, Tensor? hidden, Tensor? cell, float forget_bias, Tensor output, Tensor cells) -> (Tensor "
      "grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_hidden, Tensor grad_previous_cell)");
}

STABLE_TORCH_LIBRARY_IMPL(vosops, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
