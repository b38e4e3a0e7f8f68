// Permission to use Intel's matrix engine, a thread's configuration of it, and what tests and benchmarks ask.
#include "cpu/amx.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

#include "cpu/parallel.h"

#if defined(VOSOPS_AMX)

#include <immintrin.h>

#if !defined(VOSOPS_AMX_TWIN)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif

namespace vosops::cpu::amx {

// The list of all counters, from before main() on.
class Counters {
 public:
  static Counter*& first() {
    static Counter* first = nullptr;
    return first;
  }
  static std::string text() {
    std::string text;
    for (const Counter* counter = first(); counter != nullptr; counter = counter->next_)
      text += (text.empty() ? "" : " ") + std::string(counter->name_) + "=" +
              std::to_string(counter->count_.load());
    return text;
  }
};

Counter::Counter(const char* name) : name_(name), next_(Counters::first()) {
  Counters::first() = this;
}

namespace {

#if defined(VOSOPS_AMX_TWIN)

const char* ask() {
  return "";
}

#else

// The state that the operating system saves for each process: bits 17 and 18 are the tiles'.
[[gnu::target("xsave")]] bool system_saves_tiles() {
  constexpr uint64_t kTileState = uint64_t{3} << 17;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  return (_xgetbv(0) & kTileState) == kTileState;
}

const char* ask() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBf16) == 0)
    return "the processor has no AMX for bfloat16";
  if (!system_saves_tiles()) return "the operating system does not save the tiles of AMX";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  if (errno == ENOSPC)
    return "the system refused AMX: a thread's signal stack (sigaltstack) is too small to hold the tiles";
  return errno == EINVAL || errno == ENOSYS ? "the kernel knows no permission for AMX (Linux before 5.16)"
                                            : "the system refused AMX";
}

#endif

}  // namespace

const char* refusal() {
  static const char* const reason = ask();
  return reason;
}

bool ready() {
  return refusal()[0] == '\0';
}

Region::Region() : control_(_mm_getcsr()) {
  constexpr uint32_t kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  _mm_setcsr(control_ | kFlushToZero | kDenormalsAreZero);
#if !defined(VOSOPS_AMX_TWIN)
  struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } configuration;
  for (int i = 0; i < 8; ++i) configuration.row_bytes[i] = 64, configuration.rows[i] = kRows;
  asm volatile("ldtilecfg %0" ::"m"(configuration));
#endif
}

Region::~Region() {
#if !defined(VOSOPS_AMX_TWIN)
  asm volatile("tilerelease");
#endif
  // The flags of exceptions that happened meanwhile stay, as they do after any arithmetic.
  constexpr uint32_t kExceptions = 0x3f;
  _mm_setcsr(control_ | (_mm_getcsr() & kExceptions));
}

namespace {

std::string amx_refusal() {
  return refusal();
}

std::string amx_counts() {
  return Counters::text();
}

// Runs `rounds` rounds of products of random tiles that stay in the first-level cache, as every kernel here
// loads them (two by two, `pieces` pieces), in this thread; returns how many operations of bfloat16 those
// were.
int64_t peak_amx_operations(int64_t rounds, int64_t pieces) {
  if (!ready()) return 0;
  constexpr int64_t kSteps = 8;
  Workspace<uint16_t> panels(4 * kSteps * 3 * kTile);
  uint32_t state = 1;
  for (int64_t i = 0; i < 4 * kSteps * 3 * kTile; ++i) {  // zeros would be faster than any data
    state = state * 1664525u + 1013904223u;
    panels[i] = static_cast<uint16_t>((state >> 16 & 0x807f) | (0x3f00 + (state >> 28 << 4)));
  }
  alignas(64) float sums[4 * kSums];
  const Region region;
  const auto run = [&]<int kPieces>(std::integral_constant<int, kPieces>) {
    const uint16_t* p = panels.data();
    constexpr int64_t kPanel = kSteps * kPieces * kTile;
    for (int64_t i = 0; i < rounds; ++i) {
      zero_sums();
      multiply_add<kPieces>(p, p + kPanel, p + 2 * kPanel, p + 3 * kPanel, kSteps);
    }
    store_sums(sums);
    return kPieces * (kPieces + 1) / 2;
  };
  const int products = pieces == 1   ? run(std::integral_constant<int, 1>{})
                       : pieces == 2 ? run(std::integral_constant<int, 2>{})
                                     : run(std::integral_constant<int, 3>{});
  return rounds * kSteps * products * 4 * 2 * kRows * kRows * kStep;
}

}  // namespace
}  // namespace vosops::cpu::amx

#else

namespace vosops::cpu::amx {
namespace {

std::string amx_refusal() {
  return "this library was not compiled for AMX";
}
std::string amx_counts() {
  return "";
}
int64_t peak_amx_operations(int64_t, int64_t) {
  return 0;
}

}  // namespace
}  // namespace vosops::cpu::amx

#endif

STABLE_TORCH_LIBRARY_IMPL(vosops, CompositeExplicitAutograd, m) {
  m.impl("amx_refusal", TORCH_BOX(&vosops::cpu::amx::amx_refusal));
  m.impl("amx_counts", TORCH_BOX(&vosops::cpu::amx::amx_counts));
  m.impl("peak_amx_operations", TORCH_BOX(&vosops::cpu::amx::peak_amx_operations));
}
