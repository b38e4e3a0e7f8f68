// Global matching on Intel's matrix engine: a filter in bfloat16 with a strict bound, and the float32 scores
// of the few keys that it leaves (amx_filter.h). The result is that of global_matching.cpp in float32.
//
// The keys of each set of objects are packed once, 16 a panel: as tiles of bfloat16 less a shift, and as
// float32 rows for what is computed again. A task owns groups of 32 query pixels, as many as let their lists
// stay in the second-level cache; blocks of key panels that fit it as well stream past them. Two panels times
// 32 queries are four tiles; while the next ones are multiplied, the greatest of each tile's rows is compared
// with the bars of the panel's objects. Half the squared length of a key is subtracted by three spare
// channels, where there are, or with that maximum. bfloat16 inputs are not shifted: their products are exact,
// and the bound is that of the additions alone.
// Bytes: the packed keys, 6 C M, written once, and 2 C M read per task; lists of up to 768 bytes per query
// pixel and object. Floor: 2 C operations, C rounded up to 32, per wanted query pixel and object pixel at the
// rate of the tiles.
#if defined(VOSOPS_AMX)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/amx_filter.h"
#include "cpu/best.h"
#include "cpu/gemm.h"
#include "cpu/global_matching.h"
#include "cpu/parallel.h"

namespace vosops::cpu {
namespace {

using amx::kRows;
using amx::Lanes;
using amx::NoteLists;
using amx::Reg;
using Element = FloatElement<Vec<float, kRegisterBytes>>;  // as global_matching.cpp computes float32

constexpr int kGroup = 2 * kRows;  // query pixels of a group
constexpr int64_t kMostGroups = 32;
constexpr int64_t kTogether = 2;  // groups for which a pair of key panels stays in the first-level cache
constexpr int64_t kListBytes = 2 << 20;
constexpr int64_t kKeyBlockBytes = 256 << 10;
constexpr int64_t kSampled = 128;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

amx::Counter served("global_matching.filter"), overflowed("global_matching.overflow"),
    out_of_range("global_matching.range"), hopeless("global_matching.hopeless");

int64_t row_length(int64_t channels) {
  return (channels + kRows - 1) / kRows * kRows;
}

// Room for 16 vectors element by element, and as rows.
class Staging {
 public:
  explicit Staging(int64_t channels) : channels_(channels), data_(row_length(channels) * kRows) {
    std::fill(data_.data() + channels * kRows, data_.data() + row_length(channels) * kRows, 0.f);
  }
  float* data() { return data_.data(); }
  void clear(int64_t vector) {
    for (int64_t e = 0; e < channels_; ++e) data_[e * kRows + vector] = 0;
  }
  void write_rows(float* to) const {
    const int64_t row = row_length(channels_);
    for (int64_t e = 0; e < row; e += kRows)
      transpose_lanes<Lanes>(data_.data() + e * kRows, kRows, to + e, row);
  }
  amx::Columns columns(const float* shift) const { return {data_.data(), channels_, shift}; }

 private:
  int64_t channels_;
  Workspace<float> data_;
};

// The key panels of one batch element.
struct FilterKeys {
  struct Panel {
    const std::vector<int64_t>* objects;
    amx::Side side;
    uint32_t usable;        // bits of the keys that may win
    int64_t pixels[kRows];  // flat indices
  };

  int64_t channels, steps, row;
  bool exact;  // bfloat16, which is not shifted
  bool norms_inside;
  std::vector<float> shift;
  std::vector<Panel> panels;  // an even number
  Workspace<uint16_t> tiles;
  Workspace<float> rows;     // float32, (panel * 16 + key, row)
  Workspace<float> starts;   // the float32 score without its products
  Workspace<float> halves;   // minus half the squared length after the shift
  Workspace<int32_t> slots;  // panel * 16 + key of a pixel, by flat index

  explicit FilterKeys(const MatchingTask& task)
      : channels(task.key.size(1)),
        steps(amx::steps_for(channels)),
        row(row_length(channels)),
        exact(task.key.scalar_type() == ScalarType::BFloat16),
        norms_inside(amx::holds_norms(channels)),
        panels(count_panels(task.groups)),
        tiles(panels.size() * steps * amx::kTile),
        rows(panels.size() * kRows * row),
        starts(panels.size() * kRows),
        halves(panels.size() * kRows),
        slots(task.key.size(2) * task.key.size(3) * task.key.size(4)) {
    dispatch_floating(task.key.scalar_type(), [&]<class S>(S) {
      if constexpr (!std::is_same_v<S, double>) pack<S>(task);
    });
  }

