// Global matching on the CPU: a matrix product whose epilogue keeps the nearest keys.
//
// The reference pixels are grouped by the set of objects that they belong to and packed into key panels once,
// so that the inner loop has no mask and a pixel of several objects is multiplied once. A task owns
// kTaskPanels lane panels of wanted query pixels; a block of key panels that fits the second-level cache
// streams past each of them. The score q.k - |k|^2 / 2 (greatest for the nearest key) is complete in the
// registers of the tile: the sums start at -|k|^2 / 2. One maximum over the tile is compared with the bar of
// each lane and object, and only a tile that reaches one is looked at again. The distances of the winners are
// computed again from q - k. Bytes: the packed keys, C x M, written once; per thread the lane panels and
// sorted lists of its task. Floor: 2 C operations per wanted query pixel and object pixel at the FMA rate.
#include "cpu/global_matching.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/best.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"

namespace vosops::cpu {
namespace {

constexpr int kTaskPanels = 4;
constexpr int64_t kKeyBlockBytes = 256 << 10;

// Groups the pixels of batch element n by the set of objects whose mask holds them; those of no object are
// left out.
std::vector<KeyGroup> group_keys(const Tensor& mask, int64_t n) {
  const int64_t pixels = mask.size(2) * mask.size(3) * mask.size(4);
  std::vector<KeyGroup> groups(1);  // group 0: no object
  std::vector<int32_t> group_of(static_cast<size_t>(pixels), 0);
  for (int64_t o = 0; o < mask.size(1); ++o) {
    std::vector<int32_t> joined(groups.size(),
                                0);  // the group that a group's pixels enter by joining object o
    const bool* object = mask.const_data_ptr<bool>() + n * mask.stride(0) + o * mask.stride(1);
    int32_t* group = group_of.data();
    for (int64_t t = 0; t < mask.size(2); ++t) {
      for (int64_t y = 0; y < mask.size(3); ++y) {
        const bool* row = object + t * mask.stride(2) + y * mask.stride(3);
        for (int64_t x = 0; x < mask.size(4); ++x, ++group) {
          if (!row[x * mask.stride(4)]) continue;
          int32_t& target = joined[*group];
          if (target == 0) {
            target = static_cast<int32_t>(groups.size());
            groups.push_back({groups[*group].objects, {}});
            groups.back().objects.push_back(o);
          }
          *group = target;
        }
      }
    }
  }
  for (int64_t m = 0; m < pixels; ++m) {
    if (group_of[m] != 0) groups[group_of[m]].pixels.push_back(m);
  }
  std::erase_if(groups, [](const KeyGroup& group) { return group.pixels.empty(); });
  return groups;
}

// Key panels of one batch element: panel i has its keys at data + i * elements * kKeyPanel.
template <class E>
struct PackedKeys {
  using T = typename E::Lanes::T;

  struct Panel {
    const std::vector<int64_t>* objects;
    int64_t pixels[kKeyPanel];  // flat indices
    T start[kKeyPanel];         // -|k|^2 / 2; -inf where there is no key or one that may not win
  };

  int64_t elements;
  std::vector<Panel> panels;
  std::vector<int64_t> slots;  // where in the panels a packed pixel lies, by flat index
  Workspace<T> data;

  template <class S>
  PackedKeys(const Tensor& key, int64_t n, const std::vector<KeyGroup>& groups, const S*)
      : elements(elements_of<E>(key.size(1))),
        panels(count_panels(groups)),
        slots(key.size(2) * key.size(3) * key.size(4)),
        data(panels.size() * elements * kKeyPanel) {
    struct Source {
      const int64_t* pixels;
      int64_t count;
    };
    std::vector<Source> sources;
    for (const KeyGroup& group : groups) {
      const int64_t size = static_cast<int64_t>(group.pixels.size());
      for (int64_t i = 0; i < size; i += kKeyPanel) {
        panels[sources.size()].objects = &group.objects;
        sources.push_back({group.pixels.data() + i, std::min<int64_t>(kKeyPanel, size - i)});
      }
    }
    const S* base = key.const_data_ptr<S>() + n * key.stride(0);
    const PixelGrid grid = PixelGrid::of_key(key);
    torch::stable::parallel_for(0, static_cast<int64_t>(panels.size()), 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Panel& panel = panels[i];
        const Source& source = sources[i];
        int64_t offsets[kKeyPanel];
        for (int64_t j = 0; j < source.count; ++j) {
          panel.pixels[j] = source.pixels[j];
          slots[source.pixels[j]] = i * kKeyPanel + j;
          offsets[j] = grid.offset(source.pixels[j]);
        }
        T norm[kKeyPanel];
        pack_panel<E>(base, offsets, source.count, key.stride(1), key.size(1), kKeyPanel, keys(i), norm);
        for (int64_t j = 0; j < kKeyPanel; ++j) {
          const bool usable = j < source.count && std::isfinite(norm[j]);
          panel.start[j] = usable ? norm[j] / -2 : -std::numeric_limits<T>::infinity();
          if (!usable)
            for (int64_t e = 0; e < elements; ++e) keys(i)[panel_at<E>(e, j, kKeyPanel)] = 0;
        }
      }
    });
  }

