// Permission to use Intel's matrix engine, a thread's configuration of it, and counters.
#include "cpu/amx.h"

#if defined(VOSOPS_AMX)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <string>

#if !defined(VOSOPS_AMX_TWIN)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
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

std::string counts() {
  return Counters::text();
}

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
#if defined(VOSOPS_AMX_TWIN)
  twin_tiles.configured = true;
  std::memset(twin_tiles.bytes, 0, sizeof twin_tiles.bytes);
#else
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
#if defined(VOSOPS_AMX_TWIN)
  twin_tiles.configured = false;
#else
  asm volatile("tilerelease");
#endif
  // The flags of exceptions that happened meanwhile stay, as they do after any arithmetic.
  constexpr uint32_t kExceptions = 0x3f;
  _mm_setcsr(control_ | (_mm_getcsr() & kExceptions));
}

}  // namespace vosops::cpu::amx

#endif