  const uint16_t* tile(int64_t panel) const { return tiles.data() + panel * steps * amx::kTile; }
  const float* key(int64_t slot) const { return rows.data() + slot * row; }
  const float* shift_or_null() const { return exact ? nullptr : shift.data(); }

 private:
  static size_t count_panels(const std::vector<KeyGroup>& groups) {
    size_t count = 0;
    for (const KeyGroup& group : groups) count += (group.pixels.size() + kRows - 1) / kRows;
    return count + count % 2;
  }

  template <class S>
  void pack(const MatchingTask& task) {
    const S* base = task.key.const_data_ptr<S>() + task.n * task.key.stride(0);
    const int64_t stride = task.key.stride(1);
    const PixelGrid grid = PixelGrid::of_key(task.key);
    if (!exact) choose_shift(task, base, stride, grid);
    struct Source {
      const int64_t* pixels;
      int64_t count;
    };
    std::vector<Source> sources(panels.size(), {nullptr, 0});
    size_t next = 0;
    static const std::vector<int64_t> kNoObjects;
    for (const KeyGroup& group : task.groups) {
      const int64_t size = static_cast<int64_t>(group.pixels.size());
      for (int64_t i = 0; i < size; i += kRows) {
        panels[next].objects = &group.objects;
        sources[next++] = {group.pixels.data() + i, std::min<int64_t>(kRows, size - i)};
      }
    }
    for (; next < panels.size(); ++next) panels[next].objects = &kNoObjects;
    torch::stable::parallel_for(0, static_cast<int64_t>(panels.size()), 16, [&](int64_t begin, int64_t end) {
      Staging staging(channels);
      for (int64_t i = begin; i < end; ++i) {
        int64_t offsets[kRows];
        for (int64_t j = 0; j < sources[i].count; ++j) {
          const int64_t pixel = sources[i].pixels[j];
          panels[i].pixels[j] = pixel;
          slots[pixel] = static_cast<int32_t>(i * kRows + j);
          offsets[j] = grid.offset(pixel);
        }
        float norm[kRows];
        pack_panel<Element>(base, offsets, sources[i].count, stride, channels, int64_t{kRows}, staging.data(),
                            norm);
        staging.write_rows(rows.data() + i * kRows * row);
        round(i, sources[i].count, staging, norm);
      }
    });
  }

  // Rounds a panel. One with a key so long that something could overflow is left to float32 as a whole.
  void round(int64_t i, int64_t count, Staging& staging, const float* norm) {
    Panel& panel = panels[i];
    panel.usable = 0;
    bool filtered = true;
    for (int j = 0; j < kRows; ++j) {
      const bool usable = j < count && std::isfinite(norm[j]);
      panel.usable |= static_cast<uint32_t>(usable) << j;
      starts[i * kRows + j] = usable ? norm[j] / -2 : -kInfinity;
      if (usable && norm[j] > amx::kMostSquared) filtered = false;
    }
    for (int j = 0; j < kRows; ++j)
      if (!filtered || (panel.usable >> j & 1) == 0) staging.clear(j);
    const amx::Columns columns = staging.columns(shift_or_null());
    const Reg squares = amx::squared_lengths(columns);
    Reg half = filtered ? squares * -0.5f : Reg{};
    for (int j = 0; filtered && j < kRows; ++j)
      if ((panel.usable >> j & 1) == 0) half[j] = -kInfinity;
    Lanes::store(halves.data() + i * kRows, half);
    Reg pieces[amx::kNormPieces];
    amx::split_number(half, pieces);
    const Reg loss = amx::round_panel<false>(columns, norms_inside ? pieces : nullptr,
                                             tiles.data() + i * steps * amx::kTile);
    panel.side = {0, 0, filtered ? 0 : kInfinity};
    for (int j = 0; filtered && j < kRows; ++j) {
      if ((panel.usable >> j & 1) == 0) continue;
      const amx::Side side = amx::side_of(squares[j], loss[j], channels, exact);
      panel.side.length = std::max(panel.side.length, side.length);
      panel.side.lost = std::max(panel.side.lost, side.lost);
      panel.side.rest = std::max(panel.side.rest, amx::rest_of_key(side, norm[j], channels, steps));
    }
  }

