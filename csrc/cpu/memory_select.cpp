// The two phases of a top-k memory read on the CPU: select the k best positions per query, gather their
// values.
//
// Select: score tiles as in memory_read.cpp, kSelectBlock memory positions packed at a time; a maximum over
// the tile is compared with each query's k-th best score so far, and only a tile that reaches it is looked at
// again. Gather: values stored channel-last are read row by row, a query's channels in one go. Values stored
// channel-major are read kGatherChannels channels at a time, whose rows stay in the second-level cache for
// all queries. Bytes: the memory's keys once; k values per query and object; k scores and indices per query.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/best.h"
#include "cpu/gemm.h"
#include "cpu/memory_scores.h"
#include "cpu/memory_select_amx.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"

namespace vosops::cpu {
namespace {

constexpr int64_t kSelectBlock = 7 * kMemoryBlock;
constexpr int64_t kGatherQueries = 32;
constexpr int64_t kGatherChannels = 4;

// Offers one packed block to the lists of a lane panel.
template <class E>
void search(const typename E::Lanes::T* lanes, const typename E::Lanes::T* bias, PackedMemory<E>& memory,
            BestLists<typename E::Lanes::T>& best, int64_t first_list) {
  using V = typename E::Lanes;
  using T = typename V::T;
  constexpr int64_t kLanes = kLanePanel<V>;
  const T* bars = best.bars() + first_list;
  for (int64_t i = 0; i < memory.panels(); ++i) {
    memory.score(i, lanes, bias, [&](TileSums<E>& scores) {
      uint32_t reached = 0;
      for (int r = 0; r < kTileRegisters; ++r) {
        // In this order, from a number on: a comparison with NaN is false and keeps what there was.
        typename V::Reg greatest = V::set1(-std::numeric_limits<T>::infinity());
#pragma GCC unroll 16
        for (int j = 0; j < kKeyPanel; ++j) greatest = scores[j][r] > greatest ? scores[j][r] : greatest;
        reached |= lanes_at_least<V>(greatest, V::load(bars + r * V::kLanes));
      }
      if (reached == 0) return;
      alignas(64) T tile[kKeyPanel * kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kKeyPanel; ++j)
#pragma GCC unroll 16
        for (int r = 0; r < kTileRegisters; ++r) V::store(tile + j * kLanes + r * V::kLanes, scores[j][r]);
      for (int j = 0; j < kKeyPanel; ++j) {
        for (int r = 0; r < kTileRegisters; ++r) {
          const T* row = tile + j * kLanes + r * V::kLanes;
          uint32_t lane_bits = lanes_at_least<V>(V::load(row), V::load(bars + r * V::kLanes));
          for (; lane_bits != 0; lane_bits &= lane_bits - 1) {
            const int lane = __builtin_ctz(lane_bits);
            best.insert(first_list + r * V::kLanes + lane, row[lane], memory.begin + i * kKeyPanel + j);
          }
        }
      }
    });
  }
}

template <class E>
void select_of_element(const ScoreInputs& in, int64_t n, int64_t top_k, typename E::Lanes::T* score,
                       int64_t* index) {
  using T = typename E::Lanes::T;
  constexpr int64_t kLanes = kLanePanel<typename E::Lanes>;
  PackedQueries<E> queries(in, n);
  PackedMemory<E> memory(in, n, T{1}, kSelectBlock);
  BestLists<T> best(queries.panels * kLanes, top_k);
  best.clear();
  for (int64_t p = in.queries(); p < queries.panels * kLanes; ++p) best.close(p);
  const ReadSpan span = read_span<T>(in, n);
  for (int64_t begin = span.begin; begin < span.end; begin += kSelectBlock) {
    memory.start(begin, std::min(kSelectBlock, span.end - begin));
    parallel_each(memory.panels(), [&](int64_t i) { memory.pack_panel(i); });
    parallel_tasks(queries.panels, [&] {
      return [&](int64_t i) {
        search<E>(queries.lanes(i), queries.has_bias ? queries.bias.data() + i * kLanes : nullptr, memory,
                  best, i * kLanes);
      };
    });
  }
  for (int64_t k = 0; k < top_k; ++k) {
    for (int64_t p = 0; p < in.queries(); ++p) {
      const int64_t m = best.indices(p)[k];
      const bool found = m != BestLists<T>::kNoIndex;
      score[k * in.queries() + p] = found ? best.scores(p)[k] : -std::numeric_limits<T>::infinity();
      index[k * in.queries() + p] = found ? m : -1;
    }
  }
}

#if defined(VOSOPS_AMX)
// Selects for some queries of batch element n by the FMA code.
void select_for(const std::vector<int64_t>& queries, const ScoreInputs& in, int64_t n, int64_t top_k,
                float* score, int64_t* index) {
  const int64_t count = static_cast<int64_t>(queries.size()), channels = in.query.size(1);
  Tensor query = torch::stable::new_empty(in.query, std::vector<int64_t>{in.batch(), channels, count},
                                          in.query.scalar_type());
  std::optional<Tensor> query_bias;
  if (in.query_bias)
    query_bias = torch::stable::new_empty(*in.query_bias, std::vector<int64_t>{in.batch(), count});
  for (int64_t i = 0; i < count; ++i) {
    dispatch_floating(in.query.scalar_type(), [&]<class S>(S) {
      const S* from = in.query.const_data_ptr<S>() + n * in.query.stride(0) + queries[i] * in.query.stride(2);
      S* to = query.mutable_data_ptr<S>() + n * channels * count + i;
      for (int64_t c = 0; c < channels; ++c) to[c * count] = from[c * in.query.stride(1)];
    });
    if (query_bias)
      query_bias->mutable_data_ptr<float>()[n * count + i] =
          OptionalRow<float>(in.query_bias, n, 0.f)[queries[i]];
  }
  const ScoreInputs some{query, in.key, in.shrinkage, query_bias, in.key_bias, in.scale};
  std::vector<float> scores(top_k * count);
  std::vector<int64_t> indices(top_k * count);
  select_of_element<FloatElement<Vec<float, kRegisterBytes>>>(some, n, top_k, scores.data(), indices.data());
  for (int64_t k = 0; k < top_k; ++k) {
    for (int64_t i = 0; i < count; ++i) {
      score[k * in.queries() + queries[i]] = scores[k * count + i];
      index[k * in.queries() + queries[i]] = indices[k * count + i];
    }
  }
}

// Selects by the matrix engine where it serves this problem; false: nothing was done. What it leaves is done
// in float32 as its own results are, whatever the dtype.
bool select_by_engine(const ScoreInputs& in, int64_t top_k, const Tensor& score, const Tensor& index) {
  if (!amx::selects(in, top_k) || !amx::ready()) return false;
  const int64_t size = top_k * in.queries();
  for (int64_t n = 0; n < in.batch(); ++n) {
    float* scores = score.mutable_data_ptr<float>() + n * size;
    int64_t* indices = index.mutable_data_ptr<int64_t>() + n * size;
    std::vector<int64_t> left;
    if (!amx::select_by_tiles(in, n, top_k, scores, indices, left)) {
      select_of_element<FloatElement<Vec<float, kRegisterBytes>>>(in, n, top_k, scores, indices);
    } else if (!left.empty()) {
      select_for(left, in, n, top_k, scores, indices);
    }
  }
  return true;
}

// The approximations (N, M, P) by which scores are chosen, and how far the scores may lie from them.
std::tuple<Tensor, Tensor> memory_select_bounds(const Tensor& query, const Tensor& key,
                                                const std::optional<Tensor>& shrinkage,
                                                const std::optional<Tensor>& query_bias,
                                                const std::optional<Tensor>& key_bias, double scale) {
  const ScoreInputs in{query, key, shrinkage, query_bias, key_bias, scale};
  check_scores(in);
  STD_TORCH_CHECK(key.scalar_type() != ScalarType::Double && amx::ready(), "AMX serves no such problem");
  const std::vector<int64_t> shape{in.batch(), in.memory(), in.queries()};
  Tensor approximation = torch::stable::new_empty(query, shape, ScalarType::Float);
  Tensor bound = torch::stable::new_empty(query, shape, ScalarType::Float);
  const int64_t size = in.memory() * in.queries();
  for (int64_t n = 0; n < in.batch(); ++n)
    amx::filter_bounds(in, n, approximation.mutable_data_ptr<float>() + n * size,
                       bound.mutable_data_ptr<float>() + n * size);
  return {approximation, bound};
}
#endif

std::tuple<Tensor, Tensor> memory_select(const Tensor& query, const Tensor& key,
                                         const std::optional<Tensor>& shrinkage,
                                         const std::optional<Tensor>& query_bias,
                                         const std::optional<Tensor>& key_bias, double scale,
                                         std::string_view, int64_t top_k) {
  const ScoreInputs in{query, key, shrinkage, query_bias, key_bias, scale};
  check_scores(in);
  STD_TORCH_CHECK(top_k >= 1, "top_k must be at least 1");
  const std::vector<int64_t> shape{in.batch(), top_k, in.queries()};
  Tensor score = torch::stable::new_empty(query, shape, accumulator_dtype(key.scalar_type()));
  Tensor index = torch::stable::new_empty(query, shape, ScalarType::Long);
#if defined(VOSOPS_AMX)
  if (select_by_engine(in, top_k, score, index)) return {score, index};
#endif
  const auto run = [&]<class E>(E) {
    using T = typename E::Lanes::T;
    const int64_t size = top_k * in.queries();
    for (int64_t n = 0; n < in.batch(); ++n) {
      select_of_element<E>(in, n, top_k, score.mutable_data_ptr<T>() + n * size,
                           index.mutable_data_ptr<int64_t>() + n * size);
    }
  };
  with_score_element(in, run);
  return {score, index};
}

// ---- Gather.

// The operands of a gather: weight and index are contiguous (N, K, P), value (N, O, C, M) of any strides.
template <class S>
struct Gather {
  using T = Accumulator<S>;
  int64_t batch, objects, channels, memory, top_k, queries;
  const T* weight;
  const int64_t* index;
  const S* value;
  int64_t batch_stride, object_stride, channel_stride, pixel_stride;

