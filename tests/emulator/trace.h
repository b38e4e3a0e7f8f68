// The trace, a line of JSON for each launch with the visits of its warps: a part of emulator.cpp.
#pragma once

#include <cstdio>
#include <map>
#include <string>
#include <utility>

#include "emulator.h"

namespace emulator {
namespace {

constexpr unsigned kTracedWarps = 1024 / kWarpSize;

struct WarpVisits {
  uint64_t phase = 0;  // of the warp, when its lanes last came
  uint32_t most = 0, lanes[kWarpSize] = {};
};
struct Visits {
  int copies = 1;
  uint64_t count = 0;
  WarpVisits warps[kTracedWarps];
};
const char* trace_path = nullptr;
std::map<std::pair<std::string, int>, Visits> visits;  // by name and number
uint64_t phases[kTracedWarps];                         // warp-wide operations and barriers so far

void end_visits() {
  for (auto& [place, visited] : visits)
    for (auto& warp : visited.warps) {
      visited.count += warp.most;
      warp = {};
    }
}

void write_trace(const char* name, dim3 grid, dim3 block, size_t shared_bytes) {
  FILE* file = fopen(trace_path, "a");
  if (!file) throw Fault(std::string("cannot write ") + trace_path);
  const size_t blocks = size_t(grid.x) * grid.y * grid.z, threads = size_t(block.x) * block.y * block.z;
  fprintf(file, R"({"kernel": "%s", "blocks": %zu, "threads": %zu, "shared_bytes": %zu, "visits": {)", name,
          blocks, threads, shared_bytes);
  const char* separator = "";
  for (auto at = visits.begin(); at != visits.end();) {
    const std::string visited = at->first.first;
    const int copies = at->second.copies;
    uint64_t count = 0;
    for (; at != visits.end() && at->first.first == visited; ++at) count += at->second.count;
    fprintf(file, R"(%s"%s": [%llu, %d])", separator, visited.c_str(), (unsigned long long)count, copies);
    separator = ", ";
  }
  fprintf(file, "}}\n");
  fclose(file);
}

}  // namespace
}  // namespace emulator
