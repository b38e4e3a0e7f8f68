// Packing of maps and weights, and the products, of amx_conv.h.
#include "cpu/amx_conv.h"

#if defined(VOSOPS_AMX)

#include <atomic>
#include <memory>
#include <type_traits>

namespace vosops::cpu::amx {
namespace {

constexpr int64_t kWeightBytes = 192 << 10;  // of a chunk's weights of two output tiles
constexpr int64_t kMapBytes = 704 << 10;     // of a chunk's pixels of a block
constexpr int64_t kLeastBlock = 8;           // groups of a block at least

template <class F>
void dispatch_pieces(int pieces, const F& f) {
  if (pieces == 1) return f(std::integral_constant<int, 1>{});
  if (pieces == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 3>{});
}
template <class F>
void dispatch_narrow(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) return f(BFloat16{});
  if (dtype == ScalarType::Half) return f(Half{});
  f(float{});
}

// ---- Weights

// Separates adjacent taps: to[t * stride + i] = from[i * taps + t] for kCount channels or outputs i.
template <class S>
class TapSplitter {
 public:
  static constexpr int kCount = kStep;

  explicit TapSplitter(int64_t taps) : taps_(taps) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    if (taps > kMost) return;
    for (int t = 0; t < taps; ++t) {
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = i * taps + t;
        order_[t][at / kLanes][i] = static_cast<Index>(at % kLanes);
        lanes_[t][at / kLanes] |= Mask{1} << i;
      }
    }
#endif
  }

  void operator()(const S* from, S* to, int64_t stride) const {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    if (taps_ <= kMost) {
      for (int half = 0; half < kCount; half += kLanes, from += kLanes * taps_, to += kLanes) {
        for (int64_t t = 0; t < taps_; ++t) {
          __m512i sum = _mm512_setzero_si512();
          for (int64_t r = 0; r < taps_; ++r) {
            const __m512i source = _mm512_loadu_si512(from + r * kLanes);
            const __m512i order = _mm512_load_si512(order_[t][r]);
            if constexpr (sizeof(S) == 2) {
              sum = _mm512_mask_permutexvar_epi16(sum, lanes_[t][r], order, source);
            } else {
              sum = _mm512_mask_permutexvar_epi32(sum, lanes_[t][r], order, source);
            }
          }
          _mm512_storeu_si512(to + t * stride, sum);
        }
      }
      return;
    }
#endif
    some(from, kCount, to, stride);
  }
  // The same for the first `count`.
  void some(const S* from, int64_t count, S* to, int64_t stride) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t t = 0; t < taps_; ++t) to[t * stride + i] = from[i * taps_ + t];
  }

 private:
  int64_t taps_;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  static constexpr int kMost = 9, kLanes = 64 / sizeof(S);
  using Index = std::conditional_t<sizeof(S) == 2, uint16_t, uint32_t>;
  using Mask = std::conditional_t<sizeof(S) == 2, __mmask32, __mmask16>;
  alignas(64) Index order_[kMost][kMost][kLanes] = {};
  Mask lanes_[kMost][kMost] = {};
#endif
};

uint32_t first_bits(int64_t count) {
  return count >= 32 ? ~0u : (1u << count) - 1;
}

// Packs steps of two output tiles.
template <int kPieces, class S>
class WeightPacker {
 public:
  WeightPacker(const ConvWeight& weight, int64_t first, int64_t end)
      : weight_(weight),
        first_(first),
        end_(end),
        taps_(weight.taps()),
        layout_(layout(weight)),
        splitter_(taps_),
        scratch_(layout_ < Layout::kSplitInputs ? 0 : (end - first) * taps_ * kCopy) {}

  void operator()(int64_t tile, uint16_t* to, Extent& extent) {
    const int64_t stride = (end_ - first_) * taps_ * kPieces * kTile;
    if (layout_ == Layout::kSplitInputs) split_inputs(tile);
    if (layout_ == Layout::kSplitOutputs) split_outputs(tile);
    for (int64_t i = 0; i < 2; ++i) pack(tile, i, to + i * stride, extent);
  }

 private:
  // Tiles are packed from the weights themselves or, where neither inputs nor outputs are adjacent, from a
  // copy [step][tap][output][input] or [step][tap][input][output] of both tiles.
  enum class Layout { kInputs, kOutputs, kSplitInputs, kSplitOutputs };
  static constexpr int64_t kCopy = kGroup * kStep;  // of both tiles, a step and a tap

