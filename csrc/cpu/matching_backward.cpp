// Backward of local and global matching on the CPU.
//
// A task owns one channel plane of one batch element: it gathers the matched key values of every query pixel
// and scatters their gradients, in a fixed order, so that the result is deterministic without a sort. Bytes:
// the plane of query and key and their gradients stay in the second-level cache; grad and index are streamed
// once per channel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "common/checks.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace vosops::cpu {
namespace {

template <class S>
void backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& index,
              Tensor& grad_query, Tensor& grad_key) {
  using T = Accumulator<S>;
  const int64_t channels = query.size(1), slots = grad.size(1), queries = query.size(2), keys = key.size(2);
  const T* grads = grad.const_data_ptr<T>();
  const int64_t* indices = index.const_data_ptr<int64_t>();
  parallel_tasks(query.size(0) * channels, [&] {
    return [&, key_plane = Workspace<T>(keys), query_sum = Workspace<T>(queries),
            key_sum = Workspace<T>(keys)](int64_t task) mutable {
      const int64_t n = task / channels, c = task % channels;
      const S* q = query.const_data_ptr<S>() + n * query.stride(0) + c * query.stride(1);
      const S* k = key.const_data_ptr<S>() + n * key.stride(0) + c * key.stride(1);
      for (int64_t m = 0; m < keys; ++m) key_plane[m] = widen(k[m * key.stride(2)]);
      std::fill_n(query_sum.data(), queries, T{0});
      std::fill_n(key_sum.data(), keys, T{0});
      for (int64_t s = 0; s < slots; ++s) {
        const T* slot_grad = grads + (n * slots + s) * queries;
        const int64_t* slot_index = indices + (n * slots + s) * queries;
        for (int64_t p = 0; p < queries; ++p) {
          const int64_t m = slot_index[p];
          if (m < 0) continue;
          const T flow = 2 * slot_grad[p] * (widen(q[p * query.stride(2)]) - key_plane[m]);
          query_sum[p] += flow;
          key_sum[m] -= flow;
        }
      }
      S* grad_q = grad_query.mutable_data_ptr<S>() + task * queries;
      S* grad_k = grad_key.mutable_data_ptr<S>() + task * keys;
      for (int64_t p = 0; p < queries; ++p) grad_q[p] = static_cast<S>(query_sum[p]);
      for (int64_t m = 0; m < keys; ++m) grad_k[m] = static_cast<S>(key_sum[m]);
    };
  });
}

std::tuple<Tensor, Tensor> matching_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                             const Tensor& index) {
  check_shape("query", query, {kAnySize, kAnySize, kAnySize});
  check_shape("key", key, {query.size(0), query.size(1), kAnySize});
  check_dtype("key", key, query.scalar_type());
  check_shape("grad", grad, {query.size(0), kAnySize, query.size(2)});
  check_dtype("grad", grad, accumulator_dtype(query.scalar_type()));
  check_shape("index", index, {query.size(0), grad.size(1), query.size(2)});
  check_dtype("index", index, ScalarType::Long);
  const Tensor grads = torch::stable::contiguous(grad), indices = torch::stable::contiguous(index);
  Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  Tensor grad_key = torch::stable::new_empty(key, key.sizes());
  dispatch_floating(query.scalar_type(), [&](auto sample) {
    backward<decltype(sample)>(grads, query, key, indices, grad_query, grad_key);
  });
  return {grad_query, grad_key};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("matching_backward", TORCH_BOX(&vosops::cpu::matching_backward));
}
