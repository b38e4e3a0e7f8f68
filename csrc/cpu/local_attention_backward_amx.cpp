// The backward pass of local attention by Intel's matrix engine (local_attention_amx.h). Nothing but the
// log-sum-exp of the forward pass is kept: weights are computed again from the maps.
//
// Two passes over a head, each a band and sums as the forward pass has them. With P the weights, G the
// gradient of the attended values, and dP = G . V:
//
//   queries  dS = P (dP - sum of P dP over the window): query's gradient from the sums of keys by dS. The sum
//            over the window is kept for each query, dS is summed over the pixels where there is a bias.
//   keys     the same window seen from the key: of a pixel's 2 reach + 1 squared neighbours as queries, P and
//            dS once more, offsets reversed; the gradients of key and value from the sums of queries by dS
//            and of G by P.
//
// Every gradient is gathered where it belongs, so that no two tasks add to one number and the result does not
// depend on the number of threads. Six bands and three sums in all, against one of each in the forward pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "cpu/local_attention_amx.h"
#include "cpu/strided.h"

namespace vosops::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;

#if defined(VOSOPS_AMX)

using namespace amx;

Counter by_engine("local_attention.gradients");
Counter out_of_range("local_attention.gradients_range");

// What the tasks of a call share; rows of the packed heads.
template <int kMaps>
struct Gradients {
  const Window& window;
  const HeadMaps grad, query, key, value;
  const Tensor &grad_lse, &lse;
  const float* bias;      // of all heads in powers of two: [head][register][lane], and with the offsets
  const float* reversed;  // reversed
  const bool has_bias;
  const float scale;
  Tensor &grad_query, &grad_key, &grad_value;
  Outside& outside;
  PixelPanels<kMaps> grads, queries, keys, values;
  ChannelPanels<kMaps> grad_sums, query_sums, key_sums;
  Workspace<float> logs, shares;  // of each packed pixel: its log-sum-exp, and what dP is reduced by
  Workspace<float> bias_sums;     // of each row: [register][lane]
  int64_t first_head = 0;         // of those that are packed

  int64_t registers() const { return window.size * window.registers; }
  int64_t row_pixels() const { return window.units * kRows; }
  const float* number(const Tensor& numbers, int64_t head, int64_t y) const {
    return numbers.const_data_ptr<float>() + (head * window.height + y) * numbers.size(3);
  }

  static constexpr int64_t kPanels = 7;  // kinds of a row
  void pack(int64_t task) {
    const int64_t row = task / kPanels, head = first_head + row / window.height, y = row % window.height;
    switch (task % kPanels) {
      case 0:
        pack_logs(head, y, row);
        return grads.pack(grad, head, y, row, outside);
      case 1:
        return queries.pack(query, head, y, row, outside);
      case 2:
        return keys.pack(key, head, y, row, outside);
      case 3:
        return values.pack(value, head, y, row, outside);
      case 4:
        return grad_sums.pack(grad, head, y, row, outside);
      case 5:
        return query_sums.pack(query, head, y, row, outside);
      default:
        return key_sums.pack(key, head, y, row, outside);
    }
  }

 private:
  // Pixels beside the image get numbers too: what is computed from them is dropped.
  void pack_logs(int64_t head, int64_t y, int64_t row) {
    float *to = logs.data() + row * row_pixels(), *share = shares.data() + row * row_pixels();
    std::fill_n(to, row_pixels(), 0.f);
    std::fill_n(share, row_pixels(), 0.f);
    for (const Phase& phase : window.phases)
      for (int64_t x = 0; x < phase.count; ++x)
        to[phase.unit * kRows + window.reach + x] =
            kLog2 * number(lse, head, y)[phase.first + x * window.dilation];
  }
};

// One thread's, of the pass over queries.
template <int kMaps, int kWeights, class S>
class OfQueries : Band<kMaps, kWeights, S> {
  using Base = Band<kMaps, kWeights, S>;
  using Base::count_, Base::registers_, Base::window_;

 public:
  explicit OfQueries(Gradients<kMaps>& call)
      : Base(call.window),
        call_(call),
        query_(call.keys.steps() * kMaps * kTile),
        grad_(call.values.steps() * kMaps * kTile),
        scores_(Base::band_size()),
        products_(Base::band_size()),
        weights_(Base::weights_size()) {
    std::fill_n(weights_.data(), Base::weights_size(), uint16_t{0});
  }