  static Layout layout(const ConvWeight& weight) {
    if (weight.input_stride == 1) return Layout::kInputs;
    if (weight.output_stride == 1) return Layout::kOutputs;
    const bool by_output =
        weight.tap_stride == 1 && weight.output_stride == weight.taps() && weight.gates == 1;
    return by_output ? Layout::kSplitOutputs : Layout::kSplitInputs;
  }
  const S* at(int64_t output, int64_t input) const {
    return static_cast<const S*>(weight_.data) + output * weight_.output_stride +
           input * weight_.input_stride;
  }
  S* copy(int64_t step) { return scratch_.data() + (step - first_) * taps_ * kCopy; }

  void split_inputs(int64_t tile) {
    const bool adjacent = weight_.tap_stride == 1 && weight_.input_stride == taps_;
    for (int64_t row = 0; row < kGroup; ++row) {
      const int64_t m = row % kRows, output = weight_.first_output(tile + row / kRows) + m;
      if (m >= weight_.count(tile + row / kRows)) continue;
      for (int64_t s = first_; s < end_; ++s) {
        const int64_t count = std::min<int64_t>(kStep, weight_.inputs - s * kStep);
        const S* from = at(output, s * kStep);
        S* to = copy(s) + row * kStep;
        if (adjacent && count == kStep) {
          splitter_(from, to, kCopy);
        } else {
          for (int64_t c = 0; c < count; ++c)
            for (int64_t t = 0; t < taps_; ++t)
              to[t * kCopy + c] = from[c * weight_.input_stride + t * weight_.tap_stride];
        }
      }
    }
  }
  void split_outputs(int64_t tile) {
    const int64_t output = weight_.first_output(tile);
    const int64_t outputs = weight_.count(tile) + weight_.count(tile + 1);
    for (int64_t c = first_ * kStep; c < std::min(end_ * kStep, weight_.inputs); ++c) {
      S* to = copy(c / kStep) + c % kStep * kGroup;
      if (outputs == kGroup) {
        splitter_(at(output, c), to, kCopy);
      } else {
        splitter_.some(at(output, c), outputs, to, kCopy);
      }
    }
  }

  void pack(int64_t first_tile, int64_t i, uint16_t* to, Extent& extent) {
    const int64_t tile = first_tile + i, output = weight_.first_output(tile);
    const uint32_t vectors = first_bits(weight_.count(tile));
    for (int64_t s = first_; s < end_; ++s) {
      const uint32_t elements = first_bits(weight_.inputs - s * kStep);
      for (int64_t t = 0; t < taps_; ++t, to += kPieces * kTile) {
        const int64_t tap = weight_.reversed ? taps_ - 1 - t : t;
        const auto by_output = [&](const S* from, int64_t stride) {
          pack_tile<kPieces, true, true>(from, stride, vectors, elements, 1.f, to, extent);
        };
        const auto by_input = [&](const S* from, int64_t stride) {
          pack_tile<kPieces, false, true>(from, stride, vectors, elements, 1.f, to, extent);
        };
        if (vectors == 0) {
          std::fill_n(to, kPieces * kTile, 0);
        } else if (layout_ == Layout::kInputs) {
          by_output(at(output, s * kStep) + tap * weight_.tap_stride, weight_.output_stride);
        } else if (layout_ == Layout::kOutputs) {
          by_input(at(output, s * kStep) + tap * weight_.tap_stride, weight_.input_stride);
        } else if (layout_ == Layout::kSplitInputs) {
          by_output(copy(s) + tap * kCopy + i * kRows * kStep, kStep);
        } else {
          by_input(copy(s) + tap * kCopy + i * kRows, kGroup);
        }
      }
    }
  }

  const ConvWeight& weight_;
  const int64_t first_, end_, taps_;
  const Layout layout_;
  const TapSplitter<S> splitter_;
  Workspace<S> scratch_;
};

// ---- Maps

