// The values of a memory read, (N, O, C, M), in panels of channels: shared by the read and its backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/score_inputs.h"
#include "cpu/gemm.h"
#include "cpu/strided.h"

namespace vosops::cpu {

// The channels of the values of all objects in groups of kKeyPanel that do not cross objects.
struct ChannelPanel {
  int64_t object, first, count;
};

inline std::vector<ChannelPanel> channel_panels(int64_t objects, int64_t channels) {
  std::vector<ChannelPanel> panels;
  for (int64_t o = 0; o < objects; ++o) {
    for (int64_t c = 0; c < channels; c += kKeyPanel)
      panels.push_back({o, c, std::min<int64_t>(kKeyPanel, channels - c)});
  }
  return panels;
}

// The values of all objects, (N, O, C, M) each, as if they were one tensor.
class Values {
 public:
  explicit Values(std::span<const Tensor> tensors) : tensors_(tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      for (int64_t o = 0; o < tensors[i].size(1); ++o) places_.push_back({i, o});
    }
  }
  int64_t objects() const { return static_cast<int64_t>(places_.size()); }
  int64_t channels() const { return tensors_[0].size(2); }
  ScalarType dtype() const { return tensors_[0].scalar_type(); }
  const Tensor& tensor(int64_t object) const { return tensors_[places_[object].tensor]; }
  int64_t within(int64_t object) const { return places_[object].object; }

 private:
  struct Place {
    size_t tensor;
    int64_t object;
  };
  std::span<const Tensor> tensors_;
  std::vector<Place> places_;
};

// Rows (c, i) of one object of an (N, O, C, pixels) tensor, channels and pixels exchanged: "channels" run
// over pixels [begin, begin + count), "pixels" over channels.
inline StridedMatrix transposed(const Tensor& tensor, int64_t n, int64_t object, int64_t begin,
                                int64_t count) {
  StridedMatrix matrix =
      StridedMatrix::of(tensor, n * tensor.stride(0) + object * tensor.stride(1) + begin * tensor.stride(3));
  std::swap(matrix.channel_stride, matrix.pixel_stride);
  matrix.channels = count;
  return matrix;
}

inline void check_value(const ScoreInputs& in, const Tensor& value) {
  check_shape("value", value, {in.batch(), kAnySize, kAnySize, in.memory()});
  STD_TORCH_CHECK((value.scalar_type() == ScalarType::Double) == (in.key.scalar_type() == ScalarType::Double),
                  "value must be float64 exactly where key is");
}

}  // namespace vosops::cpu
