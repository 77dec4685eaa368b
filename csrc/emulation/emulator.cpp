#include "csrc/emulation/emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>

#include "csrc/cuda/primitives.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(NEMO_EXT_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

// On x86-64 a few instructions switch stacks. Elsewhere, or if NEMO_EXT_UCONTEXT is defined, the C library
// does, with a system call for each switch.
#if defined(__x86_64__) && defined(__ELF__) && !defined(NEMO_EXT_UCONTEXT)
#define NEMO_EXT_FAST_SWITCH
asm(R"(
.text
.globl nemo_ext_switch_stacks
.hidden nemo_ext_switch_stacks
.type nemo_ext_switch_stacks, @function
nemo_ext_switch_stacks:
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
.size nemo_ext_switch_stacks, . - nemo_ext_switch_stacks
)");
// Pushes the registers that a call must preserve, stores the stack pointer in `from`, and continues on the
// stack `to` in the same way.
extern "C" void nemo_ext_switch_stacks(void** from, void* to);
#else
#include <ucontext.h>
#endif

namespace nemo_ext::emulation {
namespace {

constexpr int kWarpSize = cuda::kWarpSize;
constexpr uint32_t kAllLanes = 0xffffffff;

// Limits of the hardware for a launch.
constexpr int kMostThreads = 1024;
constexpr int kMostSharedBytes = 227 * 1024;
constexpr int64_t kMostBlocksX = 0x7fffffff;
constexpr int64_t kMostBlocksY = 0xffff;

// The number of pending copies of one thread. Only the emulation has this limit.
constexpr int kMostCopies = 512;

// Each stack has a guard page. Pages that are not touched take no memory.
constexpr size_t kStackBytes = 256 * 1024;

class Mapping {
 public:
  explicit Mapping(size_t bytes) : bytes_(bytes) {
    void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    begin_ = static_cast<unsigned char*>(begin);
  }
  ~Mapping() { munmap(begin_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  unsigned char* begin() const { return begin_; }

 private:
  size_t bytes_;
  unsigned char* begin_;
};

// A flow of control with its own stack: a CUDA thread, or the caller of `run`.
struct Fiber {
#if defined(NEMO_EXT_FAST_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;         // for AddressSanitizer
  void* sanitizers_thread = nullptr;  // for ThreadSanitizer
};

enum class Operation {
  SyncThreads,
  SyncWarp,
  ShuffleXor,
  LoadMatrices,
  MultiplyAddBFloat16,
  MultiplyAddFloat16,
  MultiplyAddTf32
};
constexpr const char* kNames[] = {
    "sync_threads",           "sync_warp",        "shuffle_xor", "load_matrices", "multiply_add (BFloat16)",
    "multiply_add (Float16)", "multiply_add_tf32"};

const char* name_of(Operation operation) {
  return kNames[static_cast<int>(operation)];
}

struct QueuedCopy {
  Copy copy;
  int64_t group;
};

struct Thread {
  Fiber fiber;
  int index = 0;

  Operation operation;  // the one that it waits in
  Where where;

  // Operands of that operation, and then its results.
  uint64_t bits;
  int mask;
  uint32_t words[4];  // a row of 16 bytes, or the A fragment of multiply_add
  uint32_t b[2];      // the B fragment
  float accumulators[4];

  // Pending copies, a ring buffer in machine.copies.
  int oldest_copy, copy_count;
  int64_t committed_groups;
};

// The states of a warp's lanes, one bit for each lane.
struct Warp {
  uint32_t ready = 0, waiting = 0, finished = 0;
  int64_t meetings = 0;
};

// Addresses that represent the barriers of a block and of its warps to ThreadSanitizer. Barriers alternate
// between two addresses, because a thread may arrive at one barrier before another has left the previous one.
struct Orders {
  int64_t block[2];
  int64_t warps[kMostThreads / kWarpSize][2];
};

struct Machine {
  // State of the launch.
  const std::vector<Range>* ranges;
  const std::function<void()>* kernel = nullptr;  // null if none is running
  Launch launch;
  uint64_t random;
  std::string error;
  Fiber caller;
  int64_t launch_end;          // represents the end of the launch to ThreadSanitizer
  int64_t bank_conflicts = 0;  // in all launches
  // Kept until the launch ends. Otherwise ThreadSanitizer would take the next block's threads for the threads
  // of this one.
  std::vector<void*> sanitizers_threads;

  // State of the block.
  int64_t block_x, block_y;
  std::array<Warp, kMostThreads / kWarpSize> warps;
  int warp_count, at_barrier, finished;
  int64_t barriers;
  Thread* current;  // null for the caller
  // Of all blocks, until the launch ends, so that no address represents barriers of two blocks.
  std::vector<std::unique_ptr<Orders>> orders;

  // Kept for the next launch. Under ThreadSanitizer stacks and shared memory are allocated anew for every
  // block, because blocks would otherwise seem to share them.
  std::vector<Thread> threads;
  // An array for every thread. ThreadSanitizer would take memory that fibers allocate for shared, too.
  std::vector<std::array<QueuedCopy, kMostCopies>> copies;
  std::unique_ptr<Mapping> stacks, shared;
  int stack_count = 0;
};

Machine machine;

// Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
uint64_t random_below(uint64_t limit) {
  uint64_t bits = machine.random += 0x9e3779b97f4a7c15;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111eb;
  return (bits ^ (bits >> 31)) % limit;
}

std::string name_of(const Thread& thread) {
  return "thread " + std::to_string(thread.index) + " of block (" + std::to_string(machine.block_x) + ", " +
         std::to_string(machine.block_y) + ")";
}

std::string name_of(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

// run_thread passes the exception on to the caller of `run`.
[[noreturn]] void fail(const char* operation, Where where, const std::string& what) {
  throw std::runtime_error(std::string(operation) + " by " + name_of(*machine.current) + " at " +
                           name_of(where) + ": " + what);
}

// Returns the first thread whose bit is set.
const Thread& first(uint32_t Warp::* lanes) {
  int warp = 0;
  while (machine.warps[warp].*lanes == 0) ++warp;
  return machine.threads[warp * kWarpSize + std::countr_zero(machine.warps[warp].*lanes)];
}

void switch_fibers(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(NEMO_EXT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(to.sanitizers_thread, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(NEMO_EXT_FAST_SWITCH)
  nemo_ext_switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Returns the next thread in the launch's order that is ready, or null if there is none.
Thread* next_thread() {
  int warp = 0, lane = 0;
  const auto is_idle = [&](int candidate) { return machine.warps[candidate].ready == 0; };
  if (machine.launch.execution.order == Order::Random) {
    int ready = 0;
    for (int i = 0; i < machine.warp_count; ++i) ready += std::popcount(machine.warps[i].ready);
    if (ready == 0) return nullptr;
    int skipped = random_below(ready);
    while (skipped >= std::popcount(machine.warps[warp].ready))
      skipped -= std::popcount(machine.warps[warp++].ready);
    uint32_t lanes = machine.warps[warp].ready;
    for (; skipped > 0; --skipped) lanes &= lanes - 1;
    lane = std::countr_zero(lanes);
  } else if (machine.launch.execution.order == Order::Forward) {
    while (warp < machine.warp_count && is_idle(warp)) ++warp;
    if (warp == machine.warp_count) return nullptr;
    lane = std::countr_zero(machine.warps[warp].ready);
  } else {
    warp = machine.warp_count - 1;
    while (warp >= 0 && is_idle(warp)) --warp;
    if (warp < 0) return nullptr;
    lane = kWarpSize - 1 - std::countl_zero(machine.warps[warp].ready);
  }
  machine.warps[warp].ready &= ~(1u << lane);
  return &machine.threads[warp * kWarpSize + lane];
}

// Switches from the running thread, which waits or (`for_good`) has ended, to the next thread or to the
// caller.
void pass_on(bool for_good) {
  Thread* from = machine.current;
  Thread* to = machine.error.empty() ? next_thread() : nullptr;
  if (to == from) return;
  machine.current = to;
  switch_fibers(from->fiber, to ? to->fiber : machine.caller, for_good);
}

// The function that a fiber executes.
void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  // The first fiber to run is entered from the caller, and learns the bounds of the caller's stack.
  Fiber ignored;
  Fiber& from = machine.caller.stack ? ignored : machine.caller;
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
  Thread& thread = *machine.current;
  Warp& warp = machine.warps[thread.index / kWarpSize];
  try {
    (*machine.kernel)();
    if (warp.waiting || machine.at_barrier) {
      const Thread& other = first(&Warp::waiting);
      throw std::runtime_error(name_of(thread) + " returned, but thread " + std::to_string(other.index) +
                               " waits for it in " + name_of(other.operation) + " at " +
                               name_of(other.where));
    }
  } catch (const std::exception& error) {
    machine.error = error.what();
  }
  warp.finished |= 1u << thread.index % kWarpSize;
  ++machine.finished;
#if defined(NEMO_EXT_THREAD_SANITIZER)
  __tsan_release(&machine.launch_end);
#endif
  pass_on(true);
}

void prepare_fiber(Fiber& fiber, unsigned char* stack, size_t bytes) {
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
#if defined(NEMO_EXT_FAST_SWITCH)
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // the return address of run_thread, which aligns the stack as a call does
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int preserved = 0; preserved < 6; ++preserved) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  makecontext(&fiber.context, &run_thread, 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
  // A thread that has ended, or was abandoned after an error, has left the red zones of its frames behind.
  __asan_unpoison_memory_region(stack, bytes);
#endif
#if defined(NEMO_EXT_THREAD_SANITIZER)
  fiber.sanitizers_thread = __tsan_create_fiber(0);
  machine.sanitizers_threads.push_back(fiber.sanitizers_thread);
#endif
}

void prepare_memory() {
#if defined(NEMO_EXT_THREAD_SANITIZER)
  machine.stacks.reset();
  machine.shared.reset();
  machine.stack_count = 0;
#endif
  if (!machine.shared) machine.shared = std::make_unique<Mapping>(kMostSharedBytes);
  if (machine.stack_count < machine.launch.threads) {
    machine.stack_count = machine.launch.threads;
    machine.threads.resize(machine.stack_count);
    machine.copies.resize(machine.stack_count);
    machine.stacks = std::make_unique<Mapping>(machine.stack_count * kStackBytes);
    for (int i = 0; i < machine.stack_count; ++i) {
      mprotect(machine.stacks->begin() + i * kStackBytes, sysconf(_SC_PAGESIZE), PROT_NONE);
    }
  }
  std::memset(machine.shared->begin(), 0xff, machine.launch.shared_bytes);
}

void run_block(int64_t x, int64_t y) {
  prepare_memory();
  machine.block_x = x;
  machine.block_y = y;
  machine.at_barrier = machine.finished = 0;
  machine.barriers = 0;
  machine.warp_count = machine.launch.threads / kWarpSize;
  std::fill_n(machine.warps.begin(), machine.warp_count, Warp{.ready = kAllLanes});
  machine.orders.push_back(std::make_unique<Orders>());
  for (int i = 0; i < machine.launch.threads; ++i) {
    Thread& thread = machine.threads[i];
    thread.index = i;
    thread.oldest_copy = thread.copy_count = 0;
    thread.committed_groups = 0;
    // Stacks begin at different places of a page, because a cache holds few lines with the same place.
    const size_t unused = i % 64 * 576;
    prepare_fiber(thread.fiber, machine.stacks->begin() + i * kStackBytes, kStackBytes - unused);
  }
  machine.current = next_thread();
  switch_fibers(machine.caller, machine.current->fiber, false);
}

float towards_zero(double number) {
  const float nearest = static_cast<float>(number);
  const bool is_farther = (std::fabs(nearest) > std::fabs(number)) & (std::fabs(number) < 0x1p128);
  return cuda::as_float(cuda::as_bits(nearest) - is_farther);
}

// Returns start + Σ a · b with every term cut off at one common bit, see Adder. The exponent of a product is
// the sum of its factors' exponents, as hardware takes it before it knows the product.
float add_aligned(float start, const double* a, const double* b, int terms, int extra_bits) {
  constexpr int kNone = std::numeric_limits<int>::min();
  int largest = start == 0 ? kNone : std::ilogb(start);
  bool is_finite = std::isfinite(start);
  double exact = start;
  for (int k = 0; k < terms; ++k) {
    const double product = a[k] * b[k];
    exact += product;
    is_finite = is_finite && std::isfinite(product);
    if (product != 0) largest = std::max(largest, std::ilogb(a[k]) + std::ilogb(b[k]));
  }
  if (!is_finite || largest == kNone) return static_cast<float>(exact);
  const double unit = std::ldexp(1.0, largest - 23 - extra_bits);
  double sum = std::trunc(start / unit);
  for (int k = 0; k < terms; ++k) sum += std::trunc(a[k] * b[k] / unit);
  return towards_zero(sum * unit);
}

// Multiplies as PTX ISA describes it under "mma.m16n8k16" (kDepth 16, two elements per word) and, for tf32,
// "mma.m16n8k8". A lane holds rows lane / 4 and lane / 4 + 8 of A and of the accumulators, and column lane /
// 4 of B.
template <int kDepth, typename ToDouble>
void multiply_warp(Thread* lanes, ToDouble to_double) {
  constexpr int kPacked = kDepth / 8;
  double a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane / 4, column = lane % 4 * kPacked;
    for (int i = 0; i < kPacked; ++i) {
      for (int word = 0; word < 4; ++word) {
        a[row + word % 2 * 8][column + word / 2 * kDepth / 2 + i] = to_double(lanes[lane].words[word], i);
      }
      for (int word = 0; word < 2; ++word) {
        b[column + word * kDepth / 2 + i][row] = to_double(lanes[lane].b[word], i);
      }
    }
  }
  const Adder& adder = machine.launch.execution.adder;
  if (adder.terms > 0) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float& accumulator = lanes[row % 8 * 4 + column / 2].accumulators[row / 8 * 2 + column % 2];
        double b_column[kDepth];
        for (int k = 0; k < kDepth; ++k) b_column[k] = b[k][column];
        const int terms = std::clamp(adder.terms * kDepth / 16, 1, kDepth);
        for (int k = 0; k < kDepth; k += terms) {
          accumulator = add_aligned(accumulator, a[row] + k, b_column + k, std::min(terms, kDepth - k),
                                    adder.extra_bits);
        }
      }
    }
    return;
  }
  for (int row = 0; row < 16; ++row) {
    double sum[8];
#pragma GCC unroll 8
    for (int column = 0; column < 8; ++column) {
      sum[column] = lanes[row % 8 * 4 + column / 2].accumulators[row / 8 * 2 + column % 2];
    }
    for (int k = 0; k < kDepth; ++k) {
#pragma GCC unroll 8
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
#pragma GCC unroll 8
    for (int column = 0; column < 8; ++column) {
      lanes[row % 8 * 4 + column / 2].accumulators[row / 8 * 2 + column % 2] = towards_zero(sum[column]);
    }
  }
}

// Rows of 16 bytes are read in one pass if they lie in different eighths of the banks' 128 bytes.
int64_t conflicts_of_matrices(const Thread* lanes) {
  int64_t conflicts = 0;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::set<uint64_t> rows[8];
    for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane) {
      rows[lanes[lane].bits / 16 % 8].insert(lanes[lane].bits);
    }
    size_t passes = 0;
    for (const auto& group : rows) passes = std::max(passes, group.size());
    conflicts += static_cast<int64_t>(passes) - 1;
  }
  return conflicts;
}

// Executes an operation of a warp, once all of its lanes have come to it.
void complete(Operation operation, Thread* lanes) {
  if (operation == Operation::ShuffleXor) {
    uint64_t given[kWarpSize];
    for (int lane = 0; lane < kWarpSize; ++lane) given[lane] = lanes[lane].bits;
    for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane].bits = given[lane ^ lanes[lane].mask];
  } else if (operation == Operation::LoadMatrices) {
    machine.bank_conflicts += conflicts_of_matrices(lanes);
    uint32_t rows[kWarpSize][4];
    for (int lane = 0; lane < kWarpSize; ++lane) std::copy_n(lanes[lane].words, 4, rows[lane]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        lanes[lane].words[matrix] = rows[matrix * 8 + lane / 4][lane % 4];
      }
    }
  } else if (operation == Operation::MultiplyAddBFloat16) {
    multiply_warp<16>(lanes, [](uint32_t word, int i) {
      return double(cuda::to_float(cuda::BFloat16{static_cast<uint16_t>(word >> 16 * i)}));
    });
  } else if (operation == Operation::MultiplyAddFloat16) {
    multiply_warp<16>(lanes, [](uint32_t word, int i) {
      return double(cuda::to_float(cuda::Float16{static_cast<uint16_t>(word >> 16 * i)}));
    });
  } else if (operation == Operation::MultiplyAddTf32) {
    multiply_warp<8>(lanes, [](uint32_t word, int) { return double(cuda::as_float(word & ~0x1fffu)); });
  }
}