// Packs a step of a map's channels of an image to [piece][pixel][32].
template <int kPieces, class S>
void pack_map(const ConvPlane& plane, const ConvMap& map, int64_t image, int64_t step, uint16_t* to,
              Extent& extent) {
  const int64_t piece = plane.padded() * kStep, pitch = plane.pitch();
  const auto zero = [&](int64_t begin, int64_t end) {
    for (int i = 0; i < kPieces; ++i)
      std::fill(to + i * piece + begin * kStep, to + i * piece + end * kStep, 0);
  };
  const uint32_t elements = first_bits(map.channels - step * kStep);
  const S* data =
      static_cast<const S*>(map.data) + image * map.image_stride + step * kStep * map.channel_stride;
  alignas(64) uint16_t tile[kPieces * kTile];
  const auto pack = [&](const S* from, int64_t count, int64_t at) {
    for (int64_t x = 0; x < count; x += kRows, from += kRows * map.column_stride, at += kRows) {
      const int64_t some = std::min<int64_t>(kRows, count - x);
      const uint32_t pixels = first_bits(some);
      if (map.channel_stride == 1) {
        pack_tile<kPieces, true, false>(from, map.column_stride, pixels, elements, 1.f, tile, extent);
      } else if (map.column_stride == 1) {
        pack_tile<kPieces, false, false>(from, map.channel_stride, pixels, elements, 1.f, tile, extent);
      } else {
        S copy[kStep][kRows];
        for (int c = 0; c < kStep; ++c)
          for (int i = 0; i < some; ++i)
            if (elements >> c & 1) copy[c][i] = from[c * map.channel_stride + i * map.column_stride];
        pack_tile<kPieces, false, false>(&copy[0][0], kRows, pixels, elements, 1.f, tile, extent);
      }
      for (int i = 0; i < kPieces; ++i)
        std::memcpy(to + i * piece + at * kStep, tile + i * kTile, some * kStep * sizeof(uint16_t));
    }
  };
  zero(0, plane.before() - plane.reach_y * pitch);
  const int64_t rows = plane.height + 2 * plane.reach_y;
  const bool whole = plane.reach_x == 0 && map.row_stride == plane.width * map.column_stride;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = plane.before() + (row - plane.reach_y) * pitch, y = row - plane.reach_y + map.above;
    if (y < 0 || y >= map.rows) {
      zero(at, at + pitch);
      continue;
    }
    const int64_t together =
        whole ? std::min(rows - row, map.rows - y) : 1;  // rows without zeros between them
    pack(data + y * map.row_stride, together * plane.width, at);
    zero(at + together * plane.width, at + together * plane.width + plane.reach_x);
    row += together - 1;
  }
  zero(plane.before() + (rows - plane.reach_y) * pitch, plane.padded());
}

// ---- Products

// What one term adds to the sums in a chunk: steps of its map and weights, packed.
struct Part {
  const uint16_t* map;  // of the first image's first step
  const uint16_t* weight;
  int64_t steps, map_image, map_step, map_piece, weight_tile;
  std::vector<int64_t> taps;  // where a tap's pixel lies from the result's
};

// Sums += the products of 32 pixels and two output tiles.
template <int kPieces>
void multiply_taps(const Part& part, const uint16_t* map, const uint16_t* b0) {
  const uint16_t* b1 = b0 + part.weight_tile;
  const int64_t* taps = part.taps.data();
  const int64_t count = static_cast<int64_t>(part.taps.size()), piece = part.map_piece;
  for (int64_t s = 0; s < part.steps; ++s, map += part.map_step) {
    for (int64_t t = 0; t < count; ++t, b0 += kPieces * kTile, b1 += kPieces * kTile) {
      const uint16_t* a0 = map + taps[t];
      const uint16_t* a1 = a0 + kTile;
      const auto load_maps = [&](int i) __attribute__((always_inline)) {
        tile_load<4>(a0 + i * piece);
        tile_load<5>(a1 + i * piece);
      };
      if constexpr (kPieces == 1) {
        tile_load<6>(b0);
        tile_load<4>(a0);
        tile_dot<0, 4, 6>();
        tile_load<7>(b1);
        tile_dot<1, 4, 7>();
        tile_load<5>(a1);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
      } else if constexpr (kPieces == 2) {
        load_maps(0);
        load_b(b0, b1, 1);
        dot_sums();
        load_b(b0, b1, 0);
        dot_sums();
        load_maps(1);
        dot_sums();
      } else {
        load_maps(0);
        load_b(b0, b1, 2);
        dot_sums();
        load_b(b0, b1, 1);
        dot_sums();
        load_maps(1);
        dot_sums();
        load_b(b0, b1, 0);
        dot_sums();
        load_maps(0);
        dot_sums();
        load_maps(2);
        dot_sums();
      }
    }
  }
}

