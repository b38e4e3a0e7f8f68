// The scheduler of emulator.h and its checks. Never compiled with -fsanitize=thread: the kernels are, and
// their calls of
// __tsan_read4 and its siblings arrive here, at the end of the file.
#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "sums.h"
#include "trace.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

__thread ThreadView* running = nullptr;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuardBytes = 64 << 10;  // accesses this near to shared memory count as out of bounds of it
constexpr size_t kReportsKept = 8;
constexpr unsigned kMaxThreads = 1024;

// ---- Fibres ----
#ifdef __x86_64__
struct Context {
  void* stack_pointer;
};
// Pushes the callee-saved registers, stores the stack pointer in *save, and continues where `load` was
// stored.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
void prepare(Context& context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // what `entry` would return to; keeps its stack pointer 8 past a multiple of 16
  *--top = reinterpret_cast<void*>(entry);  // what emulator_switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
void switch_context(Context& from, Context& to) {
  emulator_switch(&from.stack_pointer, to.stack_pointer);
}
#else
using Context = ucontext_t;
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void switch_context(Context& from, Context& to) {
  swapcontext(&from, &to);
}
#endif

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

struct Copy {
  void* shared;
  const void* global;
  unsigned bytes, source_bytes, group;
};

struct Thread : ThreadView {
  Context context;
  char* stack;
  State state;
  int line;  // of the barrier it waits at
  int predicate;
  unsigned mask;  // of the collective it waits at
  const char* collective;
  void* argument;
  Combine combine;
  std::vector<Copy> copies;  // not yet carried out
  unsigned group;            // the cp.async group that is open
};

struct Limits {
  const char* name;
  size_t shared_bytes;
};

struct Shadow;

// ---- The machine ----
std::mutex machine_mutex;
Context scheduler;
std::vector<std::unique_ptr<Thread>> threads;
char* stacks = nullptr;
char* shared = nullptr;
size_t shared_size = 0;
std::vector<char> shared_storage;
void (*kernel_call)(const void*);
const void* kernel_context;
const char* kernel_name;
int barrier_count = 0;
std::string failure;  // set by fail(): ends the launch
std::mt19937 generator;
bool shuffled = false;

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif

Thread& self() {
  return *static_cast<Thread*>(running);
}

void to_scheduler(bool finished = false) {
  Thread& me = self();
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(finished ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
#endif
  (void)finished;
  switch_context(me.context, scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void to_thread(Thread& thread) {
  running = &thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, thread.stack, kStackBytes);
#endif
  switch_context(scheduler, thread.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  running = nullptr;
}

std::string where(const ThreadView& t) {
  char text[160];
  snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", t.block_index.x, t.block_index.y,
           t.block_index.z, t.thread_index.x, t.thread_index.y, t.thread_index.z);
  return text;
}

void entry() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  try {
    kernel_call(kernel_context);
    if (!self().copies.empty() && failure.empty())
      failure = where(self()) + " ended with cp.async copies that it never waited for";
  } catch (const std::exception& e) {
    if (failure.empty()) failure = std::string("exception in a kernel: ") + e.what();
  }
  self().state = State::kDone;
  to_scheduler(true);
  __builtin_unreachable();
}

std::string describe(const Thread& t) {
  char text[160];
  switch (t.state) {
    case State::kDone:
      return "has ended";
    case State::kAtBarrier:
      snprintf(text, sizeof text, "waits at the __syncthreads of line %d", t.line);
      return text;
    case State::kAtCollective:
      snprintf(text, sizeof text, "waits at %s with mask %08x", t.collective, t.mask);
      return text;
    default:
      return "is running";
  }
}

// ---- The shadow: who touched each byte last ----
// Two accesses of one byte, not both reads and not both atomic, are a race if no barrier lies between them.
// Epochs count the block barriers and the blocks of all launches, warp epochs the __syncwarp()s that every
// live lane of the warp joins.
constexpr uint16_t kAtomic = 0x8000, kManyWarps = 0x4000, kManyLanes = 0x2000, kWarpShift = 5;
struct Mark {
  uint32_t epoch = 0;
  uint16_t thread = 0;  // a slot; or kManyLanes | warp << 5; or kManyWarps; atomic writes add kAtomic
  uint16_t warp_epoch = 0;
};
struct Cell {
  Mark write, read;
  uint32_t read_by_blocks = 0;  // the launch in which several blocks read it
  uint32_t pending = 0;         // 1 + slot of the thread whose cp.async to here is under way
};
constexpr size_t kPageBytes = 4096;
struct Page {
  Cell cells[kPageBytes];
};

bool checked = false;  // whether the kernel's file was compiled with the hooks: set by __tsan_init
uint32_t epoch = 1, block_epoch = 1, launch_epoch = 1;
uint16_t warp_epochs[kMaxThreads / kWarpSize];
std::vector<Cell> shared_shadow;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> global_shadow;
constexpr size_t kPageCache = 256;
std::pair<uintptr_t, Page*> page_cache[kPageCache];

struct Report {
  std::string text;
  const void* code;
  const char* kind;
  long count;
};
std::vector<Report> reports;
long report_count = 0;

std::string source_line(const void* code) {
  Dl_info info;
  if (!code || !dladdr(code, &info) || !info.dli_fname) return "";
  char command[512];
  snprintf(command, sizeof command, "addr2line -s -e '%s' %zx 2>/dev/null", info.dli_fname,
           size_t(static_cast<const char*>(code) - 1 - static_cast<const char*>(info.dli_fbase)));
  std::string line;
  if (FILE* pipe = popen(command, "r")) {
    char text[256];
    if (fgets(text, sizeof text, pipe)) line = text;
    pclose(pipe);
  }
  line = line.substr(0, line.find_first_of(" \n"));
  return line.empty() || line[0] == '?' ? "" : " at " + line;
}

void report(const char* kind, const void* code, const std::string& detail) {
  ++report_count;
  for (auto& r : reports)
    if (r.code == code && r.kind == kind) {
      ++r.count;
      return;
    }
  if (reports.size() < kReportsKept) reports.push_back({where(self()) + ": " + detail, code, kind, 1});
}

// The cells of the bytes from an address on, of which those up to the end of its page follow each other.
Cell* global_cells(uintptr_t address) {
  uintptr_t number = address / kPageBytes;
  auto& cached = page_cache[number % kPageCache];
  if (cached.first != number || !cached.second) {
    auto& page = global_shadow[number];
    if (!page) page = std::make_unique<Page>();
    cached = {number, page.get()};
  }
  return cached.second->cells + address % kPageBytes;
}

bool ordered(const Mark& mark, unsigned warp) {
  if (mark.epoch != epoch) return true;
  if (mark.thread & kManyWarps) return false;
  return unsigned(mark.thread & (kMaxThreads - 1)) >> kWarpShift == warp &&
         mark.warp_epoch != warp_epochs[warp];
}

void check(uintptr_t address, size_t bytes, Access access, const void* code) {
  const Thread& me = self();
  const unsigned slot = me.slot, warp = slot / kWarpSize;
  const size_t offset = address - reinterpret_cast<uintptr_t>(shared);
  const bool in_shared = shared_size && offset < shared_size;
  if (!in_shared) {
    if (address - reinterpret_cast<uintptr_t>(stacks) < kStackBytes * kMaxThreads) return;
    if (shared_size && offset + kGuardBytes < shared_size + 2 * kGuardBytes) {
      report("bounds", code,
             "access out of bounds of shared memory: byte " + std::to_string(ptrdiff_t(offset)) + " of " +
                 std::to_string(shared_size));
      return;
    }
  } else if (offset + bytes > shared_size) {
    report("bounds", code,
           "access past the end of shared memory: bytes " + std::to_string(offset) + " to " +
               std::to_string(offset + bytes) + " of " + std::to_string(shared_size));
    bytes = shared_size - offset;
  }
  const auto name = [&](size_t i) {
    return in_shared ? "shared byte " + std::to_string(offset + i) : std::string("global memory");
  };
  const auto other = [](const Mark& m) {
    if (m.thread & kManyWarps) return std::string("several warps");
    if (m.thread & kManyLanes)
      return "several lanes of warp " + std::to_string((m.thread & 1023) >> kWarpShift);
    return "thread " + std::to_string(m.thread & 1023);
  };
  const auto look = [&](Cell& cell, size_t i) {
    const bool atomic = access == Access::kAtomic && (cell.write.thread & kAtomic);
    const bool own_write = (cell.write.thread & ~kAtomic) == slot;
    if (cell.pending) {
      report("pending", code,
             name(i) + " is touched while a cp.async of thread " + std::to_string(cell.pending - 1) +
                 " to it is under way");
      cell.pending = 0;
    }
    if (in_shared && access != Access::kWrite && cell.write.epoch < block_epoch)
      report("unwritten", code, "read of " + name(i) + ", which nothing wrote");
    bool race = !ordered(cell.write, warp) && !own_write && !atomic;
    if (race)
      report("race", code, name(i) + " was written by " + other(cell.write) + " with no barrier in between");
    if (!in_shared && cell.write.epoch >= launch_epoch && cell.write.epoch < block_epoch && !atomic)
      report("blocks", code, "global memory that another block of this launch wrote");
    if (access == Access::kRead) {
      Mark mark{epoch, uint16_t(slot), warp_epochs[warp]};
      if (!ordered(cell.read, warp) && cell.read.thread != slot) {
        bool same_warp =
            !(cell.read.thread & kManyWarps) && unsigned(cell.read.thread & 1023) >> kWarpShift == warp;
        mark.thread = same_warp ? uint16_t(kManyLanes | warp << kWarpShift) : kManyWarps;
      } else if (cell.read.epoch == epoch && (cell.read.thread & kManyWarps)) {
        mark.thread = kManyWarps;
      }
      if (cell.read.epoch >= launch_epoch && cell.read.epoch < block_epoch)
        cell.read_by_blocks = launch_epoch;
      cell.read = mark;
    } else {
      if (!race && !ordered(cell.read, warp) && cell.read.thread != slot)
        report("race", code, name(i) + " was read by " + other(cell.read) + " with no barrier in between");
      if (!in_shared && (cell.read_by_blocks == launch_epoch ||
                         (cell.read.epoch >= launch_epoch && cell.read.epoch < block_epoch)))
        report("blocks", code, "write to global memory that another block of this launch read");
      cell.write = {epoch, uint16_t(slot | (access == Access::kAtomic ? kAtomic : 0)), warp_epochs[warp]};
    }
  };
  // Bytes that were always touched together are as the first: one look serves all, unless it found a fault.
  static_assert(std::has_unique_object_representations_v<Cell>);
  Cell* cells = in_shared ? shared_shadow.data() + offset : global_cells(address);
  const bool follow = in_shared || address % kPageBytes + bytes <= kPageBytes;
  if (follow && bytes > 1 && !std::memcmp(cells, cells + 1, (bytes - 1) * sizeof(Cell))) {
    const long before = report_count;
    look(cells[0], 0);
    if (report_count == before) {
      std::fill_n(cells + 1, bytes - 1, cells[0]);
      return;
    }
    for (size_t i = 1; i < bytes; ++i) look(cells[i], i);
    return;
  }
  for (size_t i = 0; i < bytes; ++i) look(in_shared ? cells[i] : *global_cells(address + i), i);
}

// ---- Scheduling ----
template <class Items>
void maybe_shuffle(Items& items) {
  if (shuffled) std::shuffle(items.begin(), items.end(), generator);
}

// Runs every warp until all of its lanes wait for the block or have ended.
void run_warps(unsigned count, std::vector<unsigned>& warps) {
  std::vector<unsigned> lanes(kWarpSize);
  for (unsigned i = 0; i < kWarpSize; ++i) lanes[i] = i;
  for (bool progress = true; progress && failure.empty();) {
    progress = false;
    maybe_shuffle(warps);
    for (unsigned warp : warps) {
      for (bool ran = true; ran && failure.empty();) {
        ran = false;
        maybe_shuffle(lanes);
        for (unsigned lane : lanes) {
          unsigned slot = warp * kWarpSize + lane;
          if (slot >= count || threads[slot]->state != State::kReady) continue;
          to_thread(*threads[slot]);
          if (!failure.empty()) return;
          progress = ran = true;
        }
        if (shuffled) break;  // let other warps in between
      }
    }
  }
}

// All threads wait or have ended: lets the block pass its barrier, or says who is missing. False once all
// have ended.
bool release_barrier(unsigned count) {
  unsigned done = 0;
  const Thread* first = nullptr;
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = *threads[i];
    if (t.state == State::kDone) {
      ++done;
    } else if (t.state == State::kAtCollective) {
      for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        unsigned slot = i / kWarpSize * kWarpSize + lane;
        if (!(t.mask >> lane & 1)) continue;
        if (slot >= count) {
          failure = where(t) + " " + describe(t) + ", which names lane " + std::to_string(lane) +
                    ", but the block ends before it";
          return false;
        }
        const Thread& peer = *threads[slot];
        if (peer.state != State::kAtCollective || peer.combine != t.combine || peer.mask != t.mask) {
          failure = "divergent warp: " + where(t) + " " + describe(t) + ", but its lane " +
                    std::to_string(lane) + " " + describe(peer);
          return false;
        }
      }
    } else if (!first) {
      first = &t;
    }
  }
  if (done == count) return false;
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = *threads[i];
    if (t.state != State::kAtBarrier || t.line != first->line) {
      failure = "divergent barrier: " + where(*first) + " " + describe(*first) + ", but " + where(t) + " " +
                describe(t);
      return false;
    }
  }
  barrier_count = 0;
  for (unsigned i = 0; i < count; ++i) barrier_count += threads[i]->predicate != 0;
  for (unsigned i = 0; i < count; ++i) threads[i]->state = State::kReady;
  for (uint64_t& phase : phases) ++phase;
  ++epoch;
  return true;
}