// Waits until all threads of the block (for SyncThreads) or of the warp have come to `operation`.
void meet(Operation operation, Where where) {
  Thread& thread = *machine.current;
  const int warp_index = thread.index / kWarpSize;
  Warp& warp = machine.warps[warp_index];
  Thread* lanes = &machine.threads[warp_index * kWarpSize];
  const bool whole_block = operation == Operation::SyncThreads;
  if (warp.waiting) {
    const Thread& mate = lanes[std::countr_zero(warp.waiting)];
    if (mate.operation != operation) {
      fail(name_of(operation), where,
           "thread " + std::to_string(mate.index) + " of its warp waits in " + name_of(mate.operation) +
               " at " + name_of(mate.where));
    }
  }
  if (whole_block ? machine.finished > 0 : warp.finished != 0) {
    const int other =
        whole_block ? first(&Warp::finished).index : lanes[std::countr_zero(warp.finished)].index;
    fail(name_of(operation), where, "thread " + std::to_string(other) + " has already returned");
  }
  thread.operation = operation;
  thread.where = where;
  warp.waiting |= 1u << thread.index % kWarpSize;
#if defined(NEMO_EXT_THREAD_SANITIZER)
  Orders& orders = *machine.orders.back();
  int64_t* order = whole_block                        ? &orders.block[machine.barriers % 2]
                   : operation == Operation::SyncWarp ? &orders.warps[warp_index][warp.meetings % 2]
                                                      : nullptr;
  if (order) __tsan_release(order);
#endif
  if (whole_block) {
    if (++machine.at_barrier == machine.launch.threads) {
      machine.at_barrier = 0;
      ++machine.barriers;
      std::fill_n(machine.warps.begin(), machine.warp_count, Warp{.ready = kAllLanes});
    }
  } else if (warp.waiting == kAllLanes) {
    complete(operation, lanes);
    ++warp.meetings;
    warp.waiting = 0;
    warp.ready = kAllLanes;
  }
  pass_on(false);
#if defined(NEMO_EXT_THREAD_SANITIZER)
  if (order) __tsan_acquire(order);
#endif
}

