// What the sequences of the convolutional LSTM by the matrix engine share, forward and backward.
#pragma once

#if defined(VOSOPS_AMX)

#include <cstdint>
#include <vector>

#include "cpu/amx_conv.h"
#include "cpu/conv_lstm.h"

namespace vosops::cpu::amx {

constexpr int64_t kGateSide = 3;  // of the gates' kernels

// A step (N,C,H,W) of frames (N,T,C,H,W).
inline ConvMap step_of(const Tensor& frames, int64_t step) {
  const char* data = static_cast<const char*>(frames.const_data_ptr());
  return {data + step * frames.stride(1) * frames.element_size(),
          frames.scalar_type(),
          frames.size(2),
          frames.stride(0),
          frames.stride(2),
          frames.stride(3),
          frames.stride(4),
          frames.size(3)};
}

// Some of 16 pixels of the span in planes of height x width: parts of rows, see ConvPixels.
class StatePixels {
 public:
  StatePixels(const ConvPlane& plane, int64_t first) : pixels_(plane, first), width_(plane.width) {}

  template <class S>
  Reg load(const S* plane) const {
    Reg sum{};
    for (const auto& part : pixels_) sum += load_some(plane + at(part), part.lanes);
    return sum;
  }
  template <class S>
  void store(S* plane, Reg value) const {
    for (const auto& part : pixels_) store_some(plane + at(part), value, part.lanes);
  }

 private:
  int64_t at(const ConvPixels::Part& part) const { return part.row * width_ + part.x - part.lane; }

  const ConvPixels pixels_;
  const int64_t width_;
};

// What the backward pass needs of a step: in blocks of 16 channels by 16 pixels of the span the four
// activated gates and the cell, [16 channels][group of 32 pixels][half][kSavedStates][16][16], so that both
// passes read and write it in one stream.
constexpr int64_t kSavedStates = kGates + 1;

struct SavedBlocks {
  int64_t hidden, groups;

  SavedBlocks(const ConvPlane& plane, int64_t hidden_channels)
      : hidden(hidden_channels), groups(plane.groups()) {}
  int64_t panels() const { return (hidden + kRows - 1) / kRows; }
  int64_t blocks() const { return panels() * groups * 2; }
  int64_t size() const { return blocks() * kSavedStates * kSums; }
  // The block of 16 channels and of the 16 pixels from `first` on.
  int64_t block(int64_t panel, int64_t first) const { return panel * groups * 2 + first / kRows; }
};

}  // namespace vosops::cpu::amx

#endif