  // The mean of some keys that are spread over all of them, without those far longer than most.
  template <class S>
  void choose_shift(const MatchingTask& task, const S* base, int64_t stride, const PixelGrid& grid) {
    shift.assign(channels, 0.f);
    int64_t total = 0;
    for (const KeyGroup& group : task.groups) total += static_cast<int64_t>(group.pixels.size());
    const int64_t step = std::max<int64_t>(1, total / kSampled);
    std::vector<float> sample, norms;
    int64_t skipped = 0;
    for (const KeyGroup& group : task.groups) {
      const int64_t size = static_cast<int64_t>(group.pixels.size());
      int64_t i = skipped;
      for (; i < size; i += step) {
        const S* from = base + grid.offset(group.pixels[i]);
        float norm = 0;
        const size_t first = sample.size();
        for (int64_t e = 0; e < channels; ++e) {
          const float x = widen(from[e * stride]);
          sample.push_back(x);
          norm += x * x;
        }
        if (norm <= amx::kMostSquared) {
          norms.push_back(norm);
        } else {
          sample.resize(first);
        }
      }
      skipped = i - size;
    }
    if (norms.empty()) return;
    std::vector<float> sorted = norms;
    std::nth_element(sorted.begin(), sorted.begin() + sorted.size() / 2, sorted.end());
    constexpr float kFarLonger = 16;
    const float most = kFarLonger * sorted[sorted.size() / 2];
    float count = 0;
    for (size_t i = 0; i < norms.size(); ++i) {
      if (norms[i] > most) continue;
      ++count;
      for (int64_t e = 0; e < channels; ++e) shift[e] += sample[i * channels + e];
    }
    for (float& x : shift) x /= count;
  }
};

// The query pixels of one task and what they have found.
class FilterQueries {
 public:
  FilterQueries(const MatchingTask& task, const FilterKeys& keys, int64_t groups, float* distance,
                int64_t* index)
      : task_(task),
        keys_(keys),
        grid_(PixelGrid::of_query(task.query)),
        distance_(distance),
        index_(index),
        staging_(keys.channels),
        tiles_(groups * 2 * keys.steps * amx::kTile),
        rows_(groups * kGroup * keys.row),
        lengths_(groups * kGroup),
        losses_(groups * kGroup),
        rests_(groups * kGroup),
        norms_(groups * kGroup),
        notes_(groups * task.objects * kGroup, task.neighbors),
        best_(task.objects * kGroup, task.neighbors),
        nearest_(task.objects * kGroup, task.neighbors),
        left_(groups * kGroup) {}

  // Serves wanted[first, first + count); appends those that it cannot to `left`.
  void run(int64_t first, int64_t count, std::vector<int64_t>& left) {
    pixels_ = task_.wanted.data() + first;
    count_ = count;
    groups_ = (count + kGroup - 1) / kGroup;
    dispatch_floating(task_.query.scalar_type(), [&]<class S>(S) {
      if constexpr (!std::is_same_v<S, double>) {
        for (int64_t p = 0; p < groups_ * 2; ++p) pack<S>(p);
      }
    });
    search();
    for (int64_t g = 0; g < groups_; ++g) decide(g);
    for (int64_t i = 0; i < count_; ++i)
      if (left_[i]) left.push_back(pixels_[i]);
  }

 private:
  // Lists lie by group, object and lane.
  int64_t list(int64_t g, int64_t o, int64_t lane) const { return (g * task_.objects + o) * kGroup + lane; }
  const float* row(int64_t g, int64_t lane) const { return rows_.data() + (g * kGroup + lane) * keys_.row; }

