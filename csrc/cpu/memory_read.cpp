// The memory read on the CPU: softmax over the memory in a streaming pass, two matrix products a block.
//
// The memory is taken in blocks of kMemoryBlock positions, packed once into key panels (scores) and channel
// panels (values). For each block the lane panels of query pixels are shared out over the threads: scores
// come out of the first product in registers, keep their running maximum per lane, become weights 2^(score -
// maximum) in a tile of kMemoryBlock x kLanePanel that fits the second-level cache, and this tile is the lane
// panel of the second product with the values, whose sums are scaled to the new maximum where they are
// loaded. Bytes: the memory is read once per kAccumulatorBytes of sums; the affinity matrix never exists.
// Floor: 2 (C + O Cv) operations per pair of query and memory position at the FMA rate.
//
// The backward pass recomputes the weights from the saved log-sum-exp. Per block of kBackwardBlock positions,
// (1) each lane panel sums V^T G over chunks of kChunkChannels channels, computes weights A and score
// gradients dS = A (V^T G - D), adds K dS to its query gradient and stores A and dS transposed; (2) each
// group of memory positions reduces them over all queries to the gradients of values and keys. G is read
// where it lies, so that little is held beside the gradients. No two tasks write one place, so the result
// does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/gemm.h"
#include "cpu/memory_scores.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace vosops::cpu {
namespace {

constexpr int64_t kAccumulatorBytes = 24 << 20;
constexpr int64_t kRunBytes = 512 << 10;
constexpr int64_t kBackwardBlock = 192;  // memory positions: a multiple of both panel widths
constexpr int64_t kChunkChannels = 512;
constexpr int64_t kConflictBytes = 1024;  // rows a multiple of this apart are copied side by side
constexpr double kLog2E = 1.4426950408889634;

// The channels of the values of all objects in groups of kKeyPanel that do not cross objects.
struct ChannelPanel {
  int64_t object, first, count;
};

// The values of all objects, (N, O, C, M) each, as if they were one tensor.
class Values {
 public:
  explicit Values(std::span<const Tensor> tensors) : tensors_(tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      for (int64_t o = 0; o < tensors[i].size(1); ++o) places_.push_back({i, o});
    }
  }
  int64_t objects() const { return static_cast<int64_t>(places_.size()); }
  int64_t channels() const { return tensors_[0].size(2); }
  ScalarType dtype() const { return tensors_[0].scalar_type(); }
  const Tensor& tensor(int64_t object) const { return tensors_[places_[object].tensor]; }
  int64_t within(int64_t object) const { return places_[object].object; }

 private:
  struct Place {
    size_t tensor;
    int64_t object;
  };
  std::span<const Tensor> tensors_;
  std::vector<Place> places_;
};

std::vector<ChannelPanel> channel_panels(int64_t objects, int64_t channels) {
  std::vector<ChannelPanel> panels;
  for (int64_t o = 0; o < objects; ++o) {
    for (int64_t c = 0; c < channels; c += kKeyPanel)
      panels.push_back({o, c, std::min<int64_t>(kKeyPanel, channels - c)});
  }
  return panels;
}

// Rows (c, i) of one object of an (N, O, C, pixels) tensor, channels and pixels exchanged: "channels" run
// over pixels [begin, begin + count), "pixels" over channels.
StridedMatrix transposed(const Tensor& tensor, int64_t n, int64_t object, int64_t begin, int64_t count) {
  StridedMatrix matrix =
      StridedMatrix::of(tensor, n * tensor.stride(0) + object * tensor.stride(1) + begin * tensor.stride(3));
  std::swap(matrix.channel_stride, matrix.pixel_stride);
  matrix.channels = count;
  return matrix;
}

// Zeros in a channel panel of values (positions in elements of F, kKeyPanel) for the positions of bias -inf:
// weight 0 times what lies there could be NaN.
template <class F, class T>
void clear_excluded(const OptionalRow<T>& bias, int64_t begin, int64_t count, T* panel) {
  if (bias.data == nullptr) return;
  for (int64_t m = 0; m < count; ++m) {
    if (bias[begin + m] != -std::numeric_limits<T>::infinity()) continue;
    T* element = panel + m / F::kChannels * kKeyPanel;
    for (int64_t j = 0; j < kKeyPanel; ++j) F::clear(element[j], m % F::kChannels);
  }
}

template <class V>
typename V::Reg greater(typename V::Reg a, typename V::Reg b) {
  return a > b ? a : b;
}

