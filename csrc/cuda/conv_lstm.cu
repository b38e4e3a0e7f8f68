// The convolutional LSTM's cell update on the GPU, forward and backward: what follows the gates' convolution.
//
// A dense (N,4C,H,W) is, for each outer index, four blocks (i, f, g, o) of `inner` adjacent entries: in
// contiguous memory the outer index is n and a block C*H*W long, in channels_last it is a pixel of n and a
// block C long. A thread owns four adjacent entries of the cell (one, where they do not divide the blocks or
// do not lie at multiples of four entries) and reads and writes each tensor once, in pieces of 8 or 16 bytes.
// Bytes per entry in float32: forward 20 read (36 with a second summand) and 24 written, backward 32 read and
// 20 written; the memory's rate bounds it. For C = 128, 30 x 54: 9 MB, 3 us on an H100, less than the
// launches of the dozen kernels that it replaces.
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "common/layout.h"
#include "host.cuh"

namespace vosops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGates = 4;

// (N, blocks * C, H, W): `blocks` blocks of `inner` entries for each outer index of a batch element.
template <class S>
struct Blocks {
  S* data;
  int64_t batch_stride;
  int blocks;

  __device__ S* at(int64_t n, int64_t outer, int block, int64_t entry, int64_t inner) const {
    return data + n * batch_stride + (outer * blocks + block) * inner + entry;
  }
};

template <class S>
Blocks<const S> read_from(const Tensor& t, int blocks) {
  return {static_cast<const S*>(t.const_data_ptr()), t.stride(0), blocks};
}
template <class S>
Blocks<S> write_to(const Tensor& t, int blocks) {
  return {static_cast<S*>(t.mutable_data_ptr()), t.stride(0), blocks};
}

struct Extent {
  int64_t batch, outer, inner;
  int64_t count() const { return batch * outer * inner; }
};

template <class S, int kEntries>
struct alignas(sizeof(S) * kEntries) Piece {
  S values[kEntries];
};

template <int kEntries>
struct Floats {
  float values[kEntries];

  template <class S>
  static __device__ Floats load(const S* from) {
    const auto piece = *reinterpret_cast<const Piece<S, kEntries>*>(from);
    Floats floats;
    for (int i = 0; i < kEntries; ++i) floats.values[i] = to_float(piece.values[i]);
    return floats;
  }
  template <class S>
  __device__ void store(S* to) const {
    Piece<S, kEntries> piece;
    for (int i = 0; i < kEntries; ++i) piece.values[i] = from_float<S>(values[i]);
    *reinterpret_cast<Piece<S, kEntries>*>(to) = piece;
  }
};

__device__ __forceinline__ float sigmoid(float x) {
  return 1 / (1 + expf(-x));
}

// Where this thread's entries are; false beyond the last.
template <int kEntries>
struct Place {
  int64_t n, outer, entry;

  __device__ bool find(const Extent& extent) {
    const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kEntries;
    if (at >= extent.batch * extent.outer * extent.inner) return false;
    entry = at % extent.inner;
    outer = at / extent.inner % extent.outer;
    n = at / extent.inner / extent.outer;
    return true;
  }
};

template <class G, class C>
struct Forward {
  Blocks<const G> gates, more_gates;  // more_gates.data is null where there are none
  Blocks<const C> cell;
  float forget_bias;
  Blocks<G> hidden;
  Blocks<C> new_cell;
  Blocks<G> saved;
};

template <int kEntries, class G, class C>
__global__ __launch_bounds__(kThreads) void forward_kernel(Extent extent, Forward<G, C> in) {
  using Values = Floats<kEntries>;
  Place<kEntries> p;
  if (!p.find(extent)) return;
  VISIT(tile, 1);
  Values gates[kGates];
  for (int gate = 0; gate < kGates; ++gate) {
    gates[gate] = Values::load(in.gates.at(p.n, p.outer, gate, p.entry, extent.inner));
    if (!in.more_gates.data) continue;
    const auto more = Values::load(in.more_gates.at(p.n, p.outer, gate, p.entry, extent.inner));
    for (int e = 0; e < kEntries; ++e) gates[gate].values[e] += more.values[e];
  }
  Values cell = Values::load(in.cell.at(p.n, p.outer, 0, p.entry, extent.inner)), hidden;
  for (int e = 0; e < kEntries; ++e) {
    float &i = gates[0].values[e], &f = gates[1].values[e], &g = gates[2].values[e], &o = gates[3].values[e];
    i = sigmoid(i);
    f = sigmoid(f + in.forget_bias);
    g = tanhf(g);
    o = sigmoid(o);
    cell.values[e] = f * cell.values[e] + i * g;
    hidden.values[e] = o * tanhf(cell.values[e]);
  }
  for (int gate = 0; gate < kGates; ++gate)
    gates[gate].store(in.saved.at(p.n, p.outer, gate, p.entry, extent.inner));
  cell.store(in.new_cell.at(p.n, p.outer, 0, p.entry, extent.inner));
  hidden.store(in.hidden.at(p.n, p.outer, 0, p.entry, extent.inner));
}

