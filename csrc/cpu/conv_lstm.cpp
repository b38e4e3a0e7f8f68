// The convolutional LSTM's cell update on the CPU, forward and backward: what follows the gates' convolution.
//
// A dense (N,4C,H,W) is, for each outer index, four blocks (i, f, g, o) of `inner` adjacent entries: in
// contiguous memory the outer index is n and a block C*H*W long, in channels_last it is a pixel of n and a
// block C long. A task owns some thousand entries of the cell: it loads the four gates register by register
// (and adds the second summand), activates, updates and stores; nothing is read or written twice. Bytes per
// entry of the cell in float32: forward 20 read (36 with a second summand) and 24 written, backward 32 read
// and 20 written; some hundred operations on them keep it below the memory's rate on one core only for cells
// in the caches. float16 and bfloat16 are converted on loading and storing; the arithmetic is float32.
#include "cpu/conv_lstm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/layout.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace vosops::cpu {
namespace {

constexpr int64_t kTaskEntries = 4096;

// Entry e of block `block` of batch element n, for tensors of one or four blocks of the cell's entries.
template <class S>
struct Blocks {
  S* data;
  int64_t batch_stride, blocks, inner;

  template <class TensorType>
  static Blocks of(TensorType& t, int64_t blocks, int64_t inner) {
    if constexpr (std::is_const_v<S>) {
      return {t.template const_data_ptr<std::remove_const_t<S>>(), t.stride(0), blocks, inner};
    } else {
      return {t.template mutable_data_ptr<S>(), t.stride(0), blocks, inner};
    }
  }
  S* at(int64_t n, int64_t outer, int64_t block, int64_t entry) const {
    return data + n * batch_stride + (outer * blocks + block) * inner + entry;
  }
};

// Calls visit(n, outer, entry, count) for every register of every block: `count` entries from `entry` on.
template <class V, class Visit>
void for_each_register(const Tensor& cell, bool channels_last, const Visit& visit) {
  const int64_t pixels = cell.size(2) * cell.size(3);
  const int64_t outers = channels_last ? pixels : 1;
  const int64_t inner = channels_last ? cell.size(1) : cell.size(1) * pixels;
  if (cell.numel() == 0) return;
  const int64_t width = std::min(inner, kTaskEntries), pieces = (inner + width - 1) / width;
  const int64_t group = std::max<int64_t>(1, kTaskEntries / inner), groups = (outers + group - 1) / group;
  parallel_tasks(cell.size(0) * groups * pieces, [&] {
    return [&](int64_t task) {
      const int64_t n = task / (groups * pieces), first = task / pieces % groups * group;
      const int64_t begin = task % pieces * width, end = std::min(inner, begin + width);
      for (int64_t outer = first; outer < std::min(outers, first + group); ++outer) {
        for (int64_t entry = begin; entry < end; entry += V::kLanes) visit(n, outer, entry, end - entry);
      }
    };
  });
}

template <class S>
using CellVec = Vec<Accumulator<S>, kRegisterBytes>;

void check_gates(const char* name, const Tensor& gates, const Tensor& cell) {
  check_shape("cell", cell, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape(name, gates, {cell.size(0), kGates * cell.size(1), cell.size(2), cell.size(3)});
  check_dtype(name, gates, cell.scalar_type());
}

void check_like_cell(const char* name, const Tensor& value, const Tensor& cell) {
  check_shape(name, value, {cell.size(0), cell.size(1), cell.size(2), cell.size(3)});
  check_dtype(name, value, cell.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> conv_lstm_pointwise(const Tensor& gates,
                                                       const std::optional<Tensor>& more_gates,
                                                       const Tensor& cell, double forget_bias) {
  check_gates("gates", gates, cell);
  if (more_gates) check_gates("more_gates", *more_gates, cell);
  const bool last = is_channels_last(gates);
  const int64_t channels = cell.size(1);
  const ScalarType dtype = cell.scalar_type();
  const Tensor all = in_layout(gates, last), before = in_layout(cell, last);
  const std::optional<Tensor> more =
      more_gates ? std::optional<Tensor>(in_layout(*more_gates, last)) : std::nullopt;
  Tensor hidden = empty_in_layout(cell, channels, dtype, last);
  Tensor new_cell = empty_in_layout(cell, channels, dtype, last);
  Tensor saved = empty_in_layout(cell, kGates * channels, dtype, last);
  dispatch_floating(dtype, [&](auto sample) {
    using S = decltype(sample);
    using V = CellVec<S>;
    using Reg = typename V::Reg;
    const int64_t inner = last ? channels : channels * cell.size(2) * cell.size(3);
    const auto gate = Blocks<const S>::of(all, kGates, inner);
    const auto addend = more ? Blocks<const S>::of(*more, kGates, inner) : gate;
    const auto old = Blocks<const S>::of(before, 1, inner);
    const auto activated = Blocks<S>::of(saved, kGates, inner);
    const auto next = Blocks<S>::of(new_cell, 1, inner), out = Blocks<S>::of(hidden, 1, inner);
    const auto bias = static_cast<typename V::T>(forget_bias);
    for_each_register<V>(cell, last, [&](int64_t n, int64_t outer, int64_t entry, int64_t count) {
      Reg z[kGates];
#pragma GCC unroll 4
      for (int b = 0; b < kGates; ++b) {
        z[b] = load_lanes<V>(gate.at(n, outer, b, entry), count);
        if (more) z[b] += load_lanes<V>(addend.at(n, outer, b, entry), count);
      }
      const auto a = CellGates<V>::activate(z[0], z[1], z[2], z[3], bias);
      const Reg c = a.update(load_lanes<V>(old.at(n, outer, 0, entry), count));
      store_lanes<V>(out.at(n, outer, 0, entry), a.hidden(c), count);
      store_lanes<V>(next.at(n, outer, 0, entry), c, count);
      store_lanes<V>(activated.at(n, outer, 0, entry), a.i, count);
      store_lanes<V>(activated.at(n, outer, 1, entry), a.f, count);
      store_lanes<V>(activated.at(n, outer, 2, entry), a.g, count);
      store_lanes<V>(activated.at(n, outer, 3, entry), a.o, count);
    });
  });
  return {hidden, new_cell, saved};
}

std::tuple<Tensor, Tensor> conv_lstm_pointwise_backward(const Tensor& grad_hidden, const Tensor& grad_cell,
                                                        const Tensor& saved, const Tensor& cell,
                                                        const Tensor& new_cell) {
  check_gates("saved", saved, cell);
  check_like_cell("new_cell", new_cell, cell);
  check_like_cell("grad_hidden", grad_hidden, cell);
  check_like_cell("grad_cell", grad_cell, cell);
  const bool last = is_channels_last(saved);
  const int64_t channels = cell.size(1);
  const ScalarType dtype = cell.scalar_type();
  const Tensor activated = in_layout(saved, last), before = in_layout(cell, last);
  const Tensor after = in_layout(new_cell, last);
  const Tensor of_hidden = in_layout(grad_hidden, last), of_cell = in_layout(grad_cell, last);
  Tensor grad_gates = empty_in_layout(cell, kGates * channels, dtype, last);
  Tensor grad_previous = empty_in_layout(cell, channels, dtype, last);
  dispatch_floating(dtype, [&](auto sample) {
    using S = decltype(sample);
    using V = CellVec<S>;
    const int64_t inner = last ? channels : channels * cell.size(2) * cell.size(3);
    const auto gate = Blocks<const S>::of(activated, kGates, inner);
    const auto old = Blocks<const S>::of(before, 1, inner), next = Blocks<const S>::of(after, 1, inner);
    const auto dh = Blocks<const S>::of(of_hidden, 1, inner), dc = Blocks<const S>::of(of_cell, 1, inner);
    const auto dz = Blocks<S>::of(grad_gates, kGates, inner);
    const auto previous = Blocks<S>::of(grad_previous, 1, inner);
    for_each_register<V>(cell, last, [&](int64_t n, int64_t outer, int64_t entry, int64_t count) {
      const auto load = [&](const Blocks<const S>& blocks, int block) {
        return load_lanes<V>(blocks.at(n, outer, block, entry), count);
      };
      const CellGates<V> gates{load(gate, 0), load(gate, 1), load(gate, 2), load(gate, 3)};
      const auto grads = CellGrads<V>::of(gates, load(old, 0), load(next, 0), load(dh, 0), load(dc, 0));
      store_lanes<V>(dz.at(n, outer, 0, entry), grads.i, count);
      store_lanes<V>(dz.at(n, outer, 1, entry), grads.f, count);
      store_lanes<V>(dz.at(n, outer, 2, entry), grads.g, count);
      store_lanes<V>(dz.at(n, outer, 3, entry), grads.o, count);
      store_lanes<V>(previous.at(n, outer, 0, entry), grads.cell, count);
    });
  });
  return {grad_gates, grad_previous};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("conv_lstm_pointwise", TORCH_BOX(&vosops::cpu::conv_lstm_pointwise));
  m.impl("conv_lstm_pointwise_backward", TORCH_BOX(&vosops::cpu::conv_lstm_pointwise_backward));
}