  void operator()(int64_t task) {
    const int64_t y = task % window_.height, head = call_.first_head + task / window_.height;
    float* bias_sums = call_.has_bias ? call_.bias_sums.data() + task * call_.registers() * kRows : nullptr;
    if (bias_sums != nullptr) std::fill_n(bias_sums, call_.registers() * kRows, 0.f);
    Base::each_block(y, task - y, [&](const Phase& phase) {
      Base::pack_pixels(call_.query, head, phase, query_.data(), call_.outside);
      Base::pack_pixels(call_.grad, head, phase, grad_.data(), call_.outside);
      Base::multiply(query_.data(), call_.keys, scores_.data());
      Base::multiply(grad_.data(), call_.values, products_.data());
      weigh(phase, head, y, task, bias_sums);
      Base::add_up(weights_.data(), call_.key_sums, Lanes::set1(call_.scale), call_.grad_query, head,
                   call_.key.channels, phase, [](int64_t) {});
    });
  }

 private:
  void weigh(const Phase& phase, int64_t head, int64_t y, int64_t row, float* bias_sums) {
    const float* bias = call_.bias + head % call_.query.heads * call_.registers() * kRows;
    const Reg factor = Lanes::set1(call_.scale * kLog2);
    const int64_t packed = row * call_.row_pixels() + phase.unit * kRows + window_.reach + Base::first_;
    const float* logs = call_.logs.data() + packed;
    const auto weight = [&](int64_t i, int p, int r, uint32_t inside) {
      const Reg terms = Lanes::load(bias + (i * registers_ + r) * kRows);
      const Reg score = Lanes::fma(Base::load(scores_.data(), i, p, r), factor, terms);
      return only(exp2_weight<6>(score - logs[p]), inside);
    };
    Reg sums[kRows] = {};
    Base::each_register([&](int64_t i, int p, int r, uint32_t inside) {
      const Reg product = only(Base::load(products_.data(), i, p, r), inside);
      sums[p] = Lanes::fma(weight(i, p, r, inside), product, sums[p]);
    });
    const Reg sum = across(sums, [](Reg a, Reg b) { return a + b; });
    float share[kRows];
    const float* of_lse = call_.number(call_.grad_lse, head, y) + phase.first;
    for (int p = 0; p < count_; ++p) share[p] = sum[p] - of_lse[(Base::first_ + p) * window_.dilation];
    std::copy_n(share, count_, call_.shares.data() + packed);
    Base::each_register([&](int64_t i, int p, int r, uint32_t inside) {
      const Reg product = only(Base::load(products_.data(), i, p, r), inside);
      const Reg slope = only(weight(i, p, r, inside) * (product - share[p]), inside);
      Base::store(slope, weights_.data(), i, p, r);
      if (bias_sums == nullptr) return;
      float* to = bias_sums + (i * registers_ + r) * kRows;
      Lanes::store(to, Lanes::load(to) + slope);
    });
  }

  const Region region_;
  Gradients<kMaps>& call_;
  Workspace<uint16_t> query_, grad_;
  Workspace<float> scores_, products_;
  Workspace<uint16_t> weights_;
};

// One thread's, of the pass over keys.
template <int kMaps, int kWeights, class S>
class OfKeys : Band<kMaps, kWeights, S> {
  using Base = Band<kMaps, kWeights, S>;
  using Base::registers_, Base::window_;

 public:
  explicit OfKeys(Gradients<kMaps>& call)
      : Base(call.window),
        call_(call),
        key_(call.queries.steps() * kMaps * kTile),
        value_(call.grads.steps() * kMaps * kTile),
        scores_(Base::band_size()),
        products_(Base::band_size()),
        weights_(Base::weights_size()),
        slopes_(Base::weights_size()) {
    std::fill_n(weights_.data(), Base::weights_size(), uint16_t{0});
    std::fill_n(slopes_.data(), Base::weights_size(), uint16_t{0});
  }

  void operator()(int64_t task) {
    const int64_t y = task % window_.height, head = call_.first_head + task / window_.height;
    Base::each_block(y, task - y, [&](const Phase& phase) {
      Base::pack_pixels(call_.key, head, phase, key_.data(), call_.outside);
      Base::pack_pixels(call_.value, head, phase, value_.data(), call_.outside);
      Base::multiply(key_.data(), call_.queries, scores_.data());
      Base::multiply(value_.data(), call_.grads, products_.data());
      weigh(phase, head, y, task - y);
      const auto nothing = [](int64_t) {};
      Base::add_up(weights_.data(), call_.grad_sums, Lanes::set1(1.f), call_.grad_value, head,
                   call_.value.channels, phase, nothing);
      Base::add_up(slopes_.data(), call_.query_sums, Lanes::set1(call_.scale), call_.grad_key, head,
                   call_.key.channels, phase, nothing);
    });
  }