  T* keys(int64_t panel) { return data.data() + panel * elements * kKeyPanel; }

  // The key of pixel m; its element e lies at panel_at<E>(e, 0, kKeyPanel).
  const T* key(int64_t m) { return keys(slots[m] / kKeyPanel) + slots[m] % kKeyPanel * E::kRun; }

 private:
  static size_t count_panels(const std::vector<KeyGroup>& groups) {
    size_t count = 0;
    for (const KeyGroup& group : groups) count += (group.pixels.size() + kKeyPanel - 1) / kKeyPanel;
    return count;
  }
};

// Everything that the tasks of one batch element read and write.
template <class E>
struct Problem {
  const Tensor& query;
  const Tensor& key;
  int64_t n;
  const std::vector<int64_t>& wanted;  // flat indices of the query pixels
  PackedKeys<E>& keys;
  int64_t objects, neighbors;
  typename E::Lanes::T* distance;  // (objects, neighbors, height * width) of element n
  int64_t* index;                  // alike
};

// One lane panel of query pixels and what it has found.
template <class E, class S>
class QueryPanel {
  using V = typename E::Lanes;
  using T = typename V::T;
  using Reg = typename V::Reg;
  static constexpr int kLanes = kLanePanel<V>;
  static constexpr T kAbsent = std::numeric_limits<T>::infinity();
  static constexpr int kStreams = 4;  // keys read at a time: more would outrun the prefetcher

 public:
  explicit QueryPanel(const Problem<E>& problem)
      : p_(problem),
        grid_(PixelGrid::of_query(problem.query)),
        lanes_(problem.keys.elements * kLanes),
        best_(problem.objects * kLanes, problem.neighbors),
        nearest_(kLanes, problem.neighbors) {}

  // Takes the query pixels wanted[first ...].
  void start(int64_t first) {
    count_ = static_cast<int>(std::min<int64_t>(kLanes, static_cast<int64_t>(p_.wanted.size()) - first));
    pixels_ = p_.wanted.data() + first;
    for (int i = 0; i < count_; ++i) offsets_[i] = grid_.offset(pixels_[i]);
    const Tensor& q = p_.query;
    pack_panel<E>(base(), offsets_, count_, q.stride(1), q.size(1), kLanes, lanes_.data(), norm_);
    best_.clear();
    for (int i = 0; i < kLanes; ++i) {
      if (i < count_ && std::isfinite(norm_[i])) continue;
      for (int64_t o = 0; o < p_.objects; ++o) best_.close(o * kLanes + i);
    }
  }

