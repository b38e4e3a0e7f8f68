// The memory read on the CPU: softmax over the memory in a streaming pass, two matrix products a block.
//
// The memory is taken in blocks of kMemoryBlock positions, packed once into key panels (scores) and channel
// panels (values). For each block the lane panels of query pixels are shared out over the threads: scores
// come out of the first product in registers, keep their running maximum per lane, become weights 2^(score -
// maximum) in a tile of kMemoryBlock x kLanePanel that fits the second-level cache, and this tile is the lane
// panel of the second product with the values, whose sums are scaled to the new maximum where they are
// loaded. Bytes: the memory is read once per kAccumulatorBytes of sums; the affinity matrix never exists.
// Positions of bias -inf before the first that is read and behind the last are left out.
// Floor: 2 (C + O Cv) operations per pair of query and memory position at the FMA rate.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/gemm.h"
#include "cpu/memory_read_amx.h"
#include "cpu/memory_scores.h"
#include "cpu/memory_values.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace vosops::cpu {
namespace {

constexpr int64_t kAccumulatorBytes = 24 << 20;

// Zeros in a channel panel of values (positions in elements of F, kKeyPanel) for the positions of bias -inf:
// weight 0 times what lies there could be NaN.
template <class F, class T>
void clear_excluded(const OptionalRow<T>& bias, int64_t begin, int64_t count, T* panel) {
  if (bias.data == nullptr) return;
  for (int64_t m = 0; m < count; ++m) {
    if (bias[begin + m] != -std::numeric_limits<T>::infinity()) continue;
    T* element = panel + panel_at<F>(m / F::kChannels, 0, kKeyPanel);
    for (int64_t j = 0; j < kKeyPanel; ++j) F::clear(element[j * F::kRun], m % F::kChannels);
  }
}

template <class V>
typename V::Reg greater(typename V::Reg a, typename V::Reg b) {
  return a > b ? a : b;
}

// The running softmax of one lane panel.
template <class V>
struct Running {
  using T = typename V::T;
  alignas(64) T maximum[kLanePanel<V>], sum[kLanePanel<V>];

  void clear() {
    std::fill_n(maximum, kLanePanel<V>, std::numeric_limits<T>::lowest());
    std::fill_n(sum, kLanePanel<V>, T{0});
  }
};

// One worker thread: the tile of weights. E multiplies keys, F values.
template <class E, class F>
class Reader {
  using V = typename E::Lanes;
  using T = typename V::T;
  using Reg = typename V::Reg;
  static constexpr int kLanes = kLanePanel<V>;

 public:
  Reader() : tile_(kMemoryBlock * kLanes), pairs_(F::kChannels == 2 ? kMemoryBlock / 2 * kLanes : 0) {}

  // Reads one packed block: value panel i at values + i * value_stride, sums of channel panel i (kKeyPanel,
  // kLanes).
  void read(const T* lanes, const T* query_bias, PackedMemory<E>& memory, const T* values,
            int64_t value_stride, int64_t value_panels, Running<V>& running, T* sums) {
    Reg maximum[kTileRegisters], rescale[kTileRegisters];
    for (int r = 0; r < kTileRegisters; ++r) maximum[r] = V::load(running.maximum + r * V::kLanes);
    for (int64_t i = 0; i < memory.panels(); ++i) {
      T* rows = tile_.data() + i * kKeyPanel * kLanes;
      memory.score(i, lanes, query_bias, [&](TileSums<E>& scores) {
#pragma GCC unroll 16
        for (int j = 0; j < kKeyPanel; ++j) {
#pragma GCC unroll 16
          for (int r = 0; r < kTileRegisters; ++r) {
            maximum[r] = greater<V>(scores[j][r], maximum[r]);
            V::store(rows + j * kLanes + r * V::kLanes, scores[j][r]);
          }
        }
      });
    }
    const int64_t rows = memory.panels() * kKeyPanel;
    for (int r = 0; r < kTileRegisters; ++r) {
      rescale[r] = exp2_of_negative<V>(V::load(running.maximum + r * V::kLanes) - maximum[r]);
      Reg sum = V::load(running.sum + r * V::kLanes) * rescale[r];
      for (int64_t m = 0; m < rows; ++m) {
        T* weight = tile_.data() + m * kLanes + r * V::kLanes;
        const Reg w = exp2_of_negative<V>(V::load(weight) - maximum[r]);
        sum += w;
        V::store(weight, w);
      }
      V::store(running.maximum + r * V::kLanes, maximum[r]);
      V::store(running.sum + r * V::kLanes, sum);
    }
    const T* weights = as_elements(rows);
    for (int64_t i = 0; i < value_panels; ++i) {
      T* sum = sums + i * kKeyPanel * kLanes;
      multiply<F>(
          weights, values + i * value_stride, elements_of<F>(rows),
          [&](int j, int r) { return V::load(sum + j * kLanes + r * V::kLanes) * rescale[r]; },
          [&](const TileSums<F>& result) {
#pragma GCC unroll 16
            for (int j = 0; j < kKeyPanel; ++j) {
#pragma GCC unroll 16
              for (int r = 0; r < kTileRegisters; ++r)
                V::store(sum + j * kLanes + r * V::kLanes, result[j][r]);
            }
          });
    }
  }

