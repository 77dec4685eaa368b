// Vectors of one variant, conversions of their elements, and the instructions that need more than the
// compiler's vector arithmetic. These come from immintrin.h, or in tests from
// csrc/emulation/cpu_instructions.h.
//
// A translation unit sets its target and defines these macros before it includes this file (by kernels.h):
//   NEMO_EXT_VARIANT   the namespace of the variant, which keeps the linker from merging functions of two
//   NEMO_EXT_LANES     number of floats in a vector: 4, 8 or 16
//   NEMO_EXT_F16C      if defined, the CPU converts float16
//   NEMO_EXT_BF16_DOT  if defined, the CPU has a dot product of bfloat16 pairs
//   NEMO_EXT_TILES     if defined, the CPU has AMX tiles
// The kernels call no function of the standard library: its inline functions would be compiled for the target
// too, and the linker could then use them on a CPU that lacks the target's instructions.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

constexpr int kLanes = NEMO_EXT_LANES;

typedef float Vector __attribute__((vector_size(4 * NEMO_EXT_LANES)));
typedef float UnalignedVector __attribute__((vector_size(4 * NEMO_EXT_LANES), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * NEMO_EXT_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * NEMO_EXT_LANES)));
typedef Halves UnalignedHalves __attribute__((aligned(2)));

inline Vector load(const float* source) {
  return *reinterpret_cast<const UnalignedVector*>(source);
}
inline void store(float* target, Vector vector) {
  *reinterpret_cast<UnalignedVector*>(target) = vector;
}
inline void store(uint16_t* target, Halves halves) {
  *reinterpret_cast<UnalignedHalves*>(target) = halves;
}

// Written without arithmetic, because arithmetic on a word that holds a pair could change its bits: it would
// quiet a signaling NaN.
inline Vector broadcast(float word) {
#if NEMO_EXT_LANES == 16
  return Vector{word, word, word, word, word, word, word, word,
                word, word, word, word, word, word, word, word};
#elif NEMO_EXT_LANES == 8
  return Vector{word, word, word, word, word, word, word, word};
#else
  return Vector{word, word, word, word};
#endif
}

inline float to_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest even. A NaN stays a NaN.
inline Halves rounded_to_bfloat16(Vector values) {
  const Bits bits = (Bits)values;
  const Bits nan = (Bits)(values != values);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
}

#if !defined(NEMO_EXT_BF16_DOT)
inline Halves to_bfloat16(Vector values) {
  return rounded_to_bfloat16(values);
}
#endif

#if !defined(NEMO_EXT_F16C) || defined(NEMO_EXT_EMULATED)
inline float half_to_float(uint16_t half) {
  return c10::detail::fp16_ieee_to_fp32_value(half);
}
inline void eight_halves_to_floats(const uint16_t* halves, float* target) {
  for (int i = 0; i < 8; ++i) target[i] = half_to_float(halves[i]);
}
inline Halves to_halves(Vector values) {
  Halves halves;
  for (int lane = 0; lane < kLanes; ++lane)
    halves[lane] = c10::detail::fp16_ieee_from_fp32_value(values[lane]);
  return halves;
}
#endif

#if defined(NEMO_EXT_TILES)
// Sizes of the eight tiles in the layout that LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);
#endif

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT

#if defined(NEMO_EXT_EMULATED)
#include "csrc/emulation/cpu_instructions.h"
#else

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

// The compiler contracts this to one fused multiply-add if the target has it.
inline void multiply_add(Vector& sum, Vector left, Vector right) {
  sum += left * right;
}

#if defined(NEMO_EXT_BF16_DOT)
inline void dot_pairs(Vector& sum, Vector left, Vector right) {
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
inline Halves to_bfloat16(Vector values) {
  return (Halves)_mm512_cvtneps_pbh((__m512)values);
}
#endif

#if defined(NEMO_EXT_F16C)
inline float half_to_float(uint16_t half) {
  return _cvtsh_ss(half);
}
inline void eight_halves_to_floats(const uint16_t* halves, float* target) {
  _mm256_storeu_ps(target, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))));
}
inline Halves to_halves(Vector values) {
#if NEMO_EXT_LANES == 16
  // The masked form avoids a warning of g++ 12 about an uninitialized value in its own header.
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)values, _MM_FROUND_TO_NEAREST_INT);
#else
  return (Halves)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
#endif
}
#endif

#if defined(NEMO_EXT_TILES)
inline void configure_tiles(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}
inline void release_tiles() {
  asm volatile("tilerelease");
}
template <int Tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
template <int Tile>
inline void load_tile(const void* rows, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void store_tile(void* rows, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Sum, int Left, int Right>
inline void dot_tiles_bfloat16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Left), "i"(Right));
}
// TDPFP16PS is encoded by its bytes (VEX.128.F2.0F38.W0 5C), because common assemblers do not know it yet.
template <int Sum, int Left, int Right>
inline void dot_tiles_float16() {
  asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1"
               :
               : "i"(0x03 | (~Right & 15) << 3), "i"(0xc0 | Sum << 3 | Left));
}
inline bool has_float16_tiles() {
  return has_amx_fp16();
}
#endif

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
#endif