class Convolution {
 public:
  Convolution(const ConvPlane& plane, int64_t images, const std::vector<ConvTerm>& terms, int pieces,
              int panel_tiles, const ConvFinish& finish)
      : plane_(plane),
        images_(images),
        terms_(terms),
        pieces_(pieces),
        pairs_(panel_tiles / 2),
        tile_pairs_(terms[0].weight.tiles() / 2),
        groups_(plane.groups()),
        finish_(finish) {
    cut();
    if (chunks_.size() > 1) sums_.emplace(images_ * tile_pairs_ * groups_ * 4 * kSums);
  }

  bool run() {
    for (size_t i = 0; i < chunks_.size(); ++i) {
      const std::vector<Part> parts = pack(chunks_[i]);
      if (outside_) return false;
      dispatch_pieces(pieces_, [&](auto pieces) {
        multiply<decltype(pieces)::value>(parts, i == 0, i + 1 == chunks_.size());
      });
    }
    return true;
  }

 private:
  // Steps [first, end) of a term.
  struct Range {
    size_t term;
    int64_t first, end;
  };
  using Chunk = std::vector<Range>;

  // Cuts the steps of all terms into chunks of about the same work.
  void cut() {
    int64_t work = 0;
    for (const ConvTerm& term : terms_) work += term.map.steps() * term.weight.taps();
    const int64_t most = std::max<int64_t>(1, kWeightBytes / (2 * pieces_ * kTile * sizeof(uint16_t)));
    const int64_t wanted = (work + most - 1) / most, each = (work + wanted - 1) / wanted;
    Chunk chunk;
    int64_t held = 0;
    for (size_t i = 0; i < terms_.size(); ++i) {
      const int64_t steps = terms_[i].map.steps(), taps = terms_[i].weight.taps();
      for (int64_t s = 0; s < steps;) {
        const int64_t room = std::max<int64_t>((each - held + taps - 1) / taps, held == 0);
        const int64_t count = std::min(room, steps - s);
        if (count > 0) chunk.push_back({i, s, s + count});
        s += count, held += count * taps;
        if (held >= each) chunks_.push_back(std::move(chunk)), chunk = {}, held = 0;
      }
    }
    if (!chunk.empty()) chunks_.push_back(std::move(chunk));
    // The buffers of one chunk serve all.
    int64_t maps = 0, weights = 0;
    for (const Chunk& each_chunk : chunks_) {
      int64_t map = 0, weight = 0;
      for (const Range& range : each_chunk) {
        const ConvTerm& term = terms_[range.term];
        map += images_ * (range.end - range.first) * pieces_ * plane_.padded() * kStep;
        if (term.packed == nullptr) weight += weight_size(term.weight, range.end - range.first, pieces_);
      }
      maps = std::max(maps, map), weights = std::max(weights, weight);
    }
    maps_.emplace(maps);
    weights_.emplace(weights);
  }

  std::vector<Part> pack(const Chunk& chunk) {
    std::vector<Part> parts;
    uint16_t* map = maps_->data();
    uint16_t* weight = weights_->data();
    for (const Range& range : chunk) {
      const ConvTerm& term = terms_[range.term];
      const int64_t steps = range.end - range.first, taps = term.weight.taps();
      Part part{map,
                weight,
                steps,
                0,
                pieces_ * plane_.padded() * kStep,
                plane_.padded() * kStep,
                steps * taps * pieces_ * kTile,
                {}};
      part.map_image = steps * part.map_step;
      const int64_t up = term.weight.height / 2, left = term.weight.width / 2;
      for (int64_t y = 0; y < term.weight.height; ++y)
        for (int64_t x = 0; x < term.weight.width; ++x)
          part.taps.push_back(((y - up) * plane_.pitch() + x - left) * kStep);
      pack_maps(term.map, range, map);
      map += images_ * part.map_image;
      if (term.packed != nullptr) {
        const int64_t step = taps * pieces_ * kTile;
        part.weight = term.packed + range.first * step;
        part.weight_tile = term.weight.steps() * step;
      } else {
        if (!pack_weights(term.weight, range.first, range.end, pieces_, weight)) outside_ = true;
        weight += weight_size(term.weight, steps, pieces_);
      }
      parts.push_back(std::move(part));
    }
    return parts;
  }

