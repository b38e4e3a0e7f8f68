// The forward pass of local attention by Intel's matrix engine (local_attention_amx.h): scores, softmax and
// weighted sums of 16 queries at a time.
//
// Between the two products lie a maximum, 2^x and a sum for every offset inside the image, the only work
// outside of the engine: with 32 channels and a reach of 7 the tiles take a quarter of the time. Weights are
// relative to the greatest, and what they sum to divides the result. No score reaches the memory.
#include "cpu/local_attention_amx.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "cpu/strided.h"

namespace vosops::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;

#if defined(VOSOPS_AMX)

using namespace amx;

Counter by_engine("local_attention.calls");
Counter out_of_range("local_attention.range");

// ---- What is learned

// The bias of all heads in powers of two, and the relative keys and values as B panels. An offset has a lane:
// lane l of register r of a row of the window is the row's offset 16 r + l, zero beyond the last.
template <int kWeights>
class Learned {
 public:
  Learned(const Window& window, int64_t heads, const MaybeTensor& bias, const MaybeTensor& key,
          const MaybeTensor& value, Outside& outside)
      : has_key(key.has_value()),
        has_value(value.has_value()),
        registers_(window.size * window.registers),
        key_steps_(key ? parts_of(key->size(1), kStep) : 0),
        value_steps_(parts_of(registers_, 2)),
        value_tiles_(value ? parts_of(value->size(1), kStep) * 2 : 0),
        bias_(heads * registers_ * kRows),
        keys_(heads * registers_ * key_steps_ * kWeights * kTile),
        values_(heads * value_tiles_ * value_steps_ * kWeights * kTile) {
    const Region region;
    Extent extent;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t i = 0; i < window.size; ++i) {
        for (int64_t lane = 0; lane < window.registers * kRows; ++lane) {
          const bool used = bias && lane < window.size;
          bias_[(head * window.size + i) * window.registers * kRows + lane] =
              used ? kLog2 * entry(*bias, head, i * window.size + lane) : 0.f;
        }
      }
      if (key) pack_key(window, *key, head, extent);
      if (value) pack_value(window, *value, head, extent);
    }
    outside.note(extent);
  }

  const bool has_key, has_value;

  const float* bias(int64_t head) const { return bias_.data() + head * registers_ * kRows; }
  // The relative keys of a register's offsets.
  Piece key(int64_t head, int64_t reg) const {
    return keys_.data() + (head * registers_ + reg) * key_steps_ * kWeights * kTile;
  }
  // The relative values of 16 channels: steps of two registers' offsets.
  Piece value(int64_t head, int64_t tile) const {
    return values_.data() + (head * value_tiles_ + tile) * value_steps_ * kWeights * kTile;
  }
  int64_t value_steps() const { return value_steps_; }

 private:
  static float entry(const Tensor& bias, int64_t head, int64_t offset) {
    return bias.const_data_ptr<float>()[head * bias.stride(0) + offset * bias.stride(1)];
  }

  void pack_key(const Window& window, const Tensor& key, int64_t head, Extent& extent) {
    StridedMatrix matrix = StridedMatrix::of(key, head * key.stride(0));
    for (int64_t reg = 0; reg < registers_; ++reg) {
      const int64_t lane = reg % window.registers * kRows;
      pack_panel<kWeights, true>(
          matrix, reg / window.registers * window.size + lane, std::min<int64_t>(kRows, window.size - lane),
          key_steps_, keys_.data() + (head * registers_ + reg) * key_steps_ * kWeights * kTile, extent);
    }
  }

  void pack_value(const Window& window, const Tensor& value, int64_t head, Extent& extent) {
    const int64_t channels = value.size(1), pitch = value_steps_ * kStep;
    Workspace<float> lanes(channels * pitch);  // each channel's, as the registers have them
    std::fill_n(lanes.data(), channels * pitch, 0.f);
    const float* from = value.const_data_ptr<float>() + head * value.stride(0);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t d = 0; d < window.size * window.size; ++d) {
        const int64_t row = d / window.size, lane = d % window.size;
        lanes[c * pitch + row * window.registers * kRows + lane] =
            from[c * value.stride(1) + d * value.stride(2)];
      }
    }
    const StridedMatrix matrix{lanes.data(), ScalarType::Float, pitch, 1, pitch};
    for (int64_t tile = 0; tile < value_tiles_; ++tile) {
      uint16_t* to = values_.data() + (head * value_tiles_ + tile) * value_steps_ * kWeights * kTile;
      const int64_t count = std::clamp<int64_t>(channels - tile * kRows, 0, kRows);
      pack_panel<kWeights, true>(matrix, tile * kRows, count, value_steps_, to, extent);
    }
  }

  const int64_t registers_, key_steps_, value_steps_, value_tiles_;
  Workspace<float> bias_;
  Workspace<uint16_t> keys_, values_;
};