 private:
  void weigh(const Phase& phase, int64_t head, int64_t y, int64_t packed_row) {
    const float* bias = call_.reversed + head % call_.query.heads * call_.registers() * kRows;
    const Reg factor = Lanes::set1(call_.scale * kLog2);
    Base::each_register([&](int64_t i, int p, int r, uint32_t inside) {
      const int64_t at = (packed_row + window_.row(y, i)) * call_.row_pixels() + phase.unit * kRows +
                         Base::first_ + p + r * kRows;  // of the first query that sees the pixel
      const Reg terms =
          Lanes::load(bias + (i * registers_ + r) * kRows) - Lanes::load(call_.logs.data() + at);
      const Reg score = Lanes::fma(Base::load(scores_.data(), i, p, r), factor, terms);
      const Reg weight = only(exp2_weight<6>(score), inside);
      const Reg product = only(Base::load(products_.data(), i, p, r), inside);
      Base::store(weight, weights_.data(), i, p, r);
      Base::store(only(weight * (product - Lanes::load(call_.shares.data() + at)), inside), slopes_.data(), i,
                  p, r);
    });
  }

  const Region region_;
  Gradients<kMaps>& call_;
  Workspace<uint16_t> key_, value_;
  Workspace<float> scores_, products_;
  Workspace<uint16_t> weights_, slopes_;
};

// The bias in powers of two, a lane for each offset and zero beyond the last; with the offsets reversed too.
struct BiasLanes {
  Workspace<float> forward, reversed;

  BiasLanes(const Window& window, int64_t heads, const MaybeTensor& bias)
      : forward(heads * size(window)), reversed(heads * size(window)) {
    std::fill_n(forward.data(), heads * size(window), 0.f);
    std::fill_n(reversed.data(), heads * size(window), 0.f);
    if (!bias) return;
    const int64_t offsets = window.size * window.size;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t d = 0; d < offsets; ++d) {
        const float value =
            kLog2 * bias->const_data_ptr<float>()[head * bias->stride(0) + d * bias->stride(1)];
        forward[head * size(window) + lane(window, d)] = value;
        reversed[head * size(window) + lane(window, offsets - 1 - d)] = value;
      }
    }
  }
  static int64_t size(const Window& window) { return window.size * window.registers * kRows; }
  // Where an offset lies among the registers of a window.
  static int64_t lane(const Window& window, int64_t offset) {
    return offset / window.size * window.registers * kRows + offset % window.size;
  }
};

// Adds up the sums of all rows of some heads, in their order.
void add_bias_sums(const Window& window, const float* rows, int64_t first_head, int64_t packed, int64_t heads,
                   Tensor& grad_bias) {
  const int64_t size = BiasLanes::size(window), offsets = window.size * window.size;
  float* to = grad_bias.mutable_data_ptr<float>();
  for (int64_t row = 0; row < packed * window.height; ++row) {
    const int64_t head = (first_head + row / window.height) % heads;
    for (int64_t d = 0; d < offsets; ++d)
      to[head * offsets + d] += rows[row * size + BiasLanes::lane(window, d)];
  }
}

// False, and nothing of use written, where a number is out of range.
template <int kMaps, int kWeights, class S>
bool run(const Window& window, const HeadMaps& grad, const HeadMaps& query, const HeadMaps& key,
         const HeadMaps& value, const Tensor& grad_lse, const Tensor& lse, const MaybeTensor& bias,
         double scale, Tensor& grad_query, Tensor& grad_key, Tensor& grad_value, Tensor& grad_bias) {
  Outside outside;
  const BiasLanes lanes(window, query.heads, bias);
  const int64_t heads = grad_query.size(0) * query.heads, together = window.heads_together(heads);
  const int64_t rows = together * window.height, pixels = rows * window.units * kRows + kRows;
  const int64_t ck = key.channels, cv = value.channels;
  Gradients<kMaps> call{window,
                        grad,
                        query,
                        key,
                        value,
                        grad_lse,
                        lse,
                        lanes.forward.data(),
                        lanes.reversed.data(),
                        bias.has_value(),
                        static_cast<float>(scale),
                        grad_query,
                        grad_key,
                        grad_value,
                        outside,
                        PixelPanels<kMaps>(window, cv, rows),
                        PixelPanels<kMaps>(window, ck, rows),
                        PixelPanels<kMaps>(window, ck, rows),
                        PixelPanels<kMaps>(window, cv, rows),
                        ChannelPanels<kMaps>(window, cv, rows),
                        ChannelPanels<kMaps>(window, ck, rows),
                        ChannelPanels<kMaps>(window, ck, rows),
                        Workspace<float>(pixels),
                        Workspace<float>(pixels),
                        Workspace<float>(bias ? rows * BiasLanes::size(window) : 0)};
  for (int64_t first = 0; first < heads; first += together) {
    const int64_t packed = std::min(together, heads - first), tasks = packed * window.height;
    call.first_head = first;
    parallel_tasks(tasks * Gradients<kMaps>::kPanels,
                   [&] { return [&, region = Region()](int64_t task) mutable { call.pack(task); }; });
    if (outside.found()) return false;
    parallel_tasks(tasks, [&] { return OfQueries<kMaps, kWeights, S>(call); });
    parallel_tasks(tasks, [&] { return OfKeys<kMaps, kWeights, S>(call); });
    if (bias) add_bias_sums(window, call.bias_sums.data(), first, packed, query.heads, grad_bias);
  }
  return true;
}

