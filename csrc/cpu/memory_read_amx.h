// The memory read and the usage by Intel's matrix engine.
#pragma once

#if defined(VOSOPS_AMX)

#include <string_view>

#include "common/score_inputs.h"
#include "cpu/memory_values.h"

namespace vosops::cpu {

// Each fills its outputs and returns true, or returns false where the engine cannot serve the problem
// (float64, small problems, a number that pieces do not hold, no permission): the outputs then hold nothing.
bool read_by_tiles(const ScoreInputs& in, const Values& values, std::string_view precision, Tensor& out,
                   Tensor& lse);
bool usage_by_tiles(const ScoreInputs& in, const Tensor& lse, std::string_view precision, Tensor& usage);

}  // namespace vosops::cpu

#endif