// Describes an address in global memory: the nearest buffer, its size, and the offset from its start.
std::string describe(const void* address, int bytes) {
  const auto begin = reinterpret_cast<intptr_t>(address);
  std::string nearest = ", near no buffer";
  intptr_t least = 1 << 20;
  for (const Range& range : *machine.ranges) {
    const intptr_t offset = begin - reinterpret_cast<intptr_t>(range.begin);
    const intptr_t distance = offset < 0 ? -offset : std::max<intptr_t>(0, offset - intptr_t(range.bytes));
    if (distance >= least) continue;
    least = distance;
    nearest = " at byte " + std::to_string(offset) + " of " + range.name + ", which has " +
              std::to_string(range.bytes) + " bytes";
  }
  return std::to_string(bytes) + " bytes" + nearest;
}

}  // namespace

void run(const Launch& launch, const std::vector<Range>& ranges, const std::function<void()>& kernel) {
  const auto require = [](bool holds, const char* what, int64_t got) {
    if (!holds) throw std::runtime_error(std::string("launch: ") + what + ", got " + std::to_string(got));
  };
  require(launch.threads > 0 && launch.threads <= kMostThreads && launch.threads % kWarpSize == 0,
          "threads must be a multiple of 32 up to 1024", launch.threads);
  require(launch.shared_bytes >= 0 && launch.shared_bytes <= kMostSharedBytes,
          "shared_bytes must be up to 227 KiB", launch.shared_bytes);
  require(launch.grid_x > 0 && launch.grid_x <= kMostBlocksX, "grid_x must be 1 to 2147483647",
          launch.grid_x);
  require(launch.grid_y > 0 && launch.grid_y <= kMostBlocksY, "grid_y must be 1 to 65535", launch.grid_y);
  if (machine.kernel) throw std::runtime_error("launch: another one is running");

  machine.launch = launch;
  machine.ranges = &ranges;
  machine.kernel = &kernel;
  machine.random = launch.execution.seed;
  machine.error.clear();
  machine.caller = Fiber();
#if defined(NEMO_EXT_THREAD_SANITIZER)
  machine.caller.sanitizers_thread = __tsan_get_current_fiber();
#endif

  std::vector<int64_t> blocks(launch.grid_x * launch.grid_y);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (launch.execution.order == Order::Reverse) std::reverse(blocks.begin(), blocks.end());
  if (launch.execution.order == Order::Random) {
    for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random_below(i)]);
  }
  for (size_t i = 0; i < blocks.size() && machine.error.empty(); ++i) {
    run_block(blocks[i] % launch.grid_x, blocks[i] / launch.grid_x);
  }
