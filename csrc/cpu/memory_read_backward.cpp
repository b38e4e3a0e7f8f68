// The backward pass of the memory read on the CPU, from the saved log-sum-exp, without the affinity matrix.
//
// With G = grad_out, W the weights, delta = sum over channels of out * G - grad_lse, and V^T G written dW,
// the gradient of the scores is dS = W (dW - delta). Per block of kBackwardBlock positions, (1) each lane
// panel sums dW over chunks of kChunkChannels channels, computes W again and dS, adds K dS to its query
// gradient and stores W and dS transposed; (2) each group of memory positions reduces them over all queries
// to the gradients of values and keys. G is read where it lies, so that little is held beside the gradients.
// No two tasks write one place, so the result does not depend on the number of threads. Floor: 4 (C + O Cv) +
// 2 C operations per pair of query and memory position at the FMA rate.
#include "cpu/memory_read_backward.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/gemm.h"
#include "cpu/memory_scores.h"
#include "cpu/memory_values.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace vosops::cpu {
namespace {

constexpr int64_t kRunBytes = 512 << 10;
constexpr int64_t kBackwardBlock = 192;  // memory positions: a multiple of both panel widths
constexpr int64_t kChunkChannels = 512;
constexpr int64_t kConflictBytes = 1024;  // rows a multiple of this apart are copied side by side

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
                  const Tensor& out, const Tensor& lse, int64_t n, ReadGradients& gradients)
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
        delta_(rows_),
        query_sums_(queries_.panels * query_sum_size()),
        bias_sums_(rows_),
        value_keys_(kBackwardBlock * chunk_),
        key_channels_(static_cast<int64_t>(keys_.size()) * kBackwardBlock * kKeyPanel),
        weights_(kBackwardBlock * rows_),
        ds_(kBackwardBlock * rows_) {
    start(out, grad_lse);
  }

  void run() {
    const ReadSpan span = read_span<T>(in_, n_);
    gradients_.clear_outside(n_, span);
    for (int64_t begin = span.begin; begin < span.end; begin += kBackwardBlock) {
      memory_.start(begin, std::min(kBackwardBlock, span.end - begin));
      pack_keys();
      for (int64_t first = 0; first == 0 || first < value_channels_; first += chunk_) {
        const int64_t last = std::min(first + chunk_, value_channels_);
        pack_values(first, last);
        parallel_tasks(queries_.panels, [&] {
          return [&, lanes = Workspace<T>(chunk_ * kLanes), weights = Workspace<T>(kBackwardBlock * kLanes),
                  ds = Workspace<T>(kBackwardBlock * kLanes)](int64_t i) mutable {
            add_products(first, last, i, lanes.data());
            if (last == value_channels_) differentiate(i, weights.data(), ds.data());
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

  // Where row m of the block and lane panel i lie in ds_: in tiles of kLanes x kLanes, which transposing
  // leaves in their places.
  T* products(int64_t m, int64_t i) {
    return ds_.data() + (m / kLanes * rows_ + i * kLanes + m % kLanes) * kLanes;
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

  // delta = sum over channels of out * grad_out - grad_lse, and sums of 0.
  void start(const Tensor& out, const Tensor& grad_lse) {
    const T* lse_row = grad_lse.const_data_ptr<T>() + n_ * grad_lse.stride(0);
    parallel_tasks(queries_.panels, [&] {
      return [&, grads = Workspace<T>(chunk_ * kLanes),
              outs = Workspace<T>(chunk_ * kLanes)](int64_t i) mutable {
        T* delta = delta_.data() + i * kLanes;
        for (int64_t p = 0; p < kLanes; ++p)
          delta[p] = p < queries_.count(i) ? -lse_row[(i * kLanes + p) * grad_lse.stride(1)] : T{0};
        for (int64_t first = 0; first < value_channels_; first += chunk_) {
          const int64_t last = std::min(first + chunk_, value_channels_);
          pack_grads(first, last, i, grads.data());
          each_object(first, last, [&](int64_t object, int64_t channel, int64_t count, int64_t before) {
            pack_part<kLanes>(out, object, channel, count, i * kLanes, queries_.count(i),
                              outs.data() + before * kLanes);
          });
          for (int64_t c = 0; c < (last - first) * kLanes; ++c) delta[c % kLanes] += grads[c] * outs[c];
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

  // W and dS of lane panel i with the block, its share of the query gradient, and both
  // tiles transposed to (group of kLanes positions, query, position).
  void differentiate(int64_t i, T* weights, T* ds) {
    const T* bias = queries_.has_bias ? queries_.bias.data() + i * kLanes : nullptr;
    Reg lse[kTileRegisters], delta[kTileRegisters];
    for (int r = 0; r < kTileRegisters; ++r) {
      lse[r] = V::load(lse_.data.data() + i * kLanes + r * V::kLanes);
      delta[r] = V::load(delta_.data() + i * kLanes + r * V::kLanes);
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
            V::store(ds + m * kLanes + r * V::kLanes, weight * (product - delta[r]));
          }
        }
      });
    }
    const int64_t rows = memory_.panels() * kKeyPanel;
    T* sums = query_sums_.data() + i * query_sum_size();
    for (size_t panel = 0; panel < keys_.size(); ++panel, sums += kKeyPanel * kLanes) {
      multiply<E>(
          ds, key_channels_.data() + panel * kBackwardBlock * kKeyPanel, rows,
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
      const T shrinkage = memory_.shrinkage[m] / static_cast<T>(kLog2E);
      for (int64_t p = 0; p < kLanes; ++p) bias_sums_[i * kLanes + p] += shrinkage * ds[m * kLanes + p];
    }
    transpose(weights, rows, i, weights_.data());
    transpose(ds, rows, i, ds_.data());
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
    const T* ds = ds_.data() + group * rows_ * kLanes;
    for (size_t panel = 0; panel < keys_.size(); ++panel) {
      reduce(ds, query_rows_.of(keys_[panel]), sums + panel * kKeyPanel * kLanes);
    }
    T total[kLanes] = {}, biased[kLanes] = {};
    for (int64_t p = 0; p < queries_.queries; ++p) {
      for (int64_t m = 0; m < kLanes; ++m) {
        total[m] += ds[p * kLanes + m];
        biased[m] += ds[p * kLanes + m] * queries_.bias[p];
      }
    }
    const int64_t channels = memory_.channels, query_channels = in_.query.size(1), first = group * kLanes;
    const bool squares = query_channels != channels;
    const T scale = static_cast<T>(in_.scale);
    for (int64_t m = 0; m < std::min(kLanes, memory_.count - first); ++m) {
      const T* key = memory_.keys((first + m) / kKeyPanel) + (first + m) % kKeyPanel;
      const T factor = memory_.shrinkage[first + m] / static_cast<T>(kLog2E) * scale;
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
  ReadGradients& gradients_;
  const std::vector<ChannelPanel> values_, keys_;
  const int64_t value_channels_;  // of all objects
  const int64_t chunk_;           // how many of them are multiplied at a time
  PackedQueries<E> queries_;
  PackedMemory<E> memory_;
  PackedLse<E> lse_;
  const int64_t rows_;  // queries with those that fill the last lane panel
  Rows<E> grads_, query_rows_;
  Workspace<T> delta_;         // per query
  Workspace<T> query_sums_;    // (lane panel, channels of the queries, kLanes)
  Workspace<T> bias_sums_;     // per query
  Workspace<T> value_keys_;    // (key panel, chunk_, kKeyPanel)
  Workspace<T> key_channels_;  // (channel panel of the keys, kBackwardBlock, kKeyPanel)
  Workspace<T> weights_;       // (group of positions, rows_, kLanes)
  Workspace<T> ds_;            // alike: products of values and gradient, then the gradients of the scores
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> memory_read_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const std::optional<Tensor>& shrinkage, const std::optional<Tensor>& query_bias,
    const std::optional<Tensor>& key_bias, double scale, std::string_view precision, const Tensor& out,
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
  ReadGradients gradients{torch::stable::new_empty(query, query.sizes()),
                          torch::stable::new_empty(key, key.sizes()),
                          torch::stable::new_empty(value, value.sizes()),
                          vector(shrinkage, in.memory()),
                          vector(query_bias, in.queries()),
                          vector(key_bias, in.memory())};
  const auto results = [&] {
    return std::tuple{gradients.query,     gradients.key,        gradients.value,
                      gradients.shrinkage, gradients.query_bias, gradients.key_bias};
  };
#if defined(VOSOPS_AMX)
  if (amx::read_backward({in, value, grad_out, grad_lse, out, lse}, precision, gradients)) return results();
#endif
  const auto run = [&]<class E>(E) {
    for (int64_t n = 0; n < in.batch(); ++n)
      BackwardElement<E>(in, value, grad_out, grad_lse, out, lse, n, gradients).run();
  };
  wide == ScalarType::Double ? run(FloatElement<Vec<double, kRegisterBytes>>{})
                             : run(FloatElement<Vec<float, kRegisterBytes>>{});
  return results();
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("memory_read_backward", TORCH_BOX(&vosops::cpu::memory_read_backward));
}