template <class G, class C>
struct Backward {
  Blocks<const G> grad_hidden;
  Blocks<const C> grad_cell;
  Blocks<const G> saved;
  Blocks<const C> cell, new_cell;
  Blocks<G> grad_gates;
  Blocks<C> grad_previous;
};

template <int kEntries, class G, class C>
__global__ __launch_bounds__(kThreads) void backward_kernel(Extent extent, Backward<G, C> in) {
  using Values = Floats<kEntries>;
  Place<kEntries> p;
  if (!p.find(extent)) return;
  VISIT(tile, 1);
  const auto load = [&](const auto& from, int block) {
    return Values::load(from.at(p.n, p.outer, block, p.entry, extent.inner));
  };
  Values gates[kGates];
  for (int gate = 0; gate < kGates; ++gate) gates[gate] = load(in.saved, gate);
  const Values grad_hidden = load(in.grad_hidden, 0), cell = load(in.cell, 0),
               new_cell = load(in.new_cell, 0);
  Values grad = load(in.grad_cell, 0);
  for (int e = 0; e < kEntries; ++e) {
    float &i = gates[0].values[e], &f = gates[1].values[e], &g = gates[2].values[e], &o = gates[3].values[e];
    const float squashed = tanhf(new_cell.values[e]), of_hidden = grad_hidden.values[e];
    const float total = grad.values[e] + of_hidden * o * (1 - squashed * squashed);
    grad.values[e] = total * f;
    const float of_i = total * g * i * (1 - i), of_g = total * i * (1 - g * g);
    f = total * cell.values[e] * f * (1 - f);
    o = of_hidden * squashed * o * (1 - o);
    i = of_i;
    g = of_g;
  }
  for (int gate = 0; gate < kGates; ++gate)
    gates[gate].store(in.grad_gates.at(p.n, p.outer, gate, p.entry, extent.inner));
  grad.store(in.grad_previous.at(p.n, p.outer, 0, p.entry, extent.inner));
}

// ---- Hosts ----
constexpr int kEntriesOfPiece = 4;

// Whether pieces of four entries are aligned in all of these.
bool in_pieces(const Extent& extent, std::initializer_list<const Tensor*> tensors) {
  if (extent.inner % kEntriesOfPiece) return false;
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) {
    const auto bytes = uintptr_t(kEntriesOfPiece) * t->element_size();
    return reinterpret_cast<uintptr_t>(t->const_data_ptr()) % bytes == 0 &&
           (extent.batch == 1 || t->stride(0) % kEntriesOfPiece == 0);
  });
}

// Calls f with an element of the gates' type and one of the cell's, which is that or float.
template <class F>
void dispatch_states(ScalarType gates, const Tensor& cell, F f) {
  STD_TORCH_CHECK(cell.scalar_type() == gates || cell.scalar_type() == ScalarType::Float,
                  "cell must have the dtype of the gates or float32");
  dispatch(gates, [&](auto gate) {
    using G = decltype(gate);
    if (std::is_same_v<G, float> || cell.scalar_type() == gates)
      f(gate, G{});
    else if constexpr (!std::is_same_v<G, float>)
      f(gate, float{});
  });
}

Extent extent_of(const Tensor& cell, bool last) {
  const int64_t channels = cell.size(1), pixels = cell.size(2) * cell.size(3);
  return {cell.size(0), last ? pixels : 1, last ? channels : channels * pixels};
}

dim3 grid_of(const Extent& extent, int entries) {
  return dim3(checked_blocks(ceil_div(extent.count(), int64_t{kThreads} * entries)));
}

