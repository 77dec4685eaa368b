// The functions of csrc/cuda/primitives.h for any compiler but nvcc, executed by csrc/emulation/emulator.cpp.
//
// Every access to memory is first checked by the emulator and then made here. This code is inlined into the
// kernel, so that sanitizers instrument it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/emulation/emulator.h"

#define NEMO_EXT_DEVICE inline
#define NEMO_EXT_KERNEL(threads, blocks) inline void

namespace nemo_ext::cuda {

using emulation::Where;

// Copies a T in units of its alignment. For other sizes the compiler emits instructions that ThreadSanitizer
// does not instrument.
template <typename T>
NEMO_EXT_DEVICE void copy_value(void* target, const void* source) {
  for (size_t i = 0; i < sizeof(T); i += alignof(T)) {
    std::memcpy(static_cast<char*>(target) + i, static_cast<const char*>(source) + i, alignof(T));
  }
}

NEMO_EXT_DEVICE int thread_index() {
  return emulation::thread_index();
}
NEMO_EXT_DEVICE int block_index_x() {
  return emulation::block_index_x();
}
NEMO_EXT_DEVICE int block_index_y() {
  return emulation::block_index_y();
}
NEMO_EXT_DEVICE int grid_size_y() {
  return emulation::grid_size_y();
}

NEMO_EXT_DEVICE void sync_threads(Where where = Where::current()) {
  emulation::sync_threads(where);
}
NEMO_EXT_DEVICE void sync_warp(Where where = Where::current()) {
  emulation::sync_warp(where);
}

template <typename T>
NEMO_EXT_DEVICE T shuffle_xor(T value, int mask, Where where = Where::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::shuffle_xor(bits, mask, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
NEMO_EXT_DEVICE T load_global(const T* source, Where where = Where::current()) {
  emulation::check_global("load_global", source, sizeof(T), alignof(T), false, where);
  T value;
  copy_value<T>(&value, source);
  return value;
}
template <typename T>
NEMO_EXT_DEVICE void store_global(T* target, T value, Where where = Where::current()) {
  emulation::check_global("store_global", target, sizeof(T), alignof(T), true, where);
  copy_value<T>(target, &value);
}

template <typename T>
NEMO_EXT_DEVICE T load_shared(uint32_t offset, Where where = Where::current()) {
  T value;
  copy_value<T>(&value, emulation::checked_shared("load_shared", offset, sizeof(T), alignof(T), where));
  return value;
}
template <typename T>
NEMO_EXT_DEVICE void store_shared(uint32_t offset, T value, Where where = Where::current()) {
  copy_value<T>(emulation::checked_shared("store_shared", offset, sizeof(T), alignof(T), where), &value);
}

using SixteenBytes = Vector<uint32_t, 4>;

// The target holds NaN until the copy lands, so that a thread gets NaN if it reads the old content too late
// or the new one too early. The copy lands in copy_async_wait, as late as the hardware may complete it.
NEMO_EXT_DEVICE void copy_async_16(uint32_t offset, const void* source, bool exists,
                                   Where where = Where::current()) {
  unsigned char* target = emulation::checked_shared("copy_async_16", offset, 16, 16, where);
  emulation::check_global("copy_async_16", source, exists ? 16 : 0, 16, false, where);
  emulation::begin_copy({target, exists ? static_cast<const unsigned char*>(source) : nullptr}, where);
  static constexpr SixteenBytes kNotANumber = {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff};
  copy_value<SixteenBytes>(target, &kNotANumber);
}
NEMO_EXT_DEVICE void copy_async_commit() {
  emulation::commit_copies();
}
template <int kPending>
NEMO_EXT_DEVICE void copy_async_wait() {
  emulation::Copy copy;
  while (emulation::land_copy(kPending, copy)) {
    static constexpr SixteenBytes kZeros = {};
    copy_value<SixteenBytes>(copy.target, copy.source ? copy.source : static_cast<const void*>(&kZeros));
  }
}

NEMO_EXT_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t row_offset,
                                   Where where = Where::current()) {
  copy_value<SixteenBytes>(words, emulation::checked_shared("load_matrices", row_offset, 16, 16, where));
  emulation::load_matrices(words, row_offset, where);
}

NEMO_EXT_DEVICE void multiply_add(float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  BFloat16, Where where = Where::current()) {
  emulation::multiply_add(emulation::Product::BFloat16, accumulators, a, b0, b1, where);
}
NEMO_EXT_DEVICE void multiply_add(float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  Float16, Where where = Where::current()) {
  emulation::multiply_add(emulation::Product::Float16, accumulators, a, b0, b1, where);
}
NEMO_EXT_DEVICE void multiply_add_tf32(float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1, Where where = Where::current()) {
  emulation::multiply_add(emulation::Product::Tf32, accumulators, a, b0, b1, where);
}

NEMO_EXT_DEVICE float absolute(float value) {
  return std::fabs(value);
}
NEMO_EXT_DEVICE int count_bits(uint32_t bits) {
  return std::popcount(bits);
}
NEMO_EXT_DEVICE float as_float(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
NEMO_EXT_DEVICE uint32_t as_bits(float value) {
  return std::bit_cast<uint32_t>(value);
}

NEMO_EXT_DEVICE float to_float(float value) {
  return value;
}
NEMO_EXT_DEVICE float to_float(BFloat16 value) {
  return as_float(static_cast<uint32_t>(value.bits) << 16);
}
NEMO_EXT_DEVICE float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  if (magnitude >= 0x0f800000) return as_float(sign | 0x70000000 | magnitude);  // infinities and NaN
  // Replaces the exponent's bias of 15 by 127. The product is exact, also for subnormal numbers.
  return as_float(sign | as_bits(as_float(magnitude) * 0x1p112f));
}
NEMO_EXT_DEVICE void from_float(float& target, float value) {
  target = value;
}
NEMO_EXT_DEVICE void from_float(BFloat16& target, float value) {
  const uint32_t bits = as_bits(value);
  target.bits = std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
NEMO_EXT_DEVICE void from_float(Float16& target, float value) {
  const uint16_t sign = as_bits(value) >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) {
    target.bits = 0x7fff;
  } else if (magnitude < 0x1p-14f) {
    // The result is subnormal, in units of 2^-24. Adding 0.5 rounds to that unit, which is the last bit of
    // 0.5.
    target.bits = sign | static_cast<uint16_t>(as_bits(magnitude + 0.5f) - 0x3f000000);
  } else if (magnitude >= 65520) {
    target.bits = sign | 0x7c00;
  } else {
    const uint32_t bits = as_bits(magnitude) - (112u << 23);
    target.bits = sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1)) >> 13);
  }
}

template <typename Element>
NEMO_EXT_DEVICE void from_floats(Vector<Element, 4>& target, const float (&values)[4]) {
  for (int i = 0; i < 4; ++i) from_float(target.data[i], values[i]);
}

}  // namespace nemo_ext::cuda