#if defined(NEMO_EXT_THREAD_SANITIZER)
  __tsan_acquire(&machine.launch_end);
  for (void* thread : machine.sanitizers_threads) __tsan_destroy_fiber(thread);
  machine.sanitizers_threads.clear();
#endif
  machine.orders.clear();
  machine.kernel = nullptr;
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
}

int thread_index() {
  return machine.current->index;
}
int block_index_x() {
  return machine.block_x;
}
int block_index_y() {
  return machine.block_y;
}
int grid_size_y() {
  return machine.launch.grid_y;
}

void check_global(const char* access, const void* address, int bytes, int alignment, bool write,
                  Where where) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (begin & (alignment - 1)) {
    fail(access, where, describe(address, bytes) + ": not aligned to " + std::to_string(alignment));
  }
  if (bytes == 0) return;
  for (const Range& range : *machine.ranges) {
    // The offset is huge if the access begins before the range.
    const uintptr_t offset = begin - reinterpret_cast<uintptr_t>(range.begin);
    if (offset >= range.bytes || size_t(bytes) > range.bytes - offset) continue;
    if (write && !range.writable) fail(access, where, describe(address, bytes) + ": read-only");
    return;
  }
  fail(access, where, describe(address, bytes) + ": out of range");
}

unsigned char* checked_shared(const char* access, uint32_t offset, int bytes, int alignment, Where where) {
  const bool in_range = int64_t(offset) + bytes <= machine.launch.shared_bytes;
  if (!in_range || offset & (alignment - 1)) {
    fail(access, where,
         std::to_string(bytes) + " bytes at byte " + std::to_string(offset) +
             " of shared memory, which has " + std::to_string(machine.launch.shared_bytes) +
             " bytes: " + (in_range ? "not aligned to " + std::to_string(alignment) : "out of range"));
  }
  return machine.shared->begin() + offset;
}