void allocate(unsigned count) {
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) throw std::bad_alloc();
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    for (unsigned i = 0; i < kMaxThreads; ++i)
      mprotect(stacks + i * kStackBytes, page, PROT_NONE);  // overflow faults
  }
  while (threads.size() < count) {
    threads.push_back(std::make_unique<Thread>());
    threads.back()->stack = stacks + (threads.size() - 1) * kStackBytes;
  }
}

void run_block(dim3 grid, dim3 block, uint3 index, unsigned count, size_t shared_bytes) {
#ifdef __SANITIZE_ADDRESS__
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(shared_bytes, 1))) throw std::bad_alloc();
  std::unique_ptr<char, decltype(&free)> storage(static_cast<char*>(memory), free);
  shared = storage.get();  // the sanitizer guards its ends
#else
  shared_storage.resize(shared_bytes + 2 * kGuardBytes + 1024);
  shared = shared_storage.data() + kGuardBytes;
  shared += -reinterpret_cast<uintptr_t>(shared) & 1023;
#endif
  shared_size = shared_bytes;
  std::memset(shared, 0xff, shared_bytes);  // NaN, in every floating-point type
  if (checked && shared_shadow.size() < shared_bytes) shared_shadow.resize(shared_bytes);
  block_epoch = ++epoch;
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = *threads[i];
    t.thread_index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    t.block_index = index;
    t.block_size = block;
    t.grid_size = grid;
    t.slot = i;
    t.state = State::kReady;
    t.copies.clear();
    t.group = 0;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(t.stack + sysconf(_SC_PAGESIZE), kStackBytes - sysconf(_SC_PAGESIZE));
