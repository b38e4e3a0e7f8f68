// What the two ways of global matching on the CPU share: which pixels are keys, and where they lie.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/strided.h"

namespace vosops::cpu {

// Where the pixels of a frame, or of several, lie in memory: the offset of a flat index.
struct PixelGrid {
  int64_t height, width, frame_stride, row_stride, column_stride;

  static PixelGrid of_query(const Tensor& query) {
    return {query.size(2), query.size(3), 0, query.stride(2), query.stride(3)};
  }
  static PixelGrid of_key(const Tensor& key) {
    return {key.size(3), key.size(4), key.stride(2), key.stride(3), key.stride(4)};
  }
  int64_t offset(int64_t flat) const {
    const int64_t row = flat / width;
    return row / height * frame_stride + row % height * row_stride + flat % width * column_stride;
  }
};

// sum + x^2, rounded once where the processor can: compilers contract it in some loops and not in others.
template <class T>
inline T add_square(T x, T sum) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(x, x, sum);
#else
  return x * x + sum;
#endif
}

// The reference pixels that belong to the same objects.
struct KeyGroup {
  std::vector<int64_t> objects;
  std::vector<int64_t> pixels;  // flat indices, ascending
};

// A batch element's problem and its outputs.
struct MatchingTask {
  const Tensor& query;
  const Tensor& key;
  int64_t n;
  const std::vector<KeyGroup>& groups;
  const std::vector<int64_t>& wanted;  // flat indices of the query pixels
  int64_t objects, neighbors;
};

#if defined(VOSOPS_AMX)
// Whether the matrix engine would serve a problem at least as fast as the kernel without it.
bool filter_serves(const MatchingTask& task);

// Writes distance and index, (objects, neighbors, height * width), of the wanted pixels as the kernel without
// the matrix engine computes them in float32, and returns those that are left for that kernel.
std::vector<int64_t> match_by_filter(const MatchingTask& task, float* distance, int64_t* index);
#endif

}  // namespace vosops::cpu