  template <class S>
  void pack(int64_t p) {
    const Tensor& q = task_.query;
    const S* base = q.const_data_ptr<S>() + task_.n * q.stride(0);
    const int64_t count = std::clamp<int64_t>(count_ - p * kRows, 0, kRows);
    int64_t offsets[kRows];
    for (int64_t i = 0; i < count; ++i) offsets[i] = grid_.offset(pixels_[p * kRows + i]);
    float* norm = norms_.data() + p * kRows;
    pack_panel<Element>(base, offsets, count, q.stride(1), keys_.channels, int64_t{kRows}, staging_.data(),
                        norm);
    staging_.write_rows(rows_.data() + p * kRows * keys_.row);
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t at = p * kRows + i;
      const bool none = i >= count || !std::isfinite(norm[i]);
      left_[at] = !none && norm[i] > amx::kMostSquared;
      if (left_[at]) ++out_of_range;
      for (int64_t o = 0; o < task_.objects; ++o) {
        const int64_t l = list(at / kGroup, o, at % kGroup);
        notes_.clear(l);
        if (none || left_[at]) notes_.close(l);
      }
      if (none || left_[at]) staging_.clear(i);
    }
    const amx::Columns columns = staging_.columns(keys_.shift_or_null());
    const Reg one = Lanes::set1(1), ones[amx::kNormPieces] = {one, one, one};
    const Reg squares = amx::squared_lengths(columns);
    const Reg loss = amx::round_panel<true>(columns, keys_.norms_inside ? ones : nullptr,
                                            tiles_.data() + p * keys_.steps * amx::kTile);
    for (int i = 0; i < kRows; ++i) {
      const amx::Side side = amx::side_of(squares[i], loss[i], keys_.channels, keys_.exact);
      lengths_[p * kRows + i] = side.length;
      losses_[p * kRows + i] = side.lost;
      rests_[p * kRows + i] = amx::rest_of_query(side, norm[i], keys_.channels, keys_.steps);
    }
  }

  void search() {
    const amx::Region region;
    const int64_t panels = static_cast<int64_t>(keys_.panels.size());
    const int64_t panel_bytes = keys_.steps * amx::kTile * 2;
    const int64_t block = std::max<int64_t>(2, kKeyBlockBytes / panel_bytes / 2 * 2);
    for (int64_t begin = 0; begin < panels; begin += block)
      for (int64_t g = 0; g < groups_; g += kTogether) {
        const int64_t last = std::min(g + kTogether, groups_), end = std::min(begin + block, panels);
        keys_.norms_inside ? search<true>(g, last, begin, end) : search<false>(g, last, begin, end);
      }
  }

  // Panels [begin, end) for groups [first, last): a pair of panels stays in the first-level cache for all.
  template <bool kNormsInside>
  void search(int64_t first, int64_t last, int64_t begin, int64_t end) {
    alignas(64) float ring[2][4 * amx::kSums];
    const int64_t steps = keys_.steps, panel = steps * amx::kTile;
    int slot = 0;
    int64_t before_g = -1, before_i = -1;  // what the other slot holds
    for (int64_t i = begin; i < end; i += 2) {
      for (int64_t g = first; g < last; ++g) {
        const uint16_t *a = keys_.tile(i), *b = tiles_.data() + g * 2 * panel;
        amx::zero_sums();
        amx::multiply_add<1>(a, a + panel, b, b + panel, steps);
        amx::store_sums(ring[slot]);
        slot ^= 1;
        if (before_g >= 0) consider<kNormsInside>(before_g, before_i, ring[slot]);
        before_g = g, before_i = i;
      }
    }
    consider<kNormsInside>(before_g, before_i, ring[slot ^ 1]);
  }

  // Compares the tiles of panels i and i + 1 and group g with the bars.
  template <bool kNormsInside>
  [[gnu::always_inline]] void consider(int64_t g, int64_t i, const float* tiles) {
    for (int a = 0; a < 2; ++a) {
      const int64_t k = i + a;
      const FilterKeys::Panel& keys = keys_.panels[k];
      const float* norms = kNormsInside ? nullptr : keys_.halves.data() + k * kRows;
      for (int j = 0; j < 2; ++j) {
        const int64_t at = g * kGroup + j * kRows;
        const float* tile = tiles + (a * 2 + j) * amx::kSums;
        const Reg greatest = amx::greatest_row(tile, norms);
        const Reg error =
            amx::error_bound(Lanes::load(lengths_.data() + at), Lanes::load(losses_.data() + at),
                             Lanes::load(rests_.data() + at), keys.side);
        const Reg upper = greatest + error;
        for (int64_t o : *keys.objects) {
          const int64_t lists = list(g, o, j * kRows);
          const uint32_t reached = lanes_at_least<Lanes>(upper, Lanes::load(notes_.bars() + lists));
          if (reached != 0) note(reached, lists, k, tile, norms, upper, greatest - error, error);
        }
      }
    }
  }