#endif
    prepare(t.context, t.stack, entry);
  }
  std::vector<unsigned> warps((count + kWarpSize - 1) / kWarpSize);
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  do {
    run_warps(count, warps);
  } while (failure.empty() && release_barrier(count));
  if (trace_path) end_visits();
  if (checked && !failure.empty())
    for (auto& cell : shared_shadow) cell.pending = 0;
}

Limits limits() {
  const char* name = getenv("VOSOPS_EMULATOR_ARCH");
  const std::string arch = name ? name : "80";
  if (arch == "80") return {"sm_80", 163 << 10};
  if (arch == "86") return {"sm_86", 99 << 10};
  if (arch == "90") return {"sm_90", 227 << 10};
  if (arch == "100") return {"sm_100", 227 << 10};
  throw Fault("VOSOPS_EMULATOR_ARCH must be 80, 86, 90 or 100, not " + arch);
}

std::string bad_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
  const Limits limit = limits();
  const auto reject = [&](const char* what, size_t value, size_t most) {
    return std::string(what) + " " + std::to_string(value) + " is over the limit of " + std::to_string(most) +
           " of " + limit.name;
  };
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z)
    return "a grid or block without threads";
  if (size_t(block.x) * block.y * block.z > kMaxThreads)
    return reject("block size", size_t(block.x) * block.y * block.z, kMaxThreads);
  if (block.z > 64) return reject("block.z", block.z, 64);
  if (grid.x > 0x7fffffff) return reject("grid.x", grid.x, 0x7fffffff);
  if (grid.y > 65535) return reject("grid.y", grid.y, 65535);
  if (grid.z > 65535) return reject("grid.z", grid.z, 65535);
  if (shared_bytes > limit.shared_bytes)
    return reject("dynamic shared memory", shared_bytes, limit.shared_bytes);
  return "";
}

}  // namespace