// ---- The pass

// What the tasks of a call share.
template <int kMaps, int kWeights>
struct Attention {
  const Window& window;
  const HeadMaps query, key, value;
  const Learned<kWeights>& learned;
  const float scale;
  Tensor &out, &lse;
  Outside& outside;
  PixelPanels<kMaps> keys;
  ChannelPanels<kMaps> values;
  int64_t first_head = 0;  // of those that are packed
};

// One thread's: attends for rows of pixels of the packed heads.
template <int kMaps, int kWeights, class S>
class Attend : Band<kMaps, kWeights, S> {
  using Base = Band<kMaps, kWeights, S>;
  using Base::count_, Base::first_row_, Base::end_row_, Base::registers_, Base::window_;

 public:
  explicit Attend(const Attention<kMaps, kWeights>& call)
      : Base(call.window),
        call_(call),
        query_(call.keys.steps() * kMaps * kTile),
        scores_(Base::band_size()),
        relative_(call.learned.has_key ? window_.size * registers_ * kSums : 0),
        weights_(Base::weights_size()),
        dense_(call.learned.has_value ? kWeights * dense_size() : 0) {
    std::fill_n(weights_.data(), Base::weights_size(), uint16_t{0});
  }

  void operator()(int64_t task) {
    const int64_t y = task % window_.height;
    head_ = call_.first_head + task / window_.height;
    of_heads_ = head_ % call_.query.heads;
    Base::each_block(y, task - y, [&](const Phase& phase) {
      Base::pack_pixels(call_.query, head_, phase, query_.data(), call_.outside);
      Base::multiply(query_.data(), call_.keys, scores_.data());
      const bool relative = call_.learned.has_key, dense = call_.learned.has_value;
      if (relative) multiply_relative();
      const Reg inverse = relative ? dense ? weigh<true, true>(phase) : weigh<true, false>(phase)
                          : dense  ? weigh<false, true>(phase)
                                   : weigh<false, false>(phase);
      Base::add_up(weights_.data(), call_.values, inverse, call_.out, head_, call_.value.channels, phase,
                   [&](int64_t tile) {
                     if (dense) add_relative(tile);
                   });
    });
  }

 private:
  int64_t dense_pitch() const { return call_.learned.value_steps() * kStep; }
  int64_t dense_size() const { return kRows * dense_pitch(); }

  // The products of 16 queries with the relative keys: [register][query][lane].
  void multiply_relative() {
    const int64_t end = end_row_ * registers_;
    for (int64_t reg = first_row_ * registers_; reg < end; reg += 4) {
      Piece panels[4];
      float* sums[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t at = std::min(reg + j, end - 1);
        panels[j] = call_.learned.key(of_heads_, at);
        sums[j] = relative_.data() + at * kSums;
      }
      multiply_four<kMaps, kWeights>(query_.data(), panels[0], panels[1], panels[2], panels[3],
                                     call_.keys.steps());
      tile_store<0>(sums[0]);
      tile_store<1>(sums[1]);
      tile_store<2>(sums[2]);
      tile_store<3>(sums[3]);
    }
  }

