// The three linear pieces of local attention on the CPU, with offsets d of a window:
//   dot    out[d,y,x] = sum over channels of a[c,y,x] b[c,(y,x)+d]
//   weigh  out[c,y,x] = sum over d of w[d,y,x] b[c,(y,x)+d]
//   spread out[c,y,x] = sum over d of w[d,(y,x)-d] a[c,(y,x)-d]
// Each one's derivatives are the two others. Maps are copied once, their rows padded with zeros, so that any
// stride is read and no load leaves its row. A task owns a row of the result: dot keeps the sums of kBlock
// offsets in registers over all channels, one load of b for each product; weigh and spread keep those of
// kBlock channels over all offsets, one load of the map for each product and one of the weight for kBlock.
// The window's rows of one map (15 x 32 channels of 68 floats in AOT) stay in the second-level cache. Bytes:
// the maps twice, the scores once; the rest is products, one load each, so that half of the peak of FMAs is
// the ceiling.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "common/checks.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/vec.h"

namespace vosops::cpu {
namespace {

constexpr int kBlock = 8;  // sums in registers

struct Window {
  int64_t reach, dilation, size, offsets, margin;  // margin: pixels beyond the image that a window sees

  Window(int64_t reach_, int64_t dilation_)
      : reach(reach_),
        dilation(dilation_),
        size(2 * reach_ + 1),
        offsets(size * size),
        margin(reach_ * dilation_) {
    STD_TORCH_CHECK(reach >= 0 && dilation >= 1, "reach must be at least 0 and dilation at least 1");
  }
};

template <class T>
void copy_row(const T* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1) {
    std::copy_n(from, count, to);
  } else {
    for (int64_t x = 0; x < count; ++x) to[x] = from[x * stride];
  }
}

// Maps (N,C,H,W) of any stride as rows of T with zeros around: x of row (n,c,y) lies at row(n,c,y)[x], and
// x from -margin to W - 1 + margin + what a register or a block of offsets reads beyond may be read.
template <class T>
class PaddedMaps {
 public:
  PaddedMaps(const Tensor& maps, const Window& window)
      : channels_(maps.size(1)),
        height_(maps.size(2)),
        margin_(window.margin),
        pitch_(maps.size(3) + 2 * window.margin + kBlock * window.dilation + Vec<T, kRegisterBytes>::kLanes),
        rows_(static_cast<size_t>(maps.size(0) * channels_ * height_ * pitch_)) {
    const T* source = maps.const_data_ptr<T>();
    const int64_t width = maps.size(3), x_stride = maps.stride(3);
    parallel_tasks(maps.size(0) * channels_, [&] {
      return [&](int64_t task) {
        const int64_t n = task / channels_, c = task % channels_;
        for (int64_t y = 0; y < height_; ++y) {
          const T* from = source + n * maps.stride(0) + c * maps.stride(1) + y * maps.stride(2);
          T* to = rows_.data() + (task * height_ + y) * pitch_;
          std::fill_n(to, margin_, T{0});
          copy_row(from, x_stride, width, to + margin_);
          std::fill(to + margin_ + width, to + pitch_, T{0});
        }
      };
    });
  }

  const T* row(int64_t n, int64_t c, int64_t y) const {
    return rows_.data() + ((n * channels_ + c) * height_ + y) * pitch_ + margin_;
  }
  int64_t channel_pitch() const { return height_ * pitch_; }

 private:
  int64_t channels_, height_, margin_, pitch_;
  Workspace<T> rows_;
};

template <class V>
void store_part(typename V::T* to, typename V::Reg value, int64_t count) {
  if (count >= V::kLanes) {
    V::store(to, value);
  } else {
    std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(typename V::T));
  }
}

template <class T>
void dot(const Tensor& a, const Tensor& b, const Window& window, Tensor& out) {
  using V = Vec<T, kRegisterBytes>;
  const int64_t channels = a.size(1), height = a.size(2), width = a.size(3);
  const PaddedMaps<T> as(a, window), bs(b, window);
  T* result = out.mutable_data_ptr<T>();
  parallel_tasks(a.size(0) * height, [&] {
    return [&](int64_t task) {
      const int64_t n = task / height, y = task % height;
      for (int64_t i = 0; i < window.size; ++i) {
        const int64_t other = y + (i - window.reach) * window.dilation;
        T* plane = result + ((n * window.offsets + i * window.size) * height + y) * width;
        if (other < 0 || other >= height) {
          for (int64_t j = 0; j < window.size; ++j) std::fill_n(plane + j * height * width, width, T{0});
          continue;
        }
        const T* a_row = as.row(n, 0, y);
        const T* b_row = bs.row(n, 0, other) - window.margin;
        for (int64_t x = 0; x < width; x += V::kLanes) {
          for (int64_t first = 0; first < window.size; first += kBlock) {
            typename V::Reg sums[kBlock] = {};
            const T* b_first = b_row + x + first * window.dilation;
            for (int64_t c = 0; c < channels; ++c) {
              const typename V::Reg value = V::load(a_row + c * as.channel_pitch() + x);
              const T* b_at = b_first + c * bs.channel_pitch();
#pragma GCC unroll 8
              for (int j = 0; j < kBlock; ++j) {
                typename V::Reg shifted = V::load(b_at + j * window.dilation);
                V::pin(shifted);
                sums[j] = V::fma(value, shifted, sums[j]);
              }
            }
            const int64_t count = std::min<int64_t>(kBlock, window.size - first);
            for (int64_t j = 0; j < count; ++j)
              store_part<V>(plane + (first + j) * height * width + x, sums[j], width - x);
          }
        }
      }
    };
  });
}

