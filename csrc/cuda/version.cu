// The CUDA version that this library was compiled with: its driver must support that major version.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace {
int64_t cuda_version() {
  return CUDART_VERSION;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vosops, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
}