// ---- Forward.

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
      for (int64_t m = 0; m < rows; m += 2) {
        for (int i = 0; i < kLanes; i += V::kLanes) {
          const T* low = tile_.data() + m * kLanes + i;
          V::store(pairs_.data() + m / 2 * kLanes + i, F::round_pair(V::load(low), V::load(low + kLanes)));
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
    for (int64_t begin = 0; begin < in.memory(); begin += kMemoryBlock) {
      memory.start(begin, std::min(kMemoryBlock, in.memory() - begin));
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
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<typename E::Lanes::T, float>) {
      if (value == ScalarType::BFloat16 && has_bf16_dot())
        return f(element, Bf16PairElement<Vec<float, 64>>{});
    }
#endif
    f(element, FloatElement<typename E::Lanes>{});
  });
}

void check_value(const ScoreInputs& in, const Tensor& value) {
  check_shape("value", value, {in.batch(), kAnySize, kAnySize, in.memory()});
  STD_TORCH_CHECK((value.scalar_type() == ScalarType::Double) == (in.key.scalar_type() == ScalarType::Double),
                  "value must be float64 exactly where key is");
}

std::tuple<Tensor, Tensor> read_values(const ScoreInputs& in, std::span<const Tensor> tensors) {
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
  with_elements(in, values.dtype(), [&]<class E, class F>(E, F) {
    for (int64_t n = 0; n < in.batch(); ++n) read_element<E, F>(in, values, n, out, lse);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> memory_read(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const std::optional<Tensor>& shrinkage,
                                       const std::optional<Tensor>& query_bias,
                                       const std::optional<Tensor>& key_bias, double scale,
                                       std::string_view) {
  return read_values({query, key, shrinkage, query_bias, key_bias, scale}, std::span(&value, 1));
}

std::tuple<Tensor, Tensor> memory_read_list(const Tensor& query, const Tensor& key,
                                            const std::vector<Tensor>& values,
                                            const std::optional<Tensor>& shrinkage,
                                            const std::optional<Tensor>& query_bias,
                                            const std::optional<Tensor>& key_bias, double scale,
                                            std::string_view) {
  return read_values({query, key, shrinkage, query_bias, key_bias, scale}, values);
}

// ---- What the backward pass and the usage share: weights recomputed from the log-sum-exp.

// The log-sum-exp of one batch element in powers of two, per lane; +inf, which makes every weight 0, where
// there is no query or nothing was read.
template <class E>
struct PackedLse {
  using T = typename E::Lanes::T;
  Workspace<T> data;

  PackedLse(const Tensor& lse, int64_t n, const PackedQueries<E>& queries)
      : data(queries.panels * PackedQueries<E>::kLanes) {
    const T* row = lse.const_data_ptr<T>() + n * lse.stride(0);
    for (int64_t p = 0; p < queries.panels * PackedQueries<E>::kLanes; ++p) {
      const T value = p < queries.queries ? row[p * lse.stride(1)] : -std::numeric_limits<T>::infinity();
      data[p] = value == -std::numeric_limits<T>::infinity() ? -value : value * static_cast<T>(kLog2E);
    }
  }
};

// ---- Backward.

// Gradients of one batch element; the tensors are (N, ...) and contiguous, undefined where there was no
// input.
struct Gradients {
  Tensor query, key, value, shrinkage, query_bias, key_bias;
};

// Element n of a (N, ..., channels, pixels) tensor as rows of adjacent T, one for each channel: where they
// lie, or copied where the tensor is of another dtype or its pixels are apart.
template <class E>
class Rows {
  using T = typename E::Lanes::T;

 public:
  Rows(const Tensor& tensor, int64_t n)
      : channels_(tensor.size(tensor.dim() - 2)),
        pixels_(tensor.size(tensor.dim() - 1)),
        objects_(tensor.dim() == 4 ? tensor.size(1) : 1),
        in_place_(tensor.stride(tensor.dim() - 1) == 1 && tensor.scalar_type() == kDtype),
        copy_(in_place_ ? 0 : objects_ * channels_ * pixels_) {
    if (in_place_) {
      data_ = tensor.const_data_ptr<T>() + n * tensor.stride(0);
      object_stride_ = tensor.dim() == 4 ? tensor.stride(1) : 0;
      channel_stride_ = tensor.stride(tensor.dim() - 2);
      return;
    }
    data_ = copy_.data();
    channel_stride_ = pixels_;
    object_stride_ = channels_ * pixels_;
    parallel_each(objects_ * channels_, [&](int64_t row) {
      const int64_t object = row / channels_, channel = row % channels_;
      const int64_t within = tensor.dim() == 4 ? object * tensor.stride(1) : 0;
      const int64_t offset = n * tensor.stride(0) + within + channel * tensor.stride(tensor.dim() - 2);
      dispatch_floating(tensor.scalar_type(), [&]<class S>(S) {
        const S* source = tensor.const_data_ptr<S>() + offset;
        T* target = copy_.data() + row * pixels_;
        for (int64_t p = 0; p < pixels_; ++p)
          target[p] = static_cast<T>(widen(source[p * tensor.stride(tensor.dim() - 1)]));
      });
    });
  }

  // The rows of a channel panel; a row that the panel does not have is its last one.
  std::array<const T*, kKeyPanel> of(const ChannelPanel& panel) const {
    std::array<const T*, kKeyPanel> rows;
    for (int64_t j = 0; j < kKeyPanel; ++j)
      rows[j] = row(panel.object, panel.first + std::min(j, panel.count - 1));
    return rows;
  }

  // Where the rows of channels [first, ...) of all objects begin, if these are as far from each other as the
  // channels, and not so that they share sets of the cache; else null.
  const T* even(int64_t first) const {
    const bool is_even = objects_ == 1 || object_stride_ == channels_ * channel_stride_;
    const bool conflict = channel_stride_ * static_cast<int64_t>(sizeof(T)) % kConflictBytes == 0;
    return is_even && !conflict ? data_ + first * channel_stride_ : nullptr;
  }
  int64_t channel_stride() const { return channel_stride_; }

  // `count` channels of one object.
  StridedMatrix matrix(int64_t object, int64_t first, int64_t count) const {
    return {row(object, first), kDtype, count, channel_stride_, 1};
  }

 private:
  static constexpr ScalarType kDtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

  const T* row(int64_t object, int64_t channel) const {
    return data_ + object * object_stride_ + channel * channel_stride_;
  }

  int64_t channels_, pixels_, objects_;
  bool in_place_;
  Workspace<T> copy_;
  const T* data_;
  int64_t object_stride_, channel_stride_;
};

template <class E>
class BackwardElement {
  using V = typename E::Lanes;
  using T = typename V::T;
  using Reg = typename V::Reg;
  static constexpr int64_t kLanes = kLanePanel<V>;
  static_assert(kBackwardBlock % kKeyPanel == 0 && kBackwardBlock % kLanes == 0);

 public:
  BackwardElement(const ScoreInputs& in, const Tensor& value, const Tensor& grad_out, const Tensor& grad_lse,
                  const Tensor& out, const Tensor& lse, int64_t n, Gradients& gradients)
      : in_(in),
        value_(value),
        n_(n),
        positions_(in.memory()),
        objects_(value.size(1)),
        channels_(value.size(2)),
        gradients_(gradients),
        values_(channel_panels(objects_, channels_)),
        keys_(channel_panels(1, in.query.size(1))),
        value_channels_(objects_ * channels_),
        chunk_(std::clamp<int64_t>(value_channels_, 1, kChunkChannels)),
        queries_(in, n),
        memory_(in, n, static_cast<T>(kLog2E), kBackwardBlock),
        lse_(lse, n, queries_),
        rows_(queries_.panels * kLanes),
        grads_(grad_out, n),
        query_rows_(in.query, n),
        base_(rows_),
        query_sums_(queries_.panels * query_sum_size()),
        bias_sums_(rows_),
        value_keys_(kBackwardBlock * chunk_),
        key_channels_(static_cast<int64_t>(keys_.size()) * kBackwardBlock * kKeyPanel),
        weights_(kBackwardBlock * rows_),
        slopes_(kBackwardBlock * rows_) {
    start(out, grad_lse);
  }

  void run() {
    for (int64_t begin = 0; begin < positions_; begin += kBackwardBlock) {
      memory_.start(begin, std::min(kBackwardBlock, positions_ - begin));
      pack_keys();
      for (int64_t first = 0; first == 0 || first < value_channels_; first += chunk_) {
        const int64_t last = std::min(first + chunk_, value_channels_);
        pack_values(first, last);
        parallel_tasks(queries_.panels, [&] {
          return [&, lanes = Workspace<T>(chunk_ * kLanes), weights = Workspace<T>(kBackwardBlock * kLanes),
                  slopes = Workspace<T>(kBackwardBlock * kLanes)](int64_t i) mutable {
            add_products(first, last, i, lanes.data());
            if (last == value_channels_) differentiate(i, weights.data(), slopes.data());
          };
        });
      }
      const int64_t groups = panels_of(memory_.count, kLanes), run = groups_in_a_run(),
                    value_panels = static_cast<int64_t>(values_.size());
      parallel_tasks(panels_of(groups, run) * value_panels, [&] {
        return [&](int64_t task) {
          const int64_t first = task / value_panels * run;
          write_value(first, std::min(first + run, groups), values_[task % value_panels]);
        };
      });
      parallel_tasks(groups, [&] {
        return [&, sums = Workspace<T>(keys_.size() * kKeyPanel * kLanes)](int64_t group) mutable {
          write_key(group, sums.data());
        };
      });
    }
    write_query();
  }

 private:
  int64_t query_sum_size() const { return static_cast<int64_t>(keys_.size()) * kKeyPanel * kLanes; }

  // Where row m of the block and lane panel i lie in slopes_: in tiles of kLanes x kLanes, which transposing
  // leaves in their places.
  T* products(int64_t m, int64_t i) {
    return slopes_.data() + (m / kLanes * rows_ + i * kLanes + m % kLanes) * kLanes;
  }

  // Calls f(object, first channel, channels, channels before them) for the parts of channels [first, last) of
  // all objects that belong to one object.
  template <class F>
  void each_object(int64_t first, int64_t last, const F& f) const {
    for (int64_t at = first; at < last;) {
      const int64_t object = at / channels_, channel = at % channels_;
      const int64_t count = std::min(channels_ - channel, last - at);
      f(object, channel, count, at - first);
      at += count;
    }
  }

  // D = sum over channels of out * grad_out - grad_lse, and sums of 0.
  void start(const Tensor& out, const Tensor& grad_lse) {
    const T* lse_row = grad_lse.const_data_ptr<T>() + n_ * grad_lse.stride(0);
    parallel_tasks(queries_.panels, [&] {
      return [&, grads = Workspace<T>(chunk_ * kLanes),
              outs = Workspace<T>(chunk_ * kLanes)](int64_t i) mutable {
        T* base = base_.data() + i * kLanes;
        for (int64_t p = 0; p < kLanes; ++p)
          base[p] = p < queries_.count(i) ? -lse_row[(i * kLanes + p) * grad_lse.stride(1)] : T{0};
        for (int64_t first = 0; first < value_channels_; first += chunk_) {
          const int64_t last = std::min(first + chunk_, value_channels_);
          pack_grads(first, last, i, grads.data());
          each_object(first, last, [&](int64_t object, int64_t channel, int64_t count, int64_t before) {
            pack_part<kLanes>(out, object, channel, count, i * kLanes, queries_.count(i),
                              outs.data() + before * kLanes);
          });
          for (int64_t c = 0; c < (last - first) * kLanes; ++c) base[c % kLanes] += grads[c] * outs[c];
        }
        std::fill_n(query_sums_.data() + i * query_sum_size(), query_sum_size(), T{0});
        std::fill_n(bias_sums_.data() + i * kLanes, kLanes, T{0});
      };
    });
  }

  // Packs pixels of some channels of one object of an (N, O, C, pixels) tensor.
  template <int kWidth>
  void pack_part(const Tensor& tensor, int64_t object, int64_t channel, int64_t channels, int64_t begin,
                 int64_t count, T* panel) const {
    StridedMatrix matrix = StridedMatrix::of(
        tensor, n_ * tensor.stride(0) + object * tensor.stride(1) + channel * tensor.stride(2));
    matrix.channels = channels;
    pack_pixels<E, kWidth>(matrix, begin, count, panel);
  }

  // Lane panel i of channels [first, last) of the gradient.
  void pack_grads(int64_t first, int64_t last, int64_t i, T* lanes) const {
    each_object(first, last, [&](int64_t object, int64_t channel, int64_t count, int64_t before) {
      pack_pixels<E, kLanes>(grads_.matrix(object, channel, count), i * kLanes, queries_.count(i),
                             lanes + before * kLanes);
    });
  }

  // The block's keys as key panels, and times their shrinkage and scale as channel panels.
  void pack_keys() {
    parallel_each(memory_.panels(), [&](int64_t i) {
      memory_.pack_panel(i);
      const int64_t first = i * kKeyPanel;
      const T to_gradient = static_cast<T>(1 / kLog2E);  // the factors are in powers of two
      for (int64_t panel = 0; panel < static_cast<int64_t>(keys_.size()); ++panel) {
        T* target = key_channels_.data() + (panel * kBackwardBlock + first) * kKeyPanel;
        for (int64_t m = 0; m < kKeyPanel; ++m) {
          for (int64_t j = 0; j < kKeyPanel; ++j) {
            const bool is_used = j < keys_[panel].count;
            target[m * kKeyPanel + j] = is_used ? memory_.keys(i)[(keys_[panel].first + j) * kKeyPanel + m] *
                                                      memory_.factor[first + m] * to_gradient
                                                : T{0};
          }
        }
      }
    });
  }

  // Channels [first, last) of the block's values as key panels.
  void pack_values(int64_t first, int64_t last) {
    parallel_each(memory_.panels(), [&](int64_t i) {
      const int64_t position = i * kKeyPanel, used = std::min<int64_t>(kKeyPanel, memory_.count - position);
      T* values = value_keys_.data() + position * chunk_;
      each_object(first, last, [&](int64_t object, int64_t channel, int64_t count, int64_t before) {
        pack_part<kKeyPanel>(value_, object, channel, count, memory_.begin + position, used,
                             values + before * kKeyPanel);
      });
      for (int64_t j = 0; j < used; ++j) {
        if (memory_.shift[position + j] != -std::numeric_limits<T>::infinity()) continue;
        for (int64_t c = 0; c < last - first; ++c) values[c * kKeyPanel + j] = T{0};
      }
    });
  }

  // The products of values and gradient over channels [first, last), for lane panel i with the block; added
  // to those of the channels before.
  void add_products(int64_t first, int64_t last, int64_t i, T* lanes) {
    const T* gradient = queries_.count(i) == kLanes ? grads_.even(first) : nullptr;
    int64_t stride = grads_.channel_stride();
    if (gradient != nullptr) {
      gradient += i * kLanes;
    } else {
      pack_grads(first, last, i, lanes);
      gradient = lanes;
      stride = kLanes;
    }
    for (int64_t panel = 0; panel < memory_.panels(); ++panel) {
      std::array<T*, kKeyPanel> sums;
      for (int64_t j = 0; j < kKeyPanel; ++j) sums[j] = products(panel * kKeyPanel + j, i);
      multiply<E>(
          gradient, value_keys_.data() + panel * kKeyPanel * chunk_, last - first,
          [&](int j, int r) { return first == 0 ? Reg{} : V::load(sums[j] + r * V::kLanes); },
          [&](const TileSums<E>& result) {
#pragma GCC unroll 16
            for (int j = 0; j < kKeyPanel; ++j)
#pragma GCC unroll 16
              for (int r = 0; r < kTileRegisters; ++r) V::store(sums[j] + r * V::kLanes, result[j][r]);
          },
          stride);
    }
  }

  // Weights and score gradients of lane panel i with the block, its share of the query gradient, and both
  // tiles transposed to (group of kLanes positions, query, position).
  void differentiate(int64_t i, T* weights, T* slopes) {
    const T* bias = queries_.has_bias ? queries_.bias.data() + i * kLanes : nullptr;
    Reg lse[kTileRegisters], base[kTileRegisters];
    for (int r = 0; r < kTileRegisters; ++r) {
      lse[r] = V::load(lse_.data.data() + i * kLanes + r * V::kLanes);
      base[r] = V::load(base_.data() + i * kLanes + r * V::kLanes);
    }
    for (int64_t panel = 0; panel < memory_.panels(); ++panel) {
      memory_.score(panel, queries_.lanes(i), bias, [&](TileSums<E>& scores) {
#pragma GCC unroll 16
        for (int j = 0; j < kKeyPanel; ++j) {
          const int64_t m = panel * kKeyPanel + j;
#pragma GCC unroll 16
          for (int r = 0; r < kTileRegisters; ++r) {
            const Reg weight = exp2_of_negative<V>(scores[j][r] - lse[r]);
            const Reg product = V::load(products(m, i) + r * V::kLanes);
            V::store(weights + m * kLanes + r * V::kLanes, weight);
            V::store(slopes + m * kLanes + r * V::kLanes, weight * (product - base[r]));
          }
        }
      });
    }
    const int64_t rows = memory_.panels() * kKeyPanel;
    T* sums = query_sums_.data() + i * query_sum_size();
    for (size_t panel = 0; panel < keys_.size(); ++panel, sums += kKeyPanel * kLanes) {
      multiply<E>(
          slopes, key_channels_.data() + panel * kBackwardBlock * kKeyPanel, rows,
          [&](int j, int r) { return V::load(sums + j * kLanes + r * V::kLanes); },
          [&](const TileSums<E>& result) {
#pragma GCC unroll 16
            for (int j = 0; j < kKeyPanel; ++j)
#pragma GCC unroll 16
              for (int r = 0; r < kTileRegisters; ++r)
                V::store(sums + j * kLanes + r * V::kLanes, result[j][r]);
          });
    }
    for (int64_t m = 0; m < rows; ++m) {
      const T shrinkage = memory_.slope[m] / static_cast<T>(kLog2E);
      for (int64_t p = 0; p < kLanes; ++p) bias_sums_[i * kLanes + p] += shrinkage * slopes[m * kLanes + p];
    }
    transpose(weights, rows, i, weights_.data());
    transpose(slopes, rows, i, slopes_.data());
  }

  void transpose(const T* tile, int64_t rows, int64_t i, T* target) const {
    for (int64_t group = 0; group * kLanes < rows; ++group) {
      T* to = target + (group * rows_ + i * kLanes) * kLanes;
      for (int64_t p = 0; p < kLanes; p += V::kLanes) {
        for (int64_t m = 0; m < kLanes; m += V::kLanes)
          transpose_lanes<V>(tile + (group * kLanes + m) * kLanes + p, kLanes, to + p * kLanes + m, kLanes);
      }
    }
  }

  // Reduces `transposed` (queries, kLanes positions) with rows of channels over all queries.
  void reduce(const T* transposed, const std::array<const T*, kKeyPanel>& channels, T* sums) const {
    multiply_rows<E>(transposed, channels, queries_.queries, [&](const TileSums<E>& result) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeyPanel; ++j)
#pragma GCC unroll 16
        for (int r = 0; r < kTileRegisters; ++r) V::store(sums + j * kLanes + r * V::kLanes, result[j][r]);
    });
  }

  // Groups of positions whose transposed weights stay in the second-level cache, so that the gradients of the
  // values are written in longer runs.
  int64_t groups_in_a_run() const {
    const int64_t bytes = rows_ * kLanes * static_cast<int64_t>(sizeof(T));
    return std::max<int64_t>(1, kRunBytes / std::max<int64_t>(1, bytes));
  }

  void write_value(int64_t first_group, int64_t last_group, const ChannelPanel& channels) {
    const int64_t row = n_ * value_channels_ + channels.object * channels_ + channels.first;
    const auto gradient = grads_.of(channels);
    dispatch_floating(gradients_.value.scalar_type(), [&]<class S>(S) {
      S* target = gradients_.value.mutable_data_ptr<S>() + row * positions_ + memory_.begin;
      for (int64_t group = first_group; group < last_group; ++group) {
        alignas(64) T sums[kKeyPanel * kLanes];
        reduce(weights_.data() + group * rows_ * kLanes, gradient, sums);
        copy_columns(sums, channels.count, group, target);
      }
    });
  }

  // Copies `count` rows of sums to rows of M, at the positions of the group.
  template <class S>
  void copy_columns(const T* sums, int64_t count, int64_t group, S* target) const {
    const int64_t first = group * kLanes, used = std::min(kLanes, memory_.count - first);
    for (int64_t c = 0; c < count; ++c, sums += kLanes) {
      S* row = target + c * positions_ + first;
      if (used == kLanes) {
#pragma GCC unroll 32
        for (int64_t m = 0; m < kLanes; ++m) row[m] = static_cast<S>(sums[m]);
      } else {
        for (int64_t m = 0; m < used; ++m) row[m] = static_cast<S>(sums[m]);
      }
    }
  }

  // Writes `count` rows of sums to rows [row ...) of a (rows, M) gradient, at the positions of the group.
  void write_columns(Tensor& gradient, int64_t row, int64_t count, int64_t group, const T* sums) const {
    dispatch_floating(gradient.scalar_type(), [&]<class S>(S) {
      copy_columns(sums, count, group, gradient.mutable_data_ptr<S>() + row * positions_ + memory_.begin);
    });
  }

  // Gradients of key, shrinkage and key bias of one group of positions.
  void write_key(int64_t group, T* sums) {
    const T* slopes = slopes_.data() + group * rows_ * kLanes;
    for (size_t panel = 0; panel < keys_.size(); ++panel) {
      reduce(slopes, query_rows_.of(keys_[panel]), sums + panel * kKeyPanel * kLanes);
    }
    T total[kLanes] = {}, biased[kLanes] = {};
    for (int64_t p = 0; p < queries_.queries; ++p) {
      for (int64_t m = 0; m < kLanes; ++m) {
        total[m] += slopes[p * kLanes + m];
        biased[m] += slopes[p * kLanes + m] * queries_.bias[p];
      }
    }
    const int64_t channels = memory_.channels, query_channels = in_.query.size(1), first = group * kLanes;
    const bool squares = query_channels != channels;
    const T scale = static_cast<T>(in_.scale);
    for (int64_t m = 0; m < std::min(kLanes, memory_.count - first); ++m) {
      const T* key = memory_.keys((first + m) / kKeyPanel) + (first + m) % kKeyPanel;
      const T factor = memory_.slope[first + m] / static_cast<T>(kLog2E) * scale;
      T product = 0;
      for (int64_t c = 0; c < query_channels; ++c) product += sums[c * kLanes + m] * key[c * kKeyPanel];
      for (int64_t c = 0; c < channels; ++c) {
        T& sum = sums[c * kLanes + m];
        if (squares) sum += 2 * key[c * kKeyPanel] * sums[(channels + c) * kLanes + m];
        sum *= factor;
      }
      biased[m] += product * scale;
    }
    write_columns(gradients_.key, n_ * channels, channels, group, sums);
    if (in_.shrinkage) write_columns(gradients_.shrinkage, n_, 1, group, biased);
    if (in_.key_bias) write_columns(gradients_.key_bias, n_, 1, group, total);
  }

  void write_query() {
    const int64_t channels = in_.query.size(1);
    dispatch_floating(gradients_.query.scalar_type(), [&]<class S>(S) {
      S* target = gradients_.query.mutable_data_ptr<S>() + n_ * channels * queries_.queries;
      parallel_each(queries_.panels, [&](int64_t i) {
        const T* sums = query_sums_.data() + i * query_sum_size();
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t p = 0; p < queries_.count(i); ++p)
            target[c * queries_.queries + i * kLanes + p] = static_cast<S>(sums[c * kLanes + p]);
      });
    });
    if (in_.query_bias) {
      T* target = gradients_.query_bias.mutable_data_ptr<T>() + n_ * queries_.queries;
      for (int64_t p = 0; p < queries_.queries; ++p) target[p] = bias_sums_[p];
    }
  }

  const ScoreInputs& in_;
  const Tensor& value_;
  const int64_t n_, positions_, objects_, channels_;
  Gradients& gradients_;
  const std::vector<ChannelPanel> values_, keys_;
  const int64_t value_channels_;  // of all objects
  const int64_t chunk_;           // how many of them are multiplied at a time
  PackedQueries<E> queries_;
  PackedMemory<E> memory_;
  PackedLse<E> lse_;
  const int64_t rows_;  // queries with those that fill the last lane panel
  Rows<E> grads_, query_rows_;
  Workspace<T> base_;          // D, per query
  Workspace<T> query_sums_;    // (lane panel, channels of the queries, kLanes)
  Workspace<T> bias_sums_;     // per query
  Workspace<T> value_keys_;    // (key panel, chunk_, kKeyPanel)
  Workspace<T> key_channels_;  // (channel panel of the keys, kBackwardBlock, kKeyPanel)
  Workspace<T> weights_;       // (group of positions, rows_, kLanes)
  Workspace<T> slopes_;        // alike: products of values and gradient, then the gradients of the scores
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> memory_read_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const std::optional<Tensor>& shrinkage, const std::optional<Tensor>& query_bias,
    const std::optional<Tensor>& key_bias, double scale, std::string_view, const Tensor& out,
    const Tensor& lse) {
  const ScoreInputs in{query, key, shrinkage, query_bias, key_bias, scale};
  check_scores(in);
  check_value(in, value);
  const ScalarType wide = accumulator_dtype(key.scalar_type());
  check_shape("grad_out", grad_out, {in.batch(), value.size(1), value.size(2), in.queries()});
  check_shape("out", out, {in.batch(), value.size(1), value.size(2), in.queries()});
  for (const Tensor* tensor : {&grad_lse, &lse}) {
    check_shape("lse", *tensor, {in.batch(), in.queries()});
    check_dtype("lse", *tensor, wide);
  }
  const auto vector = [&](const std::optional<Tensor>& input, int64_t size) {
    const std::vector<int64_t> shape{in.batch(), input ? size : 0};
    return torch::stable::new_empty(query, shape, wide);
  };
  Workspace<float>::release();  // what the forward pass left: the gradients are large
  Gradients gradients{torch::stable::new_empty(query, query.sizes()),
                      torch::stable::new_empty(key, key.sizes()),
                      torch::stable::new_empty(value, value.sizes()),
                      vector(shrinkage, in.memory()),
                      vector(query_bias, in.queries()),
                      vector(key_bias, in.memory())};
  const auto run = [&]<class E>(E) {
    for (int64_t n = 0; n < in.batch(); ++n)
      BackwardElement<E>(in, value, grad_out, grad_lse, out, lse, n, gradients).run();
  };
  wide == ScalarType::Double ? run(FloatElement<Vec<double, kRegisterBytes>>{})
                             : run(FloatElement<Vec<float, kRegisterBytes>>{});
  return {gradients.query,     gradients.key,        gradients.value,
          gradients.shrinkage, gradients.query_bias, gradients.key_bias};
}

