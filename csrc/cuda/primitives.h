// The one port header: all that a kernel asks of the hardware. nvcc sees PTX; any other compiler sees
// csrc/emulation/primitives.h, which executes the same names on the CPU. Kernels touch memory through these
// functions only, so that the emulation can check every access.
//
// Shared memory is addressed by byte offset from the start of the block's dynamic shared memory.
#pragma once

#include <cstdint>

namespace nemo_ext::cuda {

constexpr int kWarpSize = 32;

// Element types as bits: the same struct for nvcc and for the emulation.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What one lane loads or stores at a time; never aligned to less than its size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T data[kCount];
};

}  // namespace nemo_ext::cuda

#if defined(__CUDACC__)

#define NEMO_EXT_DEVICE __device__ __forceinline__
// `blocks` of `threads` shall fit on one multiprocessor: the register budget follows from it.
#define NEMO_EXT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace nemo_ext::cuda {

NEMO_EXT_DEVICE int thread_index() {
  return threadIdx.x;
}
NEMO_EXT_DEVICE int block_index_x() {
  return blockIdx.x;
}
NEMO_EXT_DEVICE int block_index_y() {
  return blockIdx.y;
}
NEMO_EXT_DEVICE int grid_size_y() {
  return gridDim.y;
}

NEMO_EXT_DEVICE void sync_threads() {
  __syncthreads();
}
NEMO_EXT_DEVICE void sync_warp() {
  __syncwarp();
}

template <typename T>
NEMO_EXT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <typename T>
NEMO_EXT_DEVICE T load_global(const T* source) {
  return *source;
}
template <typename T>
NEMO_EXT_DEVICE void store_global(T* target, T value) {
  *target = value;
}
NEMO_EXT_DEVICE void atomic_or_global(int* target, int bits) {
  atomicOr(target, bits);
}

NEMO_EXT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char nemo_ext_shared_memory[];
  return nemo_ext_shared_memory;
}
template <typename T>
NEMO_EXT_DEVICE T load_shared(uint32_t offset) {
  return *reinterpret_cast<const T*>(shared_memory() + offset);
}
template <typename T>
NEMO_EXT_DEVICE void store_shared(uint32_t offset, T value) {
  *reinterpret_cast<T*>(shared_memory() + offset) = value;
}

NEMO_EXT_DEVICE uint32_t shared_address(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory())) + offset;
}

// Copies 16 bytes, or writes 16 zeros where the source does not exist; it is not read then. Both sides are
// aligned to 16. Lands at the latest at the wait for its group.
NEMO_EXT_DEVICE void copy_async_16(uint32_t offset, const void* source, bool exists) {
  asm volatile(
      "{ .reg .pred ignored; setp.eq.u32 ignored, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, ignored; }"
      :
      : "r"(shared_address(offset)), "l"(__cvta_generic_to_global(source)), "r"(static_cast<uint32_t>(exists))
      : "memory");
}
// Closes the group of this thread's copies since the last call.
NEMO_EXT_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's groups, the latest, are under way.
template <int kPending>
NEMO_EXT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8×8 matrices of 16-bit words (or 8×4 of 32-bit words) whose rows are 16 bytes: lane l names row l % 8
// of matrix l / 8, and gets of each matrix 4 bytes: of row l / 4, word l % 4. PTX ISA, "ldmatrix".
NEMO_EXT_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t row_offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row_offset))
               : "memory");
}

// sum += left · right with left 16×16, right 16×8; fragments as in PTX ISA, "mma.m16n8k16".
NEMO_EXT_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                                  uint32_t right1, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}
NEMO_EXT_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                                  uint32_t right1, Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}
// The same with left 16×8, right 8×8 in tf32 (float32 bits whose low 13 are ignored); "mma.m16n8k8".
NEMO_EXT_DEVICE void multiply_add_tf32(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                                       uint32_t right1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

NEMO_EXT_DEVICE float as_float(uint32_t bits) {
  return __uint_as_float(bits);
}
NEMO_EXT_DEVICE uint32_t as_bits(float value) {
  return __float_as_uint(value);
}

NEMO_EXT_DEVICE float to_float(float value) {
  return value;
}
NEMO_EXT_DEVICE float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
NEMO_EXT_DEVICE float to_float(Float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
// Rounds to nearest, ties to even.
NEMO_EXT_DEVICE void from_float(float& target, float value) {
  target = value;
}
NEMO_EXT_DEVICE void from_float(BFloat16& target, float value) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(target.bits) : "f"(value));
}
NEMO_EXT_DEVICE void from_float(Float16& target, float value) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target.bits) : "f"(value));
}
NEMO_EXT_DEVICE int count_bits(uint32_t bits) {
  return __popc(bits);
}
NEMO_EXT_DEVICE bool is_finite(float value) {
  return isfinite(value);
}
NEMO_EXT_DEVICE float absolute(float value) {
  return fabsf(value);
}

}  // namespace nemo_ext::cuda

#else
#include "csrc/emulation/primitives.h"
#endif

namespace nemo_ext::cuda {

// The compiler moves no load or store past it.
NEMO_EXT_DEVICE void keep_order() {
  asm volatile("" ::: "memory");
}

}  // namespace nemo_ext::cuda