  // Notes panel k for the lanes that it reached of the lists from `first` on.
  [[gnu::noinline]] void note(uint32_t reached, int64_t first, int64_t k, const float* tile,
                              const float* norms, Reg upper, Reg lower, Reg error) {
    const uint32_t usable = keys_.panels[k].usable;
    if (usable == 0) return;
    for (; reached != 0; reached &= reached - 1) {
      const int lane = __builtin_ctz(reached);
      const int64_t l = first + lane;
      notes_.raise(l, lower[lane]);
      const float least = notes_.bars()[l] - error[lane];
      const uint32_t rows = amx::rows_at_least(tile, norms, lane, least) & usable;
      if (notes_.add(l, {upper[lane], static_cast<int32_t>(k), rows})) continue;
      const int64_t at = l / kGroup / task_.objects * kGroup + l % kGroup;
      left_[at] = true;
      ++overflowed;
      for (int64_t o = 0; o < task_.objects; ++o) notes_.close(list(at / kGroup, o, at % kGroup));
    }
  }

  // Computes the scores of what the lists of group g noted, then the distances of the best, and writes them.
  void decide(int64_t g) {
    best_.clear();
    nearest_.clear();
    jobs_.clear();
    for (int64_t o = 0; o < task_.objects; ++o) {
      for (int64_t lane = 0; lane < kGroup; ++lane) {
        const size_t before = jobs_.size();
        notes_.each(list(g, o, lane), [&](const NoteLists::Note& note) {
          for (uint32_t rows = note.rows; rows != 0; rows &= rows - 1)
            jobs_.push_back({o * kGroup + lane, int64_t{note.panel} * kRows + __builtin_ctz(rows)});
        });
        if (jobs_.size() - before > static_cast<size_t>(task_.neighbors)) continue;
        // All that there are: their scores decide nothing.
        for (size_t i = before; i < jobs_.size(); ++i) best_.insert(jobs_[i].list, 0, pixel(jobs_[i].slot));
        jobs_.resize(before);
      }
    }
    by_pairs(g, [&](const float* const* q, const float* const* k, const Job* jobs, int count) {
      float scores[amx::kPairs];
      for (int i = 0; i < amx::kPairs; ++i) scores[i] = keys_.starts.data()[jobs[i < count ? i : 0].slot];
      amx::add_products(q, k, keys_.channels, scores);
      for (int i = 0; i < count; ++i)
        if (scores[i] >= best_.bars()[jobs[i].list])
          best_.insert(jobs[i].list, scores[i], pixel(jobs[i].slot));
    });
    jobs_.clear();
    for (int64_t l = 0; l < task_.objects * kGroup; ++l) {
      for (int64_t k = 0; k < task_.neighbors; ++k) {
        const int64_t m = best_.indices(l)[k];
        if (m != BestLists<float>::kNoIndex) jobs_.push_back({l, keys_.slots.data()[m]});
      }
    }
    by_pairs(g, [&](const float* const* q, const float* const* k, const Job* jobs, int count) {
      float distances[amx::kPairs];
      amx::squared_distances(q, k, keys_.channels, distances);
      for (int i = 0; i < count; ++i)
        if (distances[i] < kInfinity) nearest_.insert(jobs[i].list, -distances[i], pixel(jobs[i].slot));
    });
    write(g);
  }

  void write(int64_t g) {
    const int64_t pixels = grid_.height * grid_.width, neighbors = task_.neighbors;
    for (int64_t o = 0; o < task_.objects; ++o) {
      for (int64_t lane = 0; lane < kGroup && g * kGroup + lane < count_; ++lane) {
        const int64_t i = g * kGroup + lane, l = o * kGroup + lane;
        if (left_[i]) continue;
        const bool undefined = std::isnan(norms_[i]);
        for (int64_t k = 0; k < neighbors; ++k) {
          const int64_t m = nearest_.indices(l)[k], at = (o * neighbors + k) * pixels + pixels_[i];
          const bool found = m != BestLists<float>::kNoIndex;
          distance_[at] = undefined ? std::numeric_limits<float>::quiet_NaN()
                          : found   ? -nearest_.scores(l)[k]
                                    : kInfinity;
          index_[at] = found ? m : -1;
        }
      }
    }
  }