  Gather(const Tensor& weight_, const Tensor& index_, const Tensor& value_)
      : batch(value_.size(0)),
        objects(value_.size(1)),
        channels(value_.size(2)),
        memory(value_.size(3)),
        top_k(weight_.size(1)),
        queries(weight_.size(2)),
        weight(weight_.const_data_ptr<T>()),
        index(index_.const_data_ptr<int64_t>()),
        value(value_.const_data_ptr<S>()),
        batch_stride(value_.stride(0)),
        object_stride(value_.stride(1)),
        channel_stride(value_.stride(2)),
        pixel_stride(value_.stride(3)) {}

  bool channel_last() const { return channel_stride == 1; }
  const S* object(int64_t n, int64_t o) const { return value + n * batch_stride + o * object_stride; }
  int64_t query_tiles() const { return panels_of(queries, kGatherQueries); }
  int64_t channel_tiles() const { return panels_of(channels, kGatherChannels); }
};

// A register of values in the accumulator's type.
template <class V, class S>
typename V::Reg load_values(const S* from) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    typedef uint16_t Narrow __attribute__((vector_size(2 * V::kLanes)));
    Narrow bits;
    std::memcpy(&bits, from, sizeof bits);
    return (typename V::Reg)(__builtin_convertvector(bits, typename V::CodeReg) << 16);
  } else if constexpr (std::is_same_v<S, Half>) {
    alignas(64) float wide[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) wide[i] = widen(from[i]);
    return V::load(wide);
  } else {
    return V::load(from);
  }
}