void sync_threads(Where where) {
  meet(Operation::SyncThreads, where);
}

void sync_warp(Where where) {
  meet(Operation::SyncWarp, where);
}

uint64_t shuffle_xor(uint64_t value, int mask, Where where) {
  if (mask < 0 || mask >= kWarpSize)
    fail("shuffle_xor", where, "mask must be 0 to 31, got " + std::to_string(mask));
  Thread& thread = *machine.current;
  thread.bits = value;
  thread.mask = mask;
  meet(Operation::ShuffleXor, where);
  return thread.bits;
}

int64_t bank_conflicts() {
  return machine.bank_conflicts;
}

void load_matrices(uint32_t (&words)[4], uint32_t row_offset, Where where) {
  Thread& thread = *machine.current;
  std::copy_n(words, 4, thread.words);
  thread.bits = row_offset;
  meet(Operation::LoadMatrices, where);
  std::copy_n(thread.words, 4, words);
}

void multiply_add(Product product, float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Where where) {
  Thread& thread = *machine.current;
  std::copy_n(accumulators, 4, thread.accumulators);
  std::copy_n(a, 4, thread.words);
  thread.b[0] = b0;
  thread.b[1] = b1;
  meet(product == Product::BFloat16  ? Operation::MultiplyAddBFloat16
       : product == Product::Float16 ? Operation::MultiplyAddFloat16
                                     : Operation::MultiplyAddTf32,
       where);
  std::copy_n(thread.accumulators, 4, accumulators);
}

void begin_copy(const Copy& copy, Where where) {
  Thread& thread = *machine.current;
  if (thread.copy_count == kMostCopies)
    fail("copy_async_16", where, "more pending copies than can be emulated");
  machine.copies[thread.index][(thread.oldest_copy + thread.copy_count++) % kMostCopies] = {
      copy, thread.committed_groups};
}

void commit_copies() {
  ++machine.current->committed_groups;
}

bool land_copy(int pending, Copy& copy) {
  Thread& thread = *machine.current;
  const QueuedCopy& oldest = machine.copies[thread.index][thread.oldest_copy];
  if (thread.copy_count == 0 || oldest.group >= thread.committed_groups - pending) return false;
  copy = oldest.copy;
  thread.oldest_copy = (thread.oldest_copy + 1) % kMostCopies;
  --thread.copy_count;
  return true;
}

}  // namespace nemo_ext::emulation