 private:
  // The tile of weights as elements of F: itself, or rounded to pairs of bfloat16 (of two memory positions).
  const T* as_elements(int64_t rows) {
    if constexpr (F::kChannels == 1) {
      return tile_.data();
    } else {
      constexpr int kRows = F::kRun * 2;
      static_assert(kKeyPanel % kRows == 0);
      for (int64_t m = 0; m < rows; m += kRows) {
        T* run = pairs_.data() + m / 2 * kLanes;
        for (int i = 0; i < kLanes; i += V::kLanes, run += F::kRun * V::kLanes) {
          Reg pair[F::kRun];
          for (int k = 0; k < F::kRun; ++k) {
            const T* low = tile_.data() + (m + 2 * k) * kLanes + i;
            pair[k] = F::round_pair(V::load(low), V::load(low + kLanes));
          }
          if constexpr (F::kRun == 1) {
            V::store(run, pair[0]);
          } else {
            V::store(run, interleave<V::kLanes, false>(pair[0], pair[1]));
            V::store(run + V::kLanes, interleave<V::kLanes, true>(pair[0], pair[1]));
          }
        }
      }
      return pairs_.data();
    }
  }

  Workspace<T> tile_;   // (kMemoryBlock, kLanes): scores, then weights
  Workspace<T> pairs_;  // (kMemoryBlock / 2, kLanes)
};

template <class E, class F>
void read_element(const ScoreInputs& in, const Values& value, int64_t n, Tensor& out, Tensor& lse) {
  using V = typename E::Lanes;
  using T = typename V::T;
  constexpr int64_t kLanes = kLanePanel<V>;
  static_assert(kMemoryBlock % kKeyPanel == 0 && kMemoryBlock % kLanes == 0 && kMemoryBlock % 2 == 0);
  const std::vector<ChannelPanel> channels = channel_panels(value.objects(), value.channels());
  const int64_t value_panels = static_cast<int64_t>(channels.size());
  const ReadSpan span = read_span<T>(in, n);
  PackedQueries<E> queries(in, n);
  PackedMemory<E> memory(in, n, static_cast<T>(kLog2E));
  constexpr int64_t kValueStride = kMemoryBlock / F::kChannels * kKeyPanel;
  Workspace<T> values(value_panels * kValueStride);

  const int64_t sums_size = value_panels * kKeyPanel * kLanes;
  const int64_t most = std::max<int64_t>(16, kAccumulatorBytes / std::max<int64_t>(1, sums_size * sizeof(T)));
  const int64_t at_once = std::min(queries.panels, most);
  Workspace<T> sums(at_once * sums_size);
  std::vector<Running<V>> running(at_once);
  for (int64_t first = 0; first < queries.panels; first += at_once) {
    const int64_t panels = std::min(at_once, queries.panels - first);
    parallel_each(panels, [&](int64_t i) {
      running[i].clear();
      std::fill_n(sums.data() + i * sums_size, sums_size, T{0});
    });
    for (int64_t begin = span.begin; begin < span.end; begin += kMemoryBlock) {
      memory.start(begin, std::min(kMemoryBlock, span.end - begin));
      parallel_each(memory.panels() + value_panels, [&](int64_t i) {
        if (i < memory.panels()) return memory.pack_panel(i);
        const ChannelPanel& panel = channels[i - memory.panels()];
        StridedMatrix matrix =
            transposed(value.tensor(panel.object), n, value.within(panel.object), begin, memory.count);
        T* target = values.data() + (i - memory.panels()) * kValueStride;
        pack_pixels<F, kKeyPanel>(matrix, panel.first, panel.count, target);
        clear_excluded<F>(OptionalRow<T>(in.key_bias, n, T{0}), begin, memory.count, target);
        const int64_t used = elements_of<F>(memory.count) * kKeyPanel;
        std::fill(target + used, target + memory.panels() * kKeyPanel / F::kChannels * kKeyPanel, T{0});
      });
      parallel_tasks(panels, [&] {
        return [&, reader = Reader<E, F>()](int64_t i) mutable {
          reader.read(queries.lanes(first + i),
                      queries.has_bias ? queries.bias.data() + (first + i) * kLanes : nullptr, memory,
                      values.data(), kValueStride, value_panels, running[i], sums.data() + i * sums_size);
        };
      });
    }
    T* lse_row = lse.mutable_data_ptr<T>() + n * in.queries();
    dispatch_floating(out.scalar_type(), [&]<class S>(S) {
      S* result = out.mutable_data_ptr<S>() + n * value.objects() * value.channels() * in.queries();
      parallel_each(panels, [&](int64_t i) {
        const int64_t p0 = (first + i) * kLanes, count = queries.count(first + i);
        T inverse[kLanes];
        for (int64_t p = 0; p < count; ++p) {
          const T total = running[i].sum[p];
          inverse[p] = total == 0 ? T{0} : 1 / total;
          lse_row[p0 + p] = total == 0 ? -std::numeric_limits<T>::infinity()
                                       : (running[i].maximum[p] + std::log2(total)) / static_cast<T>(kLog2E);
        }
        for (int64_t c = 0; c < value_panels; ++c) {
          const ChannelPanel& panel = channels[c];
          for (int64_t j = 0; j < panel.count; ++j) {
            const T* sum = sums.data() + i * sums_size + (c * kKeyPanel + j) * kLanes;
            S* row = result + (panel.object * value.channels() + panel.first + j) * in.queries() + p0;
            for (int64_t p = 0; p < count; ++p) row[p] = static_cast<S>(sum[p] * inverse[p]);
          }
        }
      });
    });
  }
}

// Calls f(E, F): the elements of scores and of values of dtype `value`.
template <class Function>
void with_elements(const ScoreInputs& in, ScalarType value, const Function& f) {
  with_score_element(in, [&]<class E>(E element) {
#if defined(VOSOPS_BF16_DOT)
    if constexpr (std::is_same_v<typename E::Lanes::T, float>) {
      if (value == ScalarType::BFloat16 && has_bf16_dot()) return f(element, Bf16Element{});
    }
#endif
    f(element, FloatElement<typename E::Lanes>{});
  });
}

std::tuple<Tensor, Tensor> read_values(const ScoreInputs& in, std::span<const Tensor> tensors,
                                       std::string_view precision) {
  check_scores(in);
  STD_TORCH_CHECK(!tensors.empty(), "values must hold a tensor");
  for (const Tensor& value : tensors) {
    check_value(in, value);
    check_dtype("values", value, tensors[0].scalar_type());
    STD_TORCH_CHECK(value.size(2) == tensors[0].size(2), "values must have equal channels");
  }
  const Values values(tensors);
  const std::vector<int64_t> shape{in.batch(), values.objects(), values.channels(), in.queries()};
  Tensor out = torch::stable::new_empty(tensors[0], shape);
  Tensor lse = torch::stable::new_empty(in.query, std::vector<int64_t>{in.batch(), in.queries()},
                                        accumulator_dtype(in.key.scalar_type()));
#if defined(VOSOPS_AMX)
  if (read_by_tiles(in, values, precision, out, lse)) return {out, lse};
#endif
  with_elements(in, values.dtype(), [&]<class E, class F>(E, F) {
    for (int64_t n = 0; n < in.batch(); ++n) read_element<E, F>(in, values, n, out, lse);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> memory_read(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const std::optional<Tensor>& shrinkage,
                                       const std::optional<Tensor>& query_bias,
                                       const std::optional<Tensor>& key_bias, double scale,
                                       std::string_view precision) {
  return read_values({query, key, shrinkage, query_bias, key_bias, scale}, std::span(&value, 1), precision);
}

std::tuple<Tensor, Tensor> memory_read_list(const Tensor& query, const Tensor& key,
                                            const std::vector<Tensor>& values,
                                            const std::optional<Tensor>& shrinkage,
                                            const std::optional<Tensor>& query_bias,
                                            const std::optional<Tensor>& key_bias, double scale,
                                            std::string_view precision) {
  return read_values({query, key, shrinkage, query_bias, key_bias, scale}, values, precision);
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("memory_read", TORCH_BOX(&vosops::cpu::memory_read));
  m.impl("memory_read_list", TORCH_BOX(&vosops::cpu::memory_read_list));
}