void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
         const void* context) {
  std::lock_guard lock(machine_mutex);
  if (auto problem = bad_configuration(grid, block, shared_bytes); !problem.empty())
    throw Fault(std::string(name) + ": invalid launch: " + problem);
  const unsigned count = block.x * block.y * block.z;
  allocate(count);
  kernel_name = name;
  kernel_call = call;
  kernel_context = context;
  failure.clear();
  reports.clear();
  report_count = 0;
  const char* seed = getenv("VOSOPS_EMULATOR_SHUFFLE");
  shuffled = seed != nullptr;
  if (seed) generator.seed(unsigned(std::strtoul(seed, nullptr, 10)));
  launch_epoch = ++epoch;
  hopper_sums = asks_for_hopper_sums();
  trace_path = getenv("VOSOPS_EMULATOR_TRACE");
  visits.clear();
  const bool dry = getenv("VOSOPS_EMULATOR_DRY") != nullptr;
  const size_t blocks = dry ? 0 : size_t(grid.x) * grid.y * grid.z;
  std::vector<size_t> order;
  if (shuffled) {
    order.resize(blocks);
    for (size_t i = 0; i < blocks; ++i) order[i] = i;
    maybe_shuffle(order);
  }
  for (size_t i = 0; i < blocks && failure.empty(); ++i) {
    const size_t b = shuffled ? order[i] : i;
    run_block(grid, block,
              {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)}, count,
              shared_bytes);
  }
  shared = nullptr;
  shared_size = 0;
  if (trace_path) write_trace(name, grid, block, shared_bytes);
  if (failure.empty() && reports.empty()) return;
  std::string text = std::string(name) + ": ";
  if (!failure.empty()) text += failure;
  if (!reports.empty()) {
    text += (failure.empty() ? "" : "\n") + std::to_string(report_count) + " faults";
    for (const auto& r : reports)
      text += "\n  " + std::string(r.kind) + ": " + r.text + source_line(r.code) + " (" +
              std::to_string(r.count) + " times)";
  }
  throw Fault(text);
}