  // Offers the keys of panels [begin, end).
  void search(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& panel = p_.keys.panels[i];
      multiply<E>(
          lanes_.data(), p_.keys.keys(i), p_.keys.elements,
          [&](int j, int) { return V::set1(panel.start[j]); },
          [&](const TileSums<E>& scores) { consider(scores, panel); });
    }
  }

  void write() {
    const int64_t pixels = grid_.height * grid_.width;
    for (int64_t o = 0; o < p_.objects; ++o) {
      nearest_.clear();
      if (!p_.keys.panels.empty())
        for (int64_t k = 0; k < p_.neighbors; ++k) measure(o, k);
      for (int i = 0; i < count_; ++i) {
        const bool undefined = std::isnan(norm_[i]);
        for (int64_t k = 0; k < p_.neighbors; ++k) {
          const int64_t m = nearest_.indices(i)[k], at = (o * p_.neighbors + k) * pixels + pixels_[i];
          const bool found = m != BestLists<T>::kNoIndex;
          p_.distance[at] = undefined ? std::numeric_limits<T>::quiet_NaN()
                            : found   ? -nearest_.scores(i)[k]
                                      : kAbsent;
          p_.index[at] = found ? m : -1;
        }
      }
    }
  }

 private:
  const S* base() const { return p_.query.template const_data_ptr<S>() + p_.n * p_.query.stride(0); }

  [[gnu::always_inline]] void consider(const TileSums<E>& scores,
                                       const typename PackedKeys<E>::Panel& panel) {
    Reg greatest[kTileRegisters];
    for (int r = 0; r < kTileRegisters; ++r) {
      greatest[r] = scores[0][r];
#pragma GCC unroll 16
      for (int j = 1; j < kKeyPanel; ++j)
        greatest[r] = greatest[r] > scores[j][r] ? greatest[r] : scores[j][r];
    }
    bool stored = false;
    alignas(64) T tile[kKeyPanel * kLanes];
    for (int64_t o : *panel.objects) {
      const T* bars = best_.bars() + o * kLanes;
      uint32_t reached = 0;
      for (int r = 0; r < kTileRegisters; ++r)
        reached |= lanes_at_least<V>(greatest[r], V::load(bars + r * V::kLanes)) << (r * V::kLanes);
      if (reached == 0) continue;
      if (!stored) {
#pragma GCC unroll 16
        for (int j = 0; j < kKeyPanel; ++j)
          for (int r = 0; r < kTileRegisters; ++r) V::store(tile + j * kLanes + r * V::kLanes, scores[j][r]);
        stored = true;
      }
      insert(tile, panel, o);
    }
  }

  // Inserts the scores of a tile that reach the bars of object o.
  [[gnu::noinline]] void insert(const T* tile, const typename PackedKeys<E>::Panel& panel, int64_t o) {
    const T* bars = best_.bars() + o * kLanes;
    for (int j = 0; j < kKeyPanel; ++j) {
      for (int r = 0; r < kTileRegisters; ++r) {
        const T* scores = tile + j * kLanes + r * V::kLanes;
        uint32_t reached = lanes_at_least<V>(V::load(scores), V::load(bars + r * V::kLanes));
        for (; reached != 0; reached &= reached - 1) {
          const int lane = __builtin_ctz(reached);
          best_.insert(o * kLanes + r * V::kLanes + lane, scores[lane], panel.pixels[j]);
        }
      }
    }
  }

  // Computes the distance of each lane's k-th key of object o from the differences, and ranks the lane by it.
  void measure(int64_t o, int64_t k) {
    for (int first = 0; first < count_; first += kStreams) {
      const T* keys[kStreams];
      int64_t found[kStreams];
      for (int i = 0; i < kStreams; ++i) {
        found[i] = best_.indices(o * kLanes + first + i)[k];
        keys[i] = p_.keys.key(found[i] == BestLists<T>::kNoIndex ? p_.keys.panels[0].pixels[0] : found[i]);
      }
      T distances[kStreams] = {};
      for (int64_t e = 0; e < p_.keys.elements; ++e) {
        const T* query = lanes_.data() + panel_at<E>(e, first, kLanes);
        const int64_t at = panel_at<E>(e, 0, kKeyPanel);
        for (int i = 0; i < kStreams; ++i) {
          if constexpr (E::kChannels == 1) {
            distances[i] = add_square(query[i] - keys[i][at], distances[i]);
          } else {
            distances[i] += E::squared_difference(query[i * E::kRun], keys[i][at]);
          }
        }
      }
      for (int i = 0; i < kStreams; ++i) {
        if (found[i] != BestLists<T>::kNoIndex && distances[i] < kAbsent)
          nearest_.insert(first + i, -distances[i], found[i]);
      }
    }
  }

  const Problem<E>& p_;
  const PixelGrid grid_;
  int count_ = 0;                    // lanes in use
  const int64_t* pixels_ = nullptr;  // their flat indices
  int64_t offsets_[kLanes];
  T norm_[kLanes];
  Workspace<T> lanes_;    // (elements, kLanes)
  BestLists<T> best_;     // by score: lists (object, lane)
  BestLists<T> nearest_;  // by distance, of one object: lists (lane)
};

// The flat indices of the wanted query pixels of batch element n.
std::vector<int64_t> wanted_pixels(const Tensor& query, const std::optional<Tensor>& query_mask, int64_t n) {
  std::vector<int64_t> wanted;
  const int64_t height = query.size(2), width = query.size(3);
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      if (!query_mask ||
          query_mask->const_data_ptr<bool>()[n * query_mask->stride(0) + y * query_mask->stride(1) +
                                             x * query_mask->stride(2)])
        wanted.push_back(y * width + x);
    }
  }
  return wanted;
}