// ---- Usage: the sum of each memory position's weights over the queries.

template <class E>
void usage_of_element(const ScoreInputs& in, const Tensor& lse, int64_t n, typename E::Lanes::T* usage) {
  using V = typename E::Lanes;
  using T = typename V::T;
  constexpr int64_t kLanes = kLanePanel<V>;
  PackedQueries<E> queries(in, n);
  PackedLse<E> lses(lse, n, queries);
  parallel_tasks(panels_of(in.memory(), kMemoryBlock), [&] {
    return [&, memory = std::make_unique<PackedMemory<E>>(in, n, static_cast<T>(kLog2E)),
            sums = Workspace<T>(kMemoryBlock * V::kLanes)](int64_t block) mutable {
      const int64_t begin = block * kMemoryBlock;
      memory->start(begin, std::min(kMemoryBlock, in.memory() - begin));
      for (int64_t i = 0; i < memory->panels(); ++i) memory->pack_panel(i);
      std::fill_n(sums.data(), kMemoryBlock * V::kLanes, T{0});
      for (int64_t p = 0; p < queries.panels; ++p) {
        const T* bias = queries.has_bias ? queries.bias.data() + p * kLanes : nullptr;
        for (int64_t i = 0; i < memory->panels(); ++i) {
          T* rows = sums.data() + i * kKeyPanel * V::kLanes;
          memory->score(i, queries.lanes(p), bias, [&](TileSums<E>& scores) {
#pragma GCC unroll 16
            for (int j = 0; j < kKeyPanel; ++j) {
              typename V::Reg sum = V::load(rows + j * V::kLanes);
              for (int r = 0; r < kTileRegisters; ++r)
                sum += exp2_of_negative<V>(scores[j][r] -
                                           V::load(lses.data.data() + p * kLanes + r * V::kLanes));
              V::store(rows + j * V::kLanes, sum);
            }
          });
        }
      }
      for (int64_t m = 0; m < memory->count; ++m) {
        T total = 0;
        for (int i = 0; i < V::kLanes; ++i) total += sums[m * V::kLanes + i];
        usage[begin + m] = total;
      }
    };
  });
}

