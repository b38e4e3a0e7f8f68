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
}

STABLE_TORCH_LIBRARY_IMPL(vosops, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
