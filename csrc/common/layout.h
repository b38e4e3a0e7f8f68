// Memory formats of maps (N,C,H,W): contiguous, or channels_last.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "common/checks.h"

namespace vosops {

// Whether `t` is dense in channels_last memory and not contiguous.
inline bool is_channels_last(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const auto fits = [&](int64_t dim, int64_t stride) { return t.size(dim) == 1 || t.stride(dim) == stride; };
  const bool contiguous = fits(3, 1) && fits(2, w) && fits(1, h * w) && fits(0, c * h * w);
  return !contiguous && fits(1, 1) && fits(3, c) && fits(2, c * w) && fits(0, c * h * w);
}

// Whether t[n] is dense in the layout for every n.
inline bool is_dense(const Tensor& t, bool channels_last) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const auto fits = [&](int64_t dim, int64_t stride) { return t.size(dim) == 1 || t.stride(dim) == stride; };
  return channels_last ? fits(1, 1) && fits(3, c) && fits(2, c * w)
                       : fits(3, 1) && fits(2, w) && fits(1, h * w);
}

// (N,H,W,C) in memory seen as (N,C,H,W), and back.
inline Tensor to_channels_first(const Tensor& t) {
  return torch::stable::transpose(torch::stable::transpose(t, 1, 3), 2, 3);
}
inline Tensor to_channels_last(const Tensor& t) {
  return torch::stable::transpose(torch::stable::transpose(t, 2, 3), 1, 3);
}

// The tensor itself where it is dense in the layout, otherwise a copy.
inline Tensor in_layout(const Tensor& t, bool channels_last) {
  if (is_dense(t, channels_last)) return t;
  if (!channels_last) return torch::stable::contiguous(t);
  return to_channels_first(torch::stable::contiguous(to_channels_last(t)));
}

// An uninitialised (N,channels,H,W) of the sizes of `like`.
inline Tensor empty_in_layout(const Tensor& like, int64_t channels, ScalarType dtype, bool channels_last) {
  const int64_t n = like.size(0), h = like.size(2), w = like.size(3);
  if (!channels_last) return torch::stable::new_empty(like, std::vector<int64_t>{n, channels, h, w}, dtype);
  return to_channels_first(torch::stable::new_empty(like, std::vector<int64_t>{n, h, w, channels}, dtype));
}

}  // namespace vosops