void* shared_memory(size_t bytes) {
  if (bytes > shared_size)
    fail("a struct of %zu bytes in %zu bytes of dynamic shared memory", bytes, shared_size);
  return shared;
}

bool is_shared(const volatile void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared) < shared_size;
}

size_t shared_limit() {
  return limits().shared_bytes;
}

int multiprocessors() {
  const char* count = getenv("VOSOPS_EMULATOR_MULTIPROCESSORS");
  return count ? std::max(atoi(count), 1) : 2;
}

void visit(const char* name, int copies, int number) {
  if (!trace_path) return;
  const unsigned slot = self().slot, warp = slot / kWarpSize;
  Visits& visited = visits[{name, number}];
  visited.copies = copies;
  WarpVisits& mine = visited.warps[warp];
  if (mine.phase != phases[warp]) {
    visited.count += mine.most;
    mine = {phases[warp]};
  }
  mine.most = std::max(mine.most, ++mine.lanes[slot % kWarpSize]);
}

int block_reduce(int predicate, int line) {
  Thread& me = self();
  me.predicate = predicate;
  me.line = line;
  me.state = State::kAtBarrier;
  to_scheduler();
  return barrier_count;
}

void block_barrier(int line) {
  block_reduce(0, line);
}

void warp_collective(unsigned mask, const char* name, void* argument, Combine combine, bool orders_memory) {
  Thread& me = self();
  const unsigned base = me.slot / kWarpSize * kWarpSize;
  if (!(mask >> (me.slot - base) & 1)) fail("%s with mask %08x, which leaves its own lane out", name, mask);
  me.mask = mask;
  me.collective = name;
  me.argument = argument;
  me.combine = combine;
  me.state = State::kAtCollective;
  const unsigned count = me.block_size.x * me.block_size.y * me.block_size.z;
  void* arguments[kWarpSize] = {};
  unsigned live = 0;
  for (unsigned lane = 0; lane < kWarpSize && base + lane < count; ++lane) {
    const Thread& peer = *threads[base + lane];
    live |= unsigned(peer.state != State::kDone) << lane;
    if (!(mask >> lane & 1)) continue;
    arguments[lane] = peer.argument;
    if (peer.state != State::kAtCollective || peer.combine != combine || peer.mask != mask) {
      to_scheduler();  // some lane is not here yet; the last one to come does the work
      return;
    }
  }
  if (base + 31 - __builtin_clz(mask) >= count) {
    to_scheduler();
    return;
  }
  combine(arguments, mask);
  ++phases[base / kWarpSize];
  if (orders_memory && (live & ~mask) == 0) ++warp_epochs[base / kWarpSize];
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) threads[base + lane]->state = State::kReady;
}