template <class E, class S>
void match_frame(const Tensor& query, const Tensor& key, const Tensor& mask,
                 const std::optional<Tensor>& query_mask, int64_t n, int64_t neighbors,
                 typename E::Lanes::T* distance, int64_t* index) {
  using T = typename E::Lanes::T;
  const int64_t objects = mask.size(1);
  std::vector<int64_t> wanted = wanted_pixels(query, query_mask, n);
  const int64_t outputs = objects * neighbors * query.size(2) * query.size(3);
  if (query_mask) {
    std::fill_n(distance, outputs, std::numeric_limits<T>::infinity());
    std::fill_n(index, outputs, int64_t{-1});
  }
  const std::vector<KeyGroup> groups = group_keys(mask, n);
#if defined(VOSOPS_AMX)
  if constexpr (std::is_same_v<T, float>) {
    const MatchingTask task{query, key, n, groups, wanted, objects, neighbors};
    if (filter_serves(task)) wanted = match_by_filter(task, distance, index);
    if (wanted.empty()) return;
  }
#endif
  PackedKeys<E> keys(key, n, groups, static_cast<const S*>(nullptr));
  const Problem<E> problem{query, key, n, wanted, keys, objects, neighbors, distance, index};

  constexpr int64_t kLanes = kLanePanel<typename E::Lanes>;
  const int64_t lane_panels = (static_cast<int64_t>(wanted.size()) + kLanes - 1) / kLanes;
  const int64_t key_panels = static_cast<int64_t>(keys.panels.size());
  const int64_t panel_bytes = keys.elements * kKeyPanel * static_cast<int64_t>(sizeof(T));
  const int64_t block = std::max<int64_t>(1, kKeyBlockBytes / panel_bytes);
  parallel_tasks((lane_panels + kTaskPanels - 1) / kTaskPanels, [&] {
    std::vector<std::unique_ptr<QueryPanel<E, S>>> panels;
    for (int i = 0; i < kTaskPanels; ++i) panels.push_back(std::make_unique<QueryPanel<E, S>>(problem));
    return [&, panels = std::move(panels)](int64_t task) {
      const int64_t first = task * kTaskPanels;
      const int64_t count = std::min<int64_t>(kTaskPanels, lane_panels - first);
      for (int64_t i = 0; i < count; ++i) panels[i]->start((first + i) * kLanes);
      for (int64_t begin = 0; begin < key_panels; begin += block)
        for (int64_t i = 0; i < count; ++i) panels[i]->search(begin, std::min(begin + block, key_panels));
      for (int64_t i = 0; i < count; ++i) panels[i]->write();
    };
  });
}

std::tuple<Tensor, Tensor> global_matching(const Tensor& query, const Tensor& key, const Tensor& mask,
                                           int64_t neighbors, const std::optional<Tensor>& query_mask,
                                           std::string_view) {
  check_shape("query", query, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = query.size(0), height = query.size(2), width = query.size(3);
  check_shape("key", key, {batch, query.size(1), kAnySize, kAnySize, kAnySize});
  check_dtype("key", key, query.scalar_type());
  check_shape("mask", mask, {batch, kAnySize, key.size(2), key.size(3), key.size(4)});
  check_dtype("mask", mask, ScalarType::Bool);
  if (query_mask) {
    check_shape("query_mask", *query_mask, {batch, height, width});
    check_dtype("query_mask", *query_mask, ScalarType::Bool);
  }
  STD_TORCH_CHECK(neighbors >= 1, "neighbors must be at least 1");

  const int64_t objects = mask.size(1);
  const std::vector<int64_t> shape{batch, objects, neighbors, height, width};
  Tensor distance = torch::stable::new_empty(query, shape, accumulator_dtype(query.scalar_type()));
  Tensor index = torch::stable::new_empty(query, shape, ScalarType::Long);
  if (distance.numel() == 0) return {distance, index};

  const int64_t frame = objects * neighbors * height * width;
  const auto match_batch = [&]<class E, class S>(E, S) {
    using T = typename E::Lanes::T;
    for (int64_t n = 0; n < batch; ++n) {
      match_frame<E, S>(query, key, mask, query_mask, n, neighbors,
                        distance.mutable_data_ptr<T>() + n * frame,
                        index.mutable_data_ptr<int64_t>() + n * frame);
    }
  };
  dispatch_floating(query.scalar_type(), [&](auto sample) {
    using S = decltype(sample);
    // Processors with the matrix engine add the products of bfloat16 pairs at half the rate of float32's.
#if defined(VOSOPS_BF16_DOT) && !defined(VOSOPS_AMX)
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (has_bf16_dot()) return match_batch(Bf16Element{}, sample);
    }
#endif
    match_batch(FloatElement<Vec<Accumulator<S>, kRegisterBytes>>{}, sample);
  });
  return {distance, index};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("global_matching", TORCH_BOX(&vosops::cpu::global_matching));
}
