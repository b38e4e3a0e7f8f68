// The selection by Intel's matrix engine: the results of the FMA code of memory_select.cpp, bit for bit.
#pragma once

#if defined(VOSOPS_AMX)

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/score_inputs.h"
#include "cpu/amx.h"

namespace vosops::cpu::amx {

// Whether the engine may serve this problem and is faster than the FMA code.
bool selects(const ScoreInputs& in, int64_t top_k);

// Selects for batch element n into score and index (top_k, P). `left` receives the queries that the FMA code
// must serve, whose results are unset; false: all of them.
bool select_by_tiles(const ScoreInputs& in, int64_t n, int64_t top_k, float* score, int64_t* index,
                     std::vector<int64_t>& left);

// What the filter knows of the scores (M, P) of batch element n, for tests: its approximations and how far
// the scores may lie from them.
void filter_bounds(const ScoreInputs& in, int64_t n, float* approximation, float* bound);

}  // namespace vosops::cpu::amx

#endif