void touch(const volatile void* address, size_t bytes, Access access) {
  if (checked && running)
    check(reinterpret_cast<uintptr_t>(address), bytes, access, __builtin_return_address(0));
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!running) throw Fault(text);
  if (failure.empty()) failure = where(self()) + ": " + text;
  for (;;) to_scheduler();
}

// ---- cp.async ----
void copy_async(void* destination, const void* global, unsigned bytes, unsigned source_bytes) {
  Thread& me = self();
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %u bytes", bytes);
  if (source_bytes > bytes) fail("cp.async of %u bytes from a source of %u", bytes, source_bytes);
  if (reinterpret_cast<uintptr_t>(destination) % bytes) fail("cp.async to a misaligned address");
  if (source_bytes && reinterpret_cast<uintptr_t>(global) % bytes) fail("cp.async from a misaligned address");
  const size_t offset = size_t(static_cast<char*>(destination) - shared);
  if (offset + bytes > shared_size)
    fail("cp.async to byte %zd of %zu of shared memory", ptrdiff_t(offset), shared_size);
  touch(destination, bytes, Access::kWrite);
  std::memset(destination, 0xff, bytes);
  if (checked)
    for (unsigned i = 0; i < bytes; ++i) shared_shadow[offset + i].pending = me.slot + 1;
  me.copies.push_back({destination, global, bytes, source_bytes, me.group});
}

void copy_async_commit() {
  ++self().group;
}