// What one query reads: rows of values (null: none) and their weights.
template <class S>
struct Chosen {
  Workspace<const S*> rows;
  Workspace<Accumulator<S>> weights;

  explicit Chosen(int64_t top_k) : rows(top_k), weights(top_k) {}
};

// The weighted sum of rows, `channels` long. Sums stay in registers; the row after the next is fetched
// meanwhile, because nothing foretells where it lies.
template <class S>
void add_rows(Chosen<S>& chosen, int64_t top_k, int64_t channels, Accumulator<S>* out) {
  using V = Vec<Accumulator<S>, kRegisterBytes>;
  constexpr int kSums = kRegisters / 2, kWidth = kSums * V::kLanes;
  constexpr int64_t kAhead = 2, kLine = 64 / sizeof(S);
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) {
    typename V::Reg sums[kSums]{};
    for (int64_t k = 0; k < top_k; ++k) {
      const S* next = chosen.rows[std::min(k + kAhead, top_k - 1)];
      if (next != nullptr)
        for (int64_t i = 0; i < kWidth; i += kLine) __builtin_prefetch(next + c + i);
      const S* row = chosen.rows[k];
      if (row == nullptr) continue;
      const typename V::Reg weight = V::set1(chosen.weights[k]);
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i)
        sums[i] = V::fma(weight, load_values<V>(row + c + i * V::kLanes), sums[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) V::store(out + c + i * V::kLanes, sums[i]);
  }
  std::fill(out + c, out + channels, Accumulator<S>{0});
  for (int64_t k = 0; k < top_k && c < channels; ++k) {
    if (chosen.rows[k] == nullptr) continue;
    for (int64_t i = c; i < channels; ++i) out[i] += chosen.weights[k] * widen(chosen.rows[k][i]);
  }
}