  // Writes the weights of the window, relative to the greatest, and the log-sum-exp; returns what they are to
  // be multiplied with.
  template <bool kRelative, bool kDense>
  Reg weigh(const Phase& phase) {
    const float* bias = call_.learned.bias(of_heads_);
    const Reg factor = Lanes::set1(call_.scale * kLog2);
    const auto score = [&](int64_t i, int p, int r) {
      const int64_t reg = i * registers_ + r;
      const Reg sum =
          Lanes::fma(Base::load(scores_.data(), i, p, r), factor, Lanes::load(bias + reg * kRows));
      if constexpr (!kRelative) return sum;
      return Lanes::fma(Lanes::load(relative_.data() + reg * kSums + p * kRows), Lanes::set1(kLog2), sum);
    };
    Reg greatest[kRows], sums[kRows] = {};
    for (Reg& each : greatest) each = Lanes::set1(-std::numeric_limits<float>::infinity());
    Base::each_register([&](int64_t i, int p, int r, uint32_t inside) {
      greatest[p] = greater_where(inside, greatest[p], score(i, p, r));
    });
    const Reg top = across(greatest, [](Reg a, Reg b) { return a > b ? a : b; });
    if constexpr (kDense) std::fill_n(dense_.data(), kWeights * dense_size(), uint16_t{0});
    Base::each_register([&](int64_t i, int p, int r, uint32_t inside) {
      const Reg weight = only(exp2_weight<6>(score(i, p, r) - top[p]), inside);
      sums[p] += weight;
      Base::store(weight, weights_.data(), i, p, r);
      if constexpr (kDense) {
        uint16_t* to = dense_.data() + p * dense_pitch() + (i * registers_ + r) * kRows;
        store_pieces<kWeights>(weight, 0xffffu, to, dense_size());
      }
    });
    const Reg sum = across(sums, [](Reg a, Reg b) { return a + b; });
    float* to = call_.lse.template mutable_data_ptr<float>() +
                (head_ * window_.height + Base::y_) * call_.lse.size(3) + phase.first;
    for (int p = 0; p < count_; ++p)
      to[(Base::first_ + p) * window_.dilation] = (top[p] + std::log2(sum[p])) / kLog2;
    return 1.f / sum;
  }

  // Sums 0 and 1 += the weights of all offsets x the relative values.
  void add_relative(int64_t tile) {
    const Piece one = call_.learned.value(of_heads_, tile), other = call_.learned.value(of_heads_, tile + 1);
    for (int64_t s = 0; s < call_.learned.value_steps(); ++s) {
      each_product<kWeights, kWeights>([&](int w, int v) {
        tile_load_rows<4>(dense_.data() + w * dense_size() + s * kStep, dense_pitch() * sizeof(uint16_t));
        tile_load<6>(one + (s * kWeights + v) * kTile);
        tile_dot<0, 4, 6>();
        tile_load<7>(other + (s * kWeights + v) * kTile);
        tile_dot<1, 4, 7>();
      });
    }
  }

  const Region region_;
  const Attention<kMaps, kWeights>& call_;
  Workspace<uint16_t> query_;
  Workspace<float> scores_, relative_;
  Workspace<uint16_t> weights_, dense_;
  int64_t head_ = 0, of_heads_ = 0;
};

