// The window of local matching, and the images with dilation 1 that a frame consists of.
#pragma once

#include "host.cuh"

namespace vosops::cuda {

constexpr int kMostRings = 32;

struct Window {
  int height, width;  // of the frame
  int dilation;
  int phases_y, phases_x;  // images with dilation 1 that the frame consists of
  int objects, words, rings;
  int radius[kMostRings];  // in shifts, that is in multiples of the dilation

  __host__ __device__ int reach() const { return radius[rings - 1]; }
};

// One phase of the dilation as an image of its own.
struct Phase {
  const Window& window;
  int height, width, first;

  __device__ Phase(const Window& window, int phase) : window(window) {
    const int y = phase / window.phases_x, x = phase % window.phases_x;
    height = ceil_div(window.height - y, window.dilation);
    width = ceil_div(window.width - x, window.dilation);
    first = y * window.width + x;
  }
  __device__ bool contains(int y, int x) const {
    return unsigned(y) < unsigned(height) && unsigned(x) < unsigned(width);
  }
  __device__ int pixel(int y, int x) const { return first + (y * window.width + x) * window.dilation; }
};

// The operand of mma with the opposite sign.
template <class T>
__device__ __forceinline__ uint32_t negated(uint32_t bits) {
  return bits ^ (sizeof(T) == 2 ? 0x80008000u : 0x80000000u);
}

}  // namespace vosops::cuda