#endif

// The gradients of query, key, value and bias (empty where there is none) from those of what
// local_attention_fused returns; tensors without entries where the engine cannot.
std::tuple<Tensor, Tensor, Tensor, Tensor> local_attention_fused_backward(
    const Tensor& grad, const Tensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const MaybeTensor& bias, const Tensor& lse, int64_t heads, int64_t reach, int64_t dilation,
    double scale) {
  STD_TORCH_CHECK(reach >= 0 && dilation >= 1, "reach must be at least 0 and dilation at least 1");
  check_shape("query", query, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t n = query.size(0), channels = query.size(1), height = query.size(2), width = query.size(3);
  check_shape("key", key, {n, channels, height, width});
  check_shape("value", value, {n, kAnySize, height, width});
  check_shape("grad", grad, {n, value.size(1), height, width});
  check_shape("lse", lse, {n, heads, height, width});
  check_shape("grad_lse", grad_lse, {n, heads, height, width});
  for (const Tensor* each : {&key, &value, &grad}) check_dtype("map", *each, query.scalar_type());
  for (const Tensor* each : {&lse, &grad_lse}) check_dtype("lse", *each, ScalarType::Float);
  STD_TORCH_CHECK(heads >= 1 && channels % heads == 0 && value.size(1) % heads == 0,
                  "heads must divide the channels");
  const int64_t offsets = (2 * reach + 1) * (2 * reach + 1);
  if (bias) {
    check_shape("bias", *bias, {heads, offsets});
    check_dtype("bias", *bias, ScalarType::Float);
  }
#if defined(VOSOPS_AMX)
  const ScalarType dtype = query.scalar_type();
  const bool known = dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  if (known && ready()) {
    Tensor grad_query = torch::stable::new_empty(query, {n, channels, height, width});
    Tensor grad_key = torch::stable::new_empty(query, {n, channels, height, width});
    Tensor grad_value = torch::stable::new_empty(value, {n, value.size(1), height, width});
    Tensor grad_bias =
        torch::stable::new_zeros(query, {bias ? heads : 0, bias ? offsets : 0}, ScalarType::Float);
    if (grad.numel() == 0) return {grad_query, grad_key, grad_value, grad_bias};
    const Window window(reach, dilation, height, width);
    const HeadMaps g(grad, heads), q(query, heads), k(key, heads), v(value, heads);
    const Tensor of_lse = torch::stable::contiguous(grad_lse), logs = torch::stable::contiguous(lse);
    const auto differentiate = [&]<int kMaps, int kWeights, class S>() {
      return run<kMaps, kWeights, S>(window, g, q, k, v, of_lse, logs, bias, scale, grad_query, grad_key,
                                     grad_value, grad_bias);
    };
    const bool done = dtype == ScalarType::BFloat16 ? differentiate.template operator()<1, 2, BFloat16>()
                      : dtype == ScalarType::Half   ? differentiate.template operator()<2, 2, Half>()
                                                    : differentiate.template operator()<3, 3, float>();
    ++(done ? by_engine : out_of_range);
    if (done) return {grad_query, grad_key, grad_value, grad_bias};
  }
#endif
  const Tensor none = torch::stable::new_empty(query, {0, channels, height, width});
  return {none, none, none, none};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("local_attention_fused_backward", TORCH_BOX(&vosops::cpu::local_attention_fused_backward));
}