// out (N, O, C, P): one tile of queries of one object, channel-last values.
template <class S>
void gather_rows(const Gather<S>& in, int64_t n, int64_t o, int64_t first, Chosen<S>& chosen,
                 Accumulator<S>* sums, S* out) {
  const int64_t count = std::min(kGatherQueries, in.queries - first);
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t k = 0; k < in.top_k; ++k) {
      const int64_t at = (n * in.top_k + k) * in.queries + first + p;
      chosen.rows[k] = in.index[at] < 0 ? nullptr : in.object(n, o) + in.index[at] * in.pixel_stride;
      chosen.weights[k] = in.weight[at];
    }
    add_rows(chosen, in.top_k, in.channels, sums + p * in.channels);
  }
  S* target = out + (n * in.objects + o) * in.channels * in.queries + first;
  for (int64_t c = 0; c < in.channels; ++c)
    for (int64_t p = 0; p < count; ++p)
      target[c * in.queries + p] = static_cast<S>(sums[p * in.channels + c]);
}

// The same for all queries and kGatherChannels channels of values of any strides.
template <class S>
void gather_channels(const Gather<S>& in, int64_t n, int64_t o, int64_t first, Accumulator<S>* sums, S* out) {
  const int64_t count = std::min(kGatherChannels, in.channels - first);
  const S* rows[kGatherChannels];
  for (int64_t c = 0; c < kGatherChannels; ++c)
    rows[c] = in.object(n, o) + (first + std::min(c, count - 1)) * in.channel_stride;
  std::fill_n(sums, kGatherChannels * in.queries, Accumulator<S>{0});
  for (int64_t k = 0; k < in.top_k; ++k) {
    const int64_t at = (n * in.top_k + k) * in.queries;
    for (int64_t p = 0; p < in.queries; ++p) {
      const int64_t m = in.index[at + p];
      if (m < 0) continue;
      for (int64_t c = 0; c < kGatherChannels; ++c)
        sums[p * kGatherChannels + c] += in.weight[at + p] * widen(rows[c][m * in.pixel_stride]);
    }
  }
  S* target = out + ((n * in.objects + o) * in.channels + first) * in.queries;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t p = 0; p < in.queries; ++p)
      target[c * in.queries + p] = static_cast<S>(sums[p * kGatherChannels + c]);
}

void check_gather(const Tensor& weight, const Tensor& index, const Tensor& value) {
  check_shape("value", value, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("weight", weight, {value.size(0), kAnySize, kAnySize});
  check_dtype("weight", weight, accumulator_dtype(value.scalar_type()));
  check_shape("index", index, {value.size(0), weight.size(1), weight.size(2)});
  check_dtype("index", index, ScalarType::Long);
}

Tensor memory_gather(const Tensor& weight, const Tensor& index, const Tensor& value) {
  check_gather(weight, index, value);
  const Tensor weights = torch::stable::contiguous(weight), indices = torch::stable::contiguous(index);
  Tensor out = torch::stable::new_empty(
      value, std::vector<int64_t>{value.size(0), value.size(1), value.size(2), weight.size(2)});
  dispatch_floating(value.scalar_type(), [&]<class S>(S) {
    const Gather<S> in(weights, indices, value);
    S* result = out.mutable_data_ptr<S>();
    const int64_t tiles = in.channel_last() ? in.query_tiles() : in.channel_tiles();
    const int64_t buffer = in.channel_last() ? kGatherQueries * in.channels : kGatherChannels * in.queries;
    parallel_tasks(in.batch * in.objects * tiles, [&] {
      return
          [&, sums = Workspace<Accumulator<S>>(buffer), chosen = Chosen<S>(in.top_k)](int64_t task) mutable {
            const int64_t n = task / tiles / in.objects, o = task / tiles % in.objects, tile = task % tiles;
            if (in.channel_last()) {
              gather_rows(in, n, o, tile * kGatherQueries, chosen, sums.data(), result);
            } else {
              gather_channels(in, n, o, tile * kGatherChannels, sums.data(), result);
            }
          };
    });
  });
  return out;
}

// Gradient of the weights of one tile of queries: sum over objects and channels of grad * value[index].
template <class S>
void weight_gradient(const Gather<S>& in, int64_t n, int64_t first, const S* grad, Accumulator<S>* sums,
                     Accumulator<S>* grads, Accumulator<S>* out) {
  using T = Accumulator<S>;
  const int64_t count = std::min(kGatherQueries, in.queries - first);
  std::fill_n(sums, in.top_k * kGatherQueries, T{0});
  const int64_t base = n * in.top_k * in.queries + first;
  for (int64_t o = 0; o < in.objects; ++o) {
    const S* source = grad + (n * in.objects + o) * in.channels * in.queries + first;
    for (int64_t c = 0; c < in.channels; ++c)
      for (int64_t p = 0; p < count; ++p) grads[p * in.channels + c] = widen(source[c * in.queries + p]);
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t k = 0; k < in.top_k; ++k) {
        const int64_t m = in.index[base + k * in.queries + p];
        if (m < 0) continue;
        const S* row = in.object(n, o) + m * in.pixel_stride;
        T parts[16] = {};  // partial sums let the loop run in lanes
        int64_t c = 0;
        for (; c + 16 <= in.channels; c += 16)
          for (int64_t i = 0; i < 16; ++i)
            parts[i] += grads[p * in.channels + c + i] * widen(row[(c + i) * in.channel_stride]);
        T sum = 0;
        for (; c < in.channels; ++c) sum += grads[p * in.channels + c] * widen(row[c * in.channel_stride]);
        for (T part : parts) sum += part;
        sums[k * kGatherQueries + p] += sum;
      }
    }
  }
  for (int64_t k = 0; k < in.top_k; ++k)
    for (int64_t p = 0; p < count; ++p) out[base + k * in.queries + p] = sums[k * kGatherQueries + p];
}