// False, and nothing of use written, where a number is out of range.
template <int kMaps, int kWeights, class S>
bool run(const HeadMaps& query, const HeadMaps& key, const HeadMaps& value, const MaybeTensor& bias,
         const MaybeTensor& relative_key, const MaybeTensor& relative_value, const Window& window,
         double scale, Tensor& out, Tensor& lse) {
  Outside outside;
  const Learned<kWeights> learned(window, query.heads, bias, relative_key, relative_value, outside);
  const int64_t heads = out.size(0) * query.heads, together = window.heads_together(heads);
  Attention<kMaps, kWeights> call{window,
                                  query,
                                  key,
                                  value,
                                  learned,
                                  static_cast<float>(scale),
                                  out,
                                  lse,
                                  outside,
                                  PixelPanels<kMaps>(window, key.channels, together * window.height),
                                  ChannelPanels<kMaps>(window, value.channels, together * window.height)};
  for (int64_t first = 0; first < heads; first += together) {
    const int64_t rows = std::min(together, heads - first) * window.height;
    call.first_head = first;
    parallel_tasks(2 * rows, [&] {
      return [&, region = Region()](int64_t task) mutable {
        const int64_t row = task / 2, head = first + row / window.height, y = row % window.height;
        if (task % 2 == 0) return call.keys.pack(key, head, y, row, outside);
        call.values.pack(value, head, y, row, outside);
      };
    });
    if (outside.found()) return false;
    parallel_tasks(rows, [&] { return Attend<kMaps, kWeights, S>(call); });
    if (outside.found()) return false;
  }
  return true;
}

#endif

void check_learned(const char* name, const MaybeTensor& tensor, std::initializer_list<int64_t> sizes) {
  if (!tensor) return;
  check_shape(name, *tensor, sizes);
  check_dtype(name, *tensor, ScalarType::Float);
}

// The attended values (N,Cv,H,W) and the log-sum-exp of the scores (N,heads,H,W) float32; tensors without
// entries where the engine cannot: then the pieces must be taken. Maps are float32, float16 or bfloat16, what
// is learned float32.
std::tuple<Tensor, Tensor> local_attention_fused(const Tensor& query, const Tensor& key, const Tensor& value,
                                                 const MaybeTensor& bias, const MaybeTensor& relative_key,
                                                 const MaybeTensor& relative_value, int64_t heads,
                                                 int64_t reach, int64_t dilation, double scale) {
  STD_TORCH_CHECK(reach >= 0 && dilation >= 1, "reach must be at least 0 and dilation at least 1");
  check_shape("query", query, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t n = query.size(0), channels = query.size(1), height = query.size(2), width = query.size(3);
  check_shape("key", key, {n, channels, height, width});
  check_shape("value", value, {n, kAnySize, height, width});
  check_dtype("key", key, query.scalar_type());
  check_dtype("value", value, query.scalar_type());
  STD_TORCH_CHECK(heads >= 1 && channels % heads == 0 && value.size(1) % heads == 0,
                  "heads must divide the channels");
  const int64_t offsets = (2 * reach + 1) * (2 * reach + 1);
  check_learned("bias", bias, {heads, offsets});
  check_learned("relative_key", relative_key, {heads, channels / heads, offsets});
  check_learned("relative_value", relative_value, {heads, value.size(1) / heads, offsets});
#if defined(VOSOPS_AMX)
  const ScalarType dtype = query.scalar_type();
  const bool known = dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  if (known && ready()) {
    Tensor out = torch::stable::new_empty(value, {n, value.size(1), height, width});
    Tensor lse = torch::stable::new_empty(value, {n, heads, height, width}, ScalarType::Float);
    if (out.numel() == 0) return {out, lse};
    const Window window(reach, dilation, height, width);
    const HeadMaps q(query, heads), k(key, heads), v(value, heads);
    const auto attend = [&]<int kMaps, int kWeights, class S>() {
      return run<kMaps, kWeights, S>(q, k, v, bias, relative_key, relative_value, window, scale, out, lse);
    };
    const bool done = dtype == ScalarType::BFloat16 ? attend.template operator()<1, 2, BFloat16>()
                      : dtype == ScalarType::Half   ? attend.template operator()<2, 2, Half>()
                                                    : attend.template operator()<3, 3, float>();
    ++(done ? by_engine : out_of_range);
    if (done) return {out, lse};
  }
#endif
  return {torch::stable::new_empty(value, {0, value.size(1), height, width}),
          torch::stable::new_empty(value, {0, heads, height, width}, ScalarType::Float)};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("local_attention_fused", TORCH_BOX(&vosops::cpu::local_attention_fused));
}
