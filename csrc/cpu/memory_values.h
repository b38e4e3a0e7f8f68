// The values of a memory read, (N, O, C, M), in panels of channels: shared by the read and its backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/checks.h"
#include "common/score_inputs.h"
#include "cpu/gemm.h"

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

inline void check_value(const ScoreInputs& in, const Tensor& value) {
  check_shape("value", value, {in.batch(), kAnySize, kAnySize, in.memory()});
  STD_TORCH_CHECK((value.scalar_type() == ScalarType::Double) == (in.key.scalar_type() == ScalarType::Double),
                  "value must be float64 exactly where key is");
}

}  // namespace vosops::cpu