// Gradient of one channel of the values: weight * grad summed over the queries that chose each position.
template <class S>
void value_gradient(const Gather<S>& in, int64_t n, const S* grad, Accumulator<S>* sums, S* out) {
  std::fill_n(sums, in.memory, Accumulator<S>{0});
  for (int64_t k = 0; k < in.top_k; ++k) {
    const int64_t at = (n * in.top_k + k) * in.queries;
    for (int64_t p = 0; p < in.queries; ++p) {
      const int64_t m = in.index[at + p];
      if (m >= 0) sums[m] += in.weight[at + p] * widen(grad[p]);
    }
  }
  for (int64_t m = 0; m < in.memory; ++m) out[m] = static_cast<S>(sums[m]);
}

std::tuple<Tensor, Tensor> memory_gather_backward(const Tensor& grad, const Tensor& weight,
                                                  const Tensor& index, const Tensor& value) {
  check_gather(weight, index, value);
  check_shape("grad", grad, {value.size(0), value.size(1), value.size(2), weight.size(2)});
  check_dtype("grad", grad, value.scalar_type());
  const Tensor weights = torch::stable::contiguous(weight), indices = torch::stable::contiguous(index),
               grads = torch::stable::contiguous(grad);
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  dispatch_floating(value.scalar_type(), [&]<class S>(S) {
    using T = Accumulator<S>;
    const Gather<S> in(weights, indices, value);
    const S* g = grads.const_data_ptr<S>();
    parallel_tasks(in.batch * in.query_tiles(), [&] {
      return [&, sums = Workspace<T>(in.top_k * kGatherQueries),
              columns = Workspace<T>(kGatherQueries * in.channels)](int64_t task) mutable {
        weight_gradient(in, task / in.query_tiles(), task % in.query_tiles() * kGatherQueries, g, sums.data(),
                        columns.data(), grad_weight.mutable_data_ptr<T>());
      };
    });
    const int64_t rows = in.objects * in.channels;
    parallel_tasks(in.batch * rows, [&] {
      return [&, sums = Workspace<T>(in.memory)](int64_t row) mutable {
        value_gradient(in, row / rows, g + row * in.queries, sums.data(),
                       grad_value.mutable_data_ptr<S>() + row * in.memory);
      };
    });
  });
  return {grad_weight, grad_value};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("memory_select", TORCH_BOX(&vosops::cpu::memory_select));
#if defined(VOSOPS_AMX)
  m.impl("memory_select_bounds", TORCH_BOX(&vosops::cpu::memory_select_bounds));
#endif
  m.impl("memory_gather", TORCH_BOX(&vosops::cpu::memory_gather));
  m.impl("memory_gather_backward", TORCH_BOX(&vosops::cpu::memory_gather_backward));
}