Tensor memory_usage(const Tensor& query, const Tensor& key, const std::optional<Tensor>& shrinkage,
                    const std::optional<Tensor>& query_bias, const std::optional<Tensor>& key_bias,
                    double scale, std::string_view, const Tensor& lse) {
  const ScoreInputs in{query, key, shrinkage, query_bias, key_bias, scale};
  check_scores(in);
  check_shape("lse", lse, {in.batch(), in.queries()});
  check_dtype("lse", lse, accumulator_dtype(key.scalar_type()));
  Tensor usage = torch::stable::new_empty(lse, std::vector<int64_t>{in.batch(), in.memory()});
  with_score_element(in, [&]<class E>(E) {
    using T = typename E::Lanes::T;
    for (int64_t n = 0; n < in.batch(); ++n)
      usage_of_element<E>(in, lse, n, usage.mutable_data_ptr<T>() + n * in.memory());
  });
  return usage;
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("memory_read", TORCH_BOX(&vosops::cpu::memory_read));
  m.impl("memory_read_list", TORCH_BOX(&vosops::cpu::memory_read_list));
  m.impl("memory_read_backward", TORCH_BOX(&vosops::cpu::memory_read_backward));
  m.impl("memory_usage", TORCH_BOX(&vosops::cpu::memory_usage));
}