// weigh, and spread, in which weight and map are both taken at the place minus the offset.
template <class T, bool kSpread>
void combine(const Tensor& weights, const Tensor& maps, const Window& window, Tensor& out) {
  using V = Vec<T, kRegisterBytes>;
  const int64_t channels = maps.size(1), height = maps.size(2), width = maps.size(3);
  const int64_t margin = kSpread ? window.margin : 0;  // weigh takes weights at the place itself
  const int64_t pitch = width + 2 * margin + V::kLanes;
  const PaddedMaps<T> padded(maps, window);
  const T* source = weights.const_data_ptr<T>();
  T* result = out.mutable_data_ptr<T>();
  parallel_tasks(maps.size(0) * height, [&] {
    return [&, rows = Workspace<T>(static_cast<size_t>(window.offsets * pitch))](int64_t task) mutable {
      const int64_t n = task / height, y = task % height;
      const int64_t sign = kSpread ? -1 : 1;
      const auto other = [&](int64_t i) { return y + sign * (i - window.reach) * window.dilation; };
      for (int64_t i = 0; i < window.size; ++i) {
        if (other(i) < 0 || other(i) >= height) continue;
        for (int64_t j = 0; j < window.size; ++j) {
          const int64_t d = i * window.size + j;
          const T* from = source + n * weights.stride(0) + d * weights.stride(1) +
                          (kSpread ? other(i) : y) * weights.stride(2);
          T* to = rows.data() + d * pitch;
          std::fill_n(to, margin, T{0});
          copy_row(from, weights.stride(3), width, to + margin);
          std::fill(to + margin + width, to + pitch, T{0});
        }
      }
      for (int64_t first = 0; first < channels; first += kBlock) {
        const int64_t count = std::min<int64_t>(kBlock, channels - first);
        int64_t places[kBlock];  // of the block's channels; of what is beyond the last, the last again
        for (int j = 0; j < kBlock; ++j)
          places[j] = std::min<int64_t>(first + j, channels - 1) * padded.channel_pitch();
        for (int64_t x = 0; x < width; x += V::kLanes) {
          typename V::Reg sums[kBlock] = {};
          for (int64_t i = 0; i < window.size; ++i) {
            if (other(i) < 0 || other(i) >= height) continue;
            const T* map_row = padded.row(n, 0, other(i)) + x;
            const T* weight_row = rows.data() + i * window.size * pitch + margin + x;
            for (int64_t j = 0; j < window.size; ++j) {
              const int64_t shift = sign * (j - window.reach) * window.dilation;
              const typename V::Reg weight = V::load(weight_row + j * pitch + (kSpread ? shift : 0));
#pragma GCC unroll 8
              for (int k = 0; k < kBlock; ++k) {
                typename V::Reg value = V::load(map_row + places[k] + shift);
                V::pin(value);
                sums[k] = V::fma(weight, value, sums[k]);
              }
            }
          }
          for (int64_t k = 0; k < count; ++k)
            store_part<V>(result + ((n * channels + first + k) * height + y) * width + x, sums[k], width - x);
        }
      }
    };
  });
}

template <class F>
void dispatch_accumulator(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(dtype == ScalarType::Float, "expected float32 or float64");
  f(float{});
}

Tensor local_attention_dot(const Tensor& a, const Tensor& b, int64_t reach, int64_t dilation) {
  const Window window(reach, dilation);
  check_shape("a", a, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("b", b, {a.size(0), a.size(1), a.size(2), a.size(3)});
  check_dtype("b", b, a.scalar_type());
  Tensor out = torch::stable::new_empty(a, {a.size(0), window.offsets, a.size(2), a.size(3)});
  dispatch_accumulator(a.scalar_type(), [&](auto sample) { dot<decltype(sample)>(a, b, window, out); });
  return out;
}

template <bool kSpread>
Tensor local_attention_combine(const Tensor& weights, const Tensor& maps, int64_t reach, int64_t dilation) {
  const Window window(reach, dilation);
  check_shape("maps", maps, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_shape("weights", weights, {maps.size(0), window.offsets, maps.size(2), maps.size(3)});
  check_dtype("weights", weights, maps.scalar_type());
  Tensor out = torch::stable::new_empty(maps, maps.sizes());
  dispatch_accumulator(maps.scalar_type(),
                       [&](auto sample) { combine<decltype(sample), kSpread>(weights, maps, window, out); });
  return out;
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("local_attention_dot", TORCH_BOX(&vosops::cpu::local_attention_dot));
  m.impl("local_attention_weigh", TORCH_BOX(&vosops::cpu::local_attention_combine<false>));
  m.impl("local_attention_spread", TORCH_BOX(&vosops::cpu::local_attention_combine<true>));
}