std::tuple<Tensor, Tensor, Tensor> conv_lstm_pointwise(const Tensor& gates,
                                                       const std::optional<Tensor>& more_gates,
                                                       const Tensor& cell, double forget_bias) {
  check_shape("cell", cell, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t channels = cell.size(1);
  check_shape("gates", gates, {cell.size(0), kGates * channels, cell.size(2), cell.size(3)});
  const bool last = is_channels_last(gates);
  Tensor hidden = empty_in_layout(gates, channels, gates.scalar_type(), last);
  Tensor new_cell = empty_in_layout(gates, channels, cell.scalar_type(), last);
  Tensor saved = empty_in_layout(gates, kGates * channels, gates.scalar_type(), last);
  if (more_gates) {
    check_shape("more_gates", *more_gates, {cell.size(0), kGates * channels, cell.size(2), cell.size(3)});
    check_dtype("more_gates", *more_gates, gates.scalar_type());
  }
  if (cell.numel() == 0) return {hidden, new_cell, saved};
  const DeviceScope device(gates);
  const Tensor own_gates = in_layout(gates, last), own_cell = in_layout(cell, last);
  const Tensor own_more = more_gates ? in_layout(*more_gates, last) : own_gates;
  const Extent extent = extent_of(cell, last);
  const bool pieces = in_pieces(extent, {&own_gates, &own_more, &own_cell, &hidden, &new_cell, &saved});
  dispatch_states(gates.scalar_type(), cell, [&](auto gate, auto state) {
    using G = decltype(gate);
    using C = decltype(state);
    Forward<G, C> in{read_from<G>(own_gates, kGates), read_from<G>(own_more, kGates),
                     read_from<C>(own_cell, 1),       float(forget_bias),
                     write_to<G>(hidden, 1),          write_to<C>(new_cell, 1),
                     write_to<G>(saved, kGates)};
    if (!more_gates) in.more_gates.data = nullptr;
    if (pieces)
      LAUNCH((forward_kernel<kEntriesOfPiece, G, C>), grid_of(extent, kEntriesOfPiece), dim3(kThreads), 0,
             device.stream(), extent, in);
    else
      LAUNCH((forward_kernel<1, G, C>), grid_of(extent, 1), dim3(kThreads), 0, device.stream(), extent, in);
  });
  return {hidden, new_cell, saved};
}

std::tuple<Tensor, Tensor> conv_lstm_pointwise_backward(const Tensor& grad_hidden, const Tensor& grad_cell,
                                                        const Tensor& saved, const Tensor& cell,
                                                        const Tensor& new_cell) {
  check_shape("cell", cell, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t n = cell.size(0), channels = cell.size(1), height = cell.size(2), width = cell.size(3);
  check_shape("saved", saved, {n, kGates * channels, height, width});
  check_shape("grad_hidden", grad_hidden, {n, channels, height, width});
  check_dtype("grad_hidden", grad_hidden, saved.scalar_type());
  check_shape("grad_cell", grad_cell, {n, channels, height, width});
  check_dtype("grad_cell", grad_cell, cell.scalar_type());
  check_shape("new_cell", new_cell, {n, channels, height, width});
  check_dtype("new_cell", new_cell, cell.scalar_type());
  const bool last = is_channels_last(saved);
  Tensor grad_gates = empty_in_layout(saved, kGates * channels, saved.scalar_type(), last);
  Tensor grad_previous = empty_in_layout(saved, channels, cell.scalar_type(), last);
  if (cell.numel() == 0) return {grad_gates, grad_previous};
  const DeviceScope device(saved);
  const Tensor own_grad_hidden = in_layout(grad_hidden, last), own_grad_cell = in_layout(grad_cell, last),
               own_saved = in_layout(saved, last), own_cell = in_layout(cell, last),
               own_new_cell = in_layout(new_cell, last);
  const Extent extent = extent_of(cell, last);
  const bool pieces = in_pieces(extent, {&own_grad_hidden, &own_grad_cell, &own_saved, &own_cell,
                                         &own_new_cell, &grad_gates, &grad_previous});
  dispatch_states(saved.scalar_type(), cell, [&](auto gate, auto state) {
    using G = decltype(gate);
    using C = decltype(state);
    const Backward<G, C> in{read_from<G>(own_grad_hidden, 1), read_from<C>(own_grad_cell, 1),
                            read_from<G>(own_saved, kGates),  read_from<C>(own_cell, 1),
                            read_from<C>(own_new_cell, 1),    write_to<G>(grad_gates, kGates),
                            write_to<C>(grad_previous, 1)};
    if (pieces)
      LAUNCH((backward_kernel<kEntriesOfPiece, G, C>), grid_of(extent, kEntriesOfPiece), dim3(kThreads), 0,
             device.stream(), extent, in);
    else
      LAUNCH((backward_kernel<1, G, C>), grid_of(extent, 1), dim3(kThreads), 0, device.stream(), extent, in);
  });
  return {grad_gates, grad_previous};
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("conv_lstm_pointwise", TORCH_BOX(&vosops::cuda::conv_lstm_pointwise));
  m.impl("conv_lstm_pointwise_backward", TORCH_BOX(&vosops::cuda::conv_lstm_pointwise_backward));
}
