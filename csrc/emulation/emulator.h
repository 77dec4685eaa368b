// Executes CUDA kernels on the CPU, one fiber per CUDA thread, and detects errors that a GPU may hide.
//
// Blocks run one after another. Within a block, a thread runs until it must wait for others; `Order` then
// decides which thread continues, and a result that depends on this order is a race. Shared memory is NaN at
// the start of every block. These are errors: an access outside the registered ranges, a misaligned access, a
// barrier that some thread does not reach, a warp operation that the lanes do not reach together.
//
// ThreadSanitizer sees every CUDA thread as a thread. Only what orders memory accesses in CUDA orders them
// for the sanitizer: block barriers, warp barriers, and the boundaries of launches, but no other warp
// operation, and nothing between blocks. emulator.cpp acts on behalf of all threads, which is no race. It
// must therefore be compiled without ThreadSanitizer, with NEMO_EXT_THREAD_SANITIZER defined, and be linked
// first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <vector>

namespace nemo_ext::emulation {

// The order of the blocks of a launch, and of the threads of a block that are ready to continue.
enum class Order { Forward, Reverse, Random };

// How a tensor core adds up. Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
// 2021, describe both of these.
struct Adder {
  // How many products of 16-bit elements are added to the accumulator at a time; of tf32, half as many. The
  // products and the accumulator are aligned to the largest exponent among them, and what is smaller than the
  // last bit of a float32 of that exponent, after `extra_bits` further bits, is cut off before the sum. An
  // A100 adds 8 products with 1 extra bit. 0: the sum of all products of an mma is exact.
  int terms = 0;
  int extra_bits = 0;
};

// What the hardware leaves open.
struct Execution {
  Order order = Order::Forward;
  uint64_t seed = 0;  // for Order::Random
  Adder adder = {};
};

struct Launch {
  int64_t grid_x, grid_y;
  int threads;
  int shared_bytes;
  Execution execution = {};
};

// Global memory that the kernel may read, and also write if it is `writable`.
struct Range {
  const void* begin;
  size_t bytes;
  bool writable;
  const char* name;
};

// Runs `kernel` once for every thread of the launch. Stops at the first error and throws std::runtime_error;
// what the kernel has written by then stays in memory.
void run(const Launch& launch, const std::vector<Range>& ranges, const std::function<void()>& kernel);

// The functions below serve csrc/emulation/primitives.h, on behalf of the running thread. They only check;
// the accesses to memory are made there, in code that the sanitizers instrument.

// The place in the kernel that called a primitive, for error messages.
using Where = std::source_location;

int thread_index();
int block_index_x();
int block_index_y();
int grid_size_y();

// Check an access and throw if it is wrong. `access` is the name of the primitive.
void check_global(const char* access, const void* address, int bytes, int alignment, bool write, Where where);
unsigned char* checked_shared(const char* access, uint32_t offset, int bytes, int alignment, Where where);

// Wait for all threads of the block, or of the warp.
void sync_threads(Where where);
void sync_warp(Where where);

// Returns the value that lane (this lane ^ mask) has passed.
uint64_t shuffle_xor(uint64_t value, int mask, Where where);

// On entry `words` is the row that this lane has read at `row_offset`, on return its part of the four
// matrices, as described in PTX ISA, "ldmatrix".
void load_matrices(uint32_t (&words)[4], uint32_t row_offset, Where where);

// The number of bank conflicts of load_matrices in all launches so far. Rows of a matrix that lie in the same
// four of the 32 banks are read one after another; every pass after the first counts as a conflict.
int64_t bank_conflicts();

enum class Product { BFloat16, Float16, Tf32 };

// Adds up as the launch's Adder says, and rounds every sum towards zero.
void multiply_add(Product product, float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Where where);

// A copy of 16 bytes, or of 16 zeros if `source` is null.
struct Copy {
  unsigned char* target;
  const unsigned char* source;
};
void begin_copy(const Copy& copy, Where where);
void commit_copies();
// Takes the oldest copy that a wait for all but the latest `pending` groups covers. Returns false if there is
// none left.
bool land_copy(int pending, Copy& copy);

}  // namespace nemo_ext::emulation