  // A list of the group and a key that may be in it.
  struct Job {
    int64_t list, slot;
  };

  int64_t pixel(int64_t slot) const { return keys_.panels[slot / kRows].pixels[slot % kRows]; }

  // Calls f with the vectors of kPairs jobs at a time, the first of them again where there are fewer.
  template <class F>
  void by_pairs(int64_t g, const F& f) const {
    for (size_t first = 0; first < jobs_.size(); first += amx::kPairs) {
      const int count = static_cast<int>(std::min<size_t>(amx::kPairs, jobs_.size() - first));
      const float *q[amx::kPairs], *k[amx::kPairs];
      for (int i = 0; i < amx::kPairs; ++i) {
        const Job& job = jobs_[first + (i < count ? i : 0)];
        q[i] = row(g, job.list % kGroup);
        k[i] = keys_.key(job.slot);
      }
      f(q, k, jobs_.data() + first, count);
    }
  }

  const MatchingTask& task_;
  const FilterKeys& keys_;
  const PixelGrid grid_;
  float* distance_;
  int64_t* index_;
  const int64_t* pixels_ = nullptr;  // flat indices of the task's query pixels
  int64_t count_ = 0, groups_ = 0;
  Staging staging_;
  Workspace<uint16_t> tiles_;                          // B panels, two a group
  Workspace<float> rows_;                              // float32, (query, row)
  Workspace<float> lengths_, losses_, rests_, norms_;  // of each query
  NoteLists notes_;
  BestLists<float> best_, nearest_;  // of one group, by score and by distance
  std::vector<char> left_;           // queries for the kernel without the filter
  std::vector<Job> jobs_;
};

}  // namespace

// Measured on an Intel Xeon of family 6, model 207, with 16 and 100 channels: packing costs more than it
// saves for fewer.
bool filter_serves(const MatchingTask& task) {
  constexpr int64_t kLeastQueries = 1024, kLeastKeys = 1024;
  if (task.neighbors > NoteLists::kMostNeighbors || task.key.size(1) > amx::kMostFiltered) return false;
  int64_t keys = 0;
  for (const KeyGroup& group : task.groups) keys += static_cast<int64_t>(group.pixels.size());
  const bool large = static_cast<int64_t>(task.wanted.size()) >= kLeastQueries && keys >= kLeastKeys;
  return large && amx::ready();
}

std::vector<int64_t> match_by_filter(const MatchingTask& task, float* distance, int64_t* index) {
  ++served;
  const FilterKeys keys(task);
  const int64_t wanted = static_cast<int64_t>(task.wanted.size());
  // A group of queries from all over the frame tells whether most lists would overflow.
  std::vector<int64_t> some;
  for (int64_t i = 0; i < kGroup; ++i) some.push_back(task.wanted[i * wanted / kGroup]);
  const MatchingTask probe{task.query, task.key, task.n, task.groups, some, task.objects, task.neighbors};
  std::vector<int64_t> left_of_some;
  FilterQueries(probe, keys, 1, distance, index).run(0, kGroup, left_of_some);
  if (left_of_some.size() > kGroup / 2) {
    ++hopeless;
    return task.wanted;
  }
  const int64_t list_bytes = NoteLists::bytes(task.objects * kGroup, task.neighbors);
  const int64_t groups = std::clamp<int64_t>(kListBytes / list_bytes, 1, kMostGroups);
  const int64_t each = groups * kGroup, tasks = (wanted + each - 1) / each;
  std::vector<std::vector<int64_t>> left(tasks);
  parallel_tasks(tasks, [&] {
    auto queries = std::make_unique<FilterQueries>(task, keys, groups, distance, index);
    return [&, queries = std::move(queries)](int64_t t) {
      queries->run(t * each, std::min(each, wanted - t * each), left[t]);
    };
  });
  std::vector<int64_t> all;
  for (const std::vector<int64_t>& of_task : left) all.insert(all.end(), of_task.begin(), of_task.end());
  return all;
}

}  // namespace vosops::cpu

#endif