void copy_async_wait(unsigned groups_in_flight) {
  Thread& me = self();
  std::vector<Copy> later;
  for (const Copy& c : me.copies) {
    if (c.group + groups_in_flight >= me.group) {
      later.push_back(c);
      continue;
    }
    const size_t offset = size_t(static_cast<char*>(c.shared) - shared);
    if (checked)
      for (unsigned i = 0; i < c.bytes; ++i) shared_shadow[offset + i].pending = 0;
    touch(c.shared, c.bytes, Access::kWrite);
    if (c.source_bytes) touch(c.global, c.source_bytes, Access::kRead);
    std::memset(c.shared, 0, c.bytes);
    for (unsigned i = 0; i < c.source_bytes; ++i)
      static_cast<char*>(c.shared)[i] = static_cast<const char*>(c.global)[i];
  }
  me.copies.swap(later);
}

}  // namespace emulator

// ---- What -fsanitize=thread makes the kernels call ----
namespace {
inline void hook(const void* address, size_t bytes, emulator::Access access, const void* code) {
  if (emulator::running) emulator::check(reinterpret_cast<uintptr_t>(address), bytes, access, code);
}
}  // namespace
#define CODE __builtin_return_address(0)
#define ACCESS_HOOKS(n)                                \
  extern "C" void __tsan_read##n(void* p) {            \
    hook(p, n, emulator::Access::kRead, CODE);         \
  }                                                    \
  extern "C" void __tsan_write##n(void* p) {           \
    hook(p, n, emulator::Access::kWrite, CODE);        \
  }                                                    \
  extern "C" void __tsan_unaligned_read##n(void* p) {  \
    hook(p, n, emulator::Access::kRead, CODE);         \
  }                                                    \
  extern "C" void __tsan_unaligned_write##n(void* p) { \
    hook(p, n, emulator::Access::kWrite, CODE);        \
  }                                                    \
  extern "C" void __tsan_volatile_read##n(void* p) {   \
    hook(p, n, emulator::Access::kRead, CODE);         \
  }                                                    \
  extern "C" void __tsan_volatile_write##n(void* p) {  \
    hook(p, n, emulator::Access::kWrite, CODE);        \
  }
ACCESS_HOOKS(1) ACCESS_HOOKS(2) ACCESS_HOOKS(4) ACCESS_HOOKS(8) ACCESS_HOOKS(16) extern "C" {
  void __tsan_init() {
    emulator::checked = true;
  }
  void __tsan_func_entry(void*) {}
  void __tsan_func_exit() {}
  void __tsan_vptr_update(void**, void*) {}
  void __tsan_vptr_read(void**) {}
  void __tsan_read_range(void* p, size_t n) {
    hook(p, n, emulator::Access::kRead, CODE);
  }
  void __tsan_write_range(void* p, size_t n) {
    hook(p, n, emulator::Access::kWrite, CODE);
  }
  void __tsan_atomic_thread_fence(int) {}
  void __tsan_atomic_signal_fence(int) {}
}
// Host code (shared_ptr) uses these; kernels use the atomics of emulator.h.
#define ATOMIC_HOOKS(bits)                                                                                   \
  extern "C" uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {              \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                          \
  extern "C" void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) {           \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                          \
  extern "C" uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t v,     \
                                                           int) {                                            \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                          \
  extern "C" uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t v,    \
                                                            int) {                                           \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                          \
  extern "C" uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* p, uint##bits##_t v,    \
                                                            int) {                                           \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                          \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_strong(                                             \
      volatile uint##bits##_t* p, uint##bits##_t* e, uint##bits##_t v, int, int) {                           \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }                                                                                                          \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_weak(volatile uint##bits##_t* p, uint##bits##_t* e, \
                                                              uint##bits##_t v, int, int) {                  \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }
ATOMIC_HOOKS(8)
ATOMIC_HOOKS(16)
ATOMIC_HOOKS(32)
ATOMIC_HOOKS(64)

    // -fsanitize=alignment: a misaligned vector access is an error on the GPU.
    struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
extern "C" void __ubsan_handle_type_mismatch_v1(SourceLocation* location, uintptr_t address) {
  if (emulator::running)
    emulator::fail("misaligned access of address %zx at %s:%u", size_t(address), location->file,
                   location->line);
}
