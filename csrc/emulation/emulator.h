// Executes CUDA kernels on the CPU, one fiber per CUDA thread, and checks what a GPU would leave to chance.
//
// Blocks run one after another; within a block a thread runs until it waits for others. `Order` says which
// one goes on then: a result that depends on it is a race. Shared memory is NaN at the start of every block.
// Memory outside the registered ranges, misaligned accesses, barriers that some thread does not reach and
// warp operations that its lanes do not reach together are errors.
//
// Under ThreadSanitizer a CUDA thread is a thread to the sanitizer too. It takes as order what CUDA gives:
// barriers of the block, barriers of the warp and the launches' boundaries; no other warp operation, and
// nothing between blocks. emulator.cpp itself must be compiled without it, with NEMO_EXT_THREAD_SANITIZER
// defined, and be linked first: what it does on behalf of all threads is no race.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <vector>

namespace nemo_ext::emulation {

// Of the blocks of a launch, and of the threads of a block that could go on.
enum class Order { Forward, Reverse, Random };

struct Launch {
  int64_t grid_x, grid_y;
  int threads;
  int shared_bytes;
  Order order = Order::Forward;
  uint64_t seed = 0;  // of Order::Random
};

// Global memory that the kernel may read, and write where it is `writable`.
struct Range {
  const void* begin;
  size_t bytes;
  bool writable;
  const char* name;
};

// Runs `kernel` once for every thread of the launch. Throws std::runtime_error with the first error; what the
// kernel wrote before stays written.
void run(const Launch& launch, const std::vector<Range>& ranges, const std::function<void()>& kernel);

// The rest is what csrc/emulation/primitives.h asks for on behalf of the running thread. Memory itself is
// touched there, in code that the sanitizers see.

// Of the kernel's call, for the error message.
using Where = std::source_location;

int thread_index();
int block_index_x();
int block_index_y();
int grid_size_y();

// `access` is the primitive's name.
void check_global(const char* access, const void* address, int bytes, int alignment, bool write, Where where);
unsigned char* checked_shared(const char* access, uint32_t offset, int bytes, int alignment, Where where);

// Waits for all threads of the block, or of the warp.
void sync_threads(Where where);
void sync_warp(Where where);

// What lane (this lane ^ mask) gave.
uint64_t shuffle_xor(uint64_t value, int mask, Where where);

// `words`: the row that this lane read at `row_offset`; then what PTX ISA, "ldmatrix", gives it of all lanes'
// rows.
void load_matrices(uint32_t (&words)[4], uint32_t row_offset, Where where);

// How many passes over shared memory load_matrices has taken beyond one for each matrix, in all launches so
// far: rows of a matrix that lie in the same four of the 32 banks are read one after another.
int64_t bank_conflicts();

enum class Product { BFloat16, Float16, Tf32 };

// Sums exactly and rounds towards zero, which tensor cores do at the worst: Fasi, Higham, Mikaitis, Pranesh,
// "Numerical behavior of NVIDIA tensor cores", 2021.
void multiply_add(Product product, float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                  uint32_t right1, Where where);

// Of 16 bytes; zeros where `source` is null.
struct Copy {
  unsigned char* target;
  const unsigned char* source;
};
void begin_copy(const Copy& copy, Where where);
void commit_copies();
// The oldest copy that a wait for all but the latest `pending` groups covers; false where there is none left.
bool land_copy(int pending, Copy& copy);

}  // namespace nemo_ext::emulation
