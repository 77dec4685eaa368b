// Everything that a kernel asks of the hardware. nvcc compiles this file to PTX; any other compiler gets
// csrc/emulation/primitives.h instead, which executes the same functions on the CPU. Kernels access memory
// only through these functions, so that the emulation can check every access.
//
// An address in shared memory is a byte offset from the start of the block's dynamic shared memory.
#pragma once

#include <cstdint>

namespace nemo_ext::cuda {

constexpr int kWarpSize = 32;

// Element types as plain bits, so that nvcc and the emulation use the same structs.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Several elements that a lane loads or stores at a time. They are aligned to their total size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T data[kCount];
};

}  // namespace nemo_ext::cuda

#if defined(__CUDACC__)

#define NEMO_EXT_DEVICE __device__ __forceinline__
// The compiler limits registers so that `blocks` blocks of `threads` threads fit on one multiprocessor.
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
// Stores a Vector by one instruction. The compiler splits an assignment into its elements, and does not
// always put them together again.
template <typename T, int kCount>
NEMO_EXT_DEVICE void store_global(Vector<T, kCount>* target, Vector<T, kCount> value) {
  constexpr int kWords = sizeof(value) / 4;
  static_assert(kWords == 2 || kWords == 4);
  uint32_t words[kWords];
  __builtin_memcpy(words, &value, sizeof(value));
  if constexpr (kWords == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};"
                 :
                 : "l"(__cvta_generic_to_global(target)), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(target)), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                   "r"(words[3])
                 : "memory");
  }
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

// Copies 16 bytes asynchronously, or writes 16 zeros, without reading the source, if it does not exist. Both
// addresses are multiples of 16. The copy has landed after the wait for its group at the latest.
NEMO_EXT_DEVICE void copy_async_16(uint32_t offset, const void* source, bool exists) {
  asm volatile(
      "{ .reg .pred ignored; setp.eq.u32 ignored, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, ignored; }"
      :
      : "r"(shared_address(offset)), "l"(__cvta_generic_to_global(source)), "r"(static_cast<uint32_t>(exists))
      : "memory");
}
// Makes a group of the copies that this thread has begun since the last call.
NEMO_EXT_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the latest kPending of this thread's groups are still pending.
template <int kPending>
NEMO_EXT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four matrices of 8 rows of 16 bytes, which hold 8 words of 16 bits or 4 of 32 bits. Lane l passes the
// address of row l % 8 of matrix l / 8, and receives 4 bytes of each matrix: the (l % 4)-th of row l / 4. See
// PTX ISA, "ldmatrix".
NEMO_EXT_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t row_offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row_offset))
               : "memory");
}

// accumulators += A · B, with A of 16 × 16 elements and B of 16 × 8. PTX ISA describes the fragments under
// "mma.m16n8k16".
NEMO_EXT_DEVICE void multiply_add(float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(accumulators[0]), "+f"(accumulators[1]), "+f"(accumulators[2]), "+f"(accumulators[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
NEMO_EXT_DEVICE void multiply_add(float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(accumulators[0]), "+f"(accumulators[1]), "+f"(accumulators[2]), "+f"(accumulators[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with A of 16 × 8 and B of 8 × 8 elements in tf32, which is float32 without its low 13 bits: mma
// ignores them. See "mma.m16n8k8".
NEMO_EXT_DEVICE void multiply_add_tf32(float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(accumulators[0]), "+f"(accumulators[1]), "+f"(accumulators[2]), "+f"(accumulators[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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
// from_float rounds to the nearest number, and ties to the even one.
NEMO_EXT_DEVICE void from_float(float& target, float value) {
  target = value;
}
NEMO_EXT_DEVICE void from_float(BFloat16& target, float value) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(target.bits) : "f"(value));
}
NEMO_EXT_DEVICE void from_float(Float16& target, float value) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target.bits) : "f"(value));
}
// Rounds four numbers as from_float does, two by one instruction.
NEMO_EXT_DEVICE void from_floats(Vector<float, 4>& target, const float (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) target.data[i] = values[i];
}
NEMO_EXT_DEVICE void from_floats(Vector<BFloat16, 4>& target, const float (&values)[4]) {
  uint32_t words[2];
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[0]) : "f"(values[1]), "f"(values[0]));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[1]) : "f"(values[3]), "f"(values[2]));
  __builtin_memcpy(&target, words, sizeof(target));
}
NEMO_EXT_DEVICE void from_floats(Vector<Float16, 4>& target, const float (&values)[4]) {
  uint32_t words[2];
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[0]) : "f"(values[1]), "f"(values[0]));
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[1]) : "f"(values[3]), "f"(values[2]));
  __builtin_memcpy(&target, words, sizeof(target));
}
NEMO_EXT_DEVICE int count_bits(uint32_t bits) {
  return __popc(bits);
}
NEMO_EXT_DEVICE float absolute(float value) {
  return fabsf(value);
}

}  // namespace nemo_ext::cuda

#else
#include "csrc/emulation/primitives.h"
#endif

namespace nemo_ext::cuda {

// The bits that some lane of the warp has. All lanes must call it together.
NEMO_EXT_DEVICE int or_over_lanes(int bits) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) bits |= shuffle_xor(bits, mask);
  return bits;
}

// Keeps the compiler from moving loads and stores past this point.
NEMO_EXT_DEVICE void keep_order() {
  asm volatile("" ::: "memory");
}

}  // namespace nemo_ext::cuda