  void pack_maps(const ConvMap& map, const Range& range, uint16_t* to) {
    const int64_t steps = range.end - range.first, size = pieces_ * plane_.padded() * kStep;
    dispatch_pieces(pieces_, [&](auto pieces) {
      constexpr int kPieces = decltype(pieces)::value;
      dispatch_narrow(map.dtype, [&]<class S>(S) {
        parallel_tasks(images_ * steps, [&] {
          return [&, region = Region()](int64_t task) {
            Extent extent;
            pack_map<kPieces, S>(plane_, map, task / steps, range.first + task % steps, to + task * size,
                                 extent);
            if (kPieces > 1 && extent.outside()) outside_ = true;
          };
        });
      });
    });
  }

  template <int kPieces>
  void multiply(const std::vector<Part>& parts, bool first, bool last) {
    int64_t steps = 0;
    for (const Part& part : parts) steps += part.steps;
    const int64_t pixels = kMapBytes / (steps * pieces_ * kStep * static_cast<int64_t>(sizeof(uint16_t)));
    const int64_t fit = std::max((pixels - 2 * plane_.before()) / kGroup, kLeastBlock);
    const int64_t blocks = (groups_ + fit - 1) / fit, block = (groups_ + blocks - 1) / blocks;
    const int64_t panels = (tile_pairs_ + pairs_ - 1) / pairs_;
    parallel_tasks(images_ * blocks * panels, [&] {
      return [&, region = Region(), done = Workspace<float>(pairs_ * 4 * kSums)](int64_t task) mutable {
        const int64_t panel = task % panels, image = task / panels / blocks;
        const int64_t begin = task / panels % blocks * block, end = std::min(begin + block, groups_);
        for (int64_t group = begin; group < end; ++group) {
          for (int64_t i = 0; i < pairs_; ++i) {
            const int64_t pair = panel * pairs_ + i;
            float* held = sums_ ? sums_->data() + ((image * tile_pairs_ + pair) * groups_ + group) * 4 * kSums
                                : nullptr;
            if (first) {
              zero_sums();
            } else {
              load_sums(held);
            }
            for (const Part& part : parts) {
              const int64_t at = (plane_.before() + group * kGroup) * kStep;
              multiply_taps<kPieces>(part, part.map + image * part.map_image + at,
                                     part.weight + 2 * pair * part.weight_tile);
            }
            store_sums(last ? done.data() + i * 4 * kSums : held);
          }
          if (last) finish_(image, group * kGroup, panel, {done.data()});
        }
      };
    });
  }

  const ConvPlane plane_;
  const int64_t images_;
  const std::vector<ConvTerm>& terms_;
  const int pieces_;
  const int64_t pairs_, tile_pairs_, groups_;
  const ConvFinish& finish_;
  std::vector<Chunk> chunks_;
  std::optional<Workspace<uint16_t>> maps_, weights_;
  std::optional<Workspace<float>> sums_;
  std::atomic<bool> outside_{false};
};

}  // namespace

bool pack_weights(const ConvWeight& weight, int64_t first, int64_t end, int pieces, uint16_t* to) {
  std::atomic<bool> outside{false};
  dispatch_pieces(pieces, [&](auto count) {
    constexpr int kPieces = decltype(count)::value;
    dispatch_narrow(weight.dtype, [&]<class S>(S) {
      const int64_t size = 2 * (end - first) * weight.taps() * kPieces * kTile;
      parallel_tasks(weight.tiles() / 2, [&] {
        return [&, region = Region(),
                pack = std::make_unique<WeightPacker<kPieces, S>>(weight, first, end)](int64_t pair) {
          Extent extent;
          (*pack)(2 * pair, to + pair * size, extent);
          if (kPieces > 1 && extent.outside()) outside = true;
        };
      });
    });
  });
  return !outside;
}

bool convolve(const ConvPlane& plane, int64_t images, const std::vector<ConvTerm>& terms, int pieces,
              int panel_tiles, const ConvFinish& finish) {
  return Convolution(plane, images, terms, pieces, panel_tiles, finish).run();
}

}  // namespace vosops::cpu::amx

#endif
