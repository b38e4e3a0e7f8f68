// How kernels declare shared memory and are launched, under nvcc and under tests/emulator alike.
//   LAUNCH((kernel<128, float>), grid, block, shared_bytes, stream, arguments...);
//   DYNAMIC_SHARED(Smem, s);            in the kernel: Smem& s, the block's only shared memory
//   VOSOPS_CUDA_LIBRARY(m) { m.impl("op", TORCH_BOX(&op)); }
//   DeviceScope device(tensor);         makes the tensor's device current; device.stream() is its current
//   stream
//   VISIT(name, copies);                first in a block of code: nothing here; the emulator counts how often
//   a warp comes there, for benchmarks/cuda_model.py. `copies` is how many times an unrolled loop repeats it.
//   VISIT_AT(name, number, copies);     the same where lanes may come to different copies, of which this is
//   one
//   VISIT_LOADS(name, loads);           the same of a loop that the compiler unrolls as it likes: a copy has
//   so many loads from global memory, by which the copies are counted
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulator.h"
#endif

// A grid without blocks is not an error here: there is nothing to do.
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::vosops::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#ifdef __CUDACC__

#define VISIT(name, copies)
#define VISIT_AT(name, number, copies)
#define VISIT_LOADS(name, loads)

#define DYNAMIC_SHARED(Struct, name)                                    \
  extern __shared__ __align__(128) unsigned char vosops_shared_bytes[]; \
  Struct& name = *reinterpret_cast<Struct*>(vosops_shared_bytes)

#define VOSOPS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(vosops, CUDA, m)

namespace vosops::cuda {

using Stream = cudaStream_t;

constexpr size_t kSharedBytesWithoutOptIn = 48 << 10;

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > kSharedBytesWithoutOptIn)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
  check(cudaGetLastError(), name);
}

// What a block of the current device may have.
struct DeviceLimits {
  int multiprocessors;
  size_t shared_bytes;
};

inline DeviceLimits device_limits() {
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return {multiprocessors, size_t(shared_bytes)};
}

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(tensor.get_device_index()) {}
  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<Stream>(stream);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace vosops::cuda

#else

#define VISIT(name, copies) ::emulator::visit(#name, copies)
#define VISIT_AT(name, number, copies) ::emulator::visit(#name, copies, number)
#define VISIT_LOADS(name, loads) ::emulator::visit(#name, -(loads))

#define DYNAMIC_SHARED(Struct, name) \
  Struct& name = *static_cast<Struct*>(emulator::shared_memory(sizeof(Struct)))

#define VOSOPS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(vosops_emulated, CPU, m)

namespace vosops::cuda {

using Stream = void*;

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulator::launch(name, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

struct DeviceLimits {
  int multiprocessors;
  size_t shared_bytes;
};

inline DeviceLimits device_limits() {
  return {emulator::multiprocessors(), emulator::shared_limit()};
}

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor&) {}
  Stream stream() const { return nullptr; }
};

}  // namespace vosops::cuda

#endif
