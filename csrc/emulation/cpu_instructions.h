// The instructions of csrc/cpu/vectors.h for any CPU, so that tests execute the variants that this machine
// lacks. They follow the pseudocode of Intel's Software Developer's Manual. vectors.h includes this file if
// NEMO_EXT_EMULATED is defined.

#include <cstring>
#include <stdexcept>
#include <string>

#include <torch/headeronly/util/Half.h>

namespace nemo_ext::emulation {

// Whether the emulated CPU has TDPFP16PS; set by csrc/emulation/cpu.cpp.
extern thread_local bool has_float16_tiles;

// Dot products of bfloat16 treat subnormal operands as zeros, and replace subnormal results by zeros.
inline float flushed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}
inline float multiply_add_flushed(float left, float right, float sum) {
  return flushed(__builtin_fmaf(flushed(left), flushed(right), flushed(sum)));
}

inline float bfloat16_half(float pair, int half) {
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  bits = half ? bits & 0xffff0000 : bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float float16_half(float pair, int half) {
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return c10::detail::fp16_ieee_to_fp32_value(half ? bits >> 16 : bits & 0xffff);
}

}  // namespace nemo_ext::emulation

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

inline void multiply_add(Vector& sum, Vector left, Vector right) {
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] = __builtin_fmaf(left[lane], right[lane], sum[lane]);
}

#if defined(NEMO_EXT_BF16_DOT)
// VDPBF16PS adds the product of the upper halves first.
inline void dot_pairs(Vector& sum, Vector left, Vector right) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int half : {1, 0}) {
      sum[lane] = emulation::multiply_add_flushed(emulation::bfloat16_half(left[lane], half),
                                                  emulation::bfloat16_half(right[lane], half), sum[lane]);
    }
  }
}
// VCVTNEPS2BF16 keeps the upper bits of a NaN, and replaces subnormal numbers by zeros.
inline Halves to_bfloat16(Vector values) {
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = emulation::flushed(values[lane]);
  const Halves quiet = __builtin_convertvector((Bits)values >> 16 | 0x40, Halves);
  const Halves nan = __builtin_convertvector((Bits)(values != values), Halves);
  return (rounded_to_bfloat16(values) & ~nan) | (quiet & nan);
}
#endif

#if defined(NEMO_EXT_TILES)
struct Tile {
  int rows, row_bytes;
  float words[16][16];
};

inline thread_local Tile tiles[8];
inline thread_local bool tiles_are_configured = false;

[[noreturn]] inline void tile_fault(const char* instruction, const std::string& what) {
  throw std::runtime_error(std::string(instruction) + ": " + what);
}

inline Tile& configured(const char* instruction, int index) {
  if (!tiles_are_configured || tiles[index].rows == 0)
    tile_fault(instruction, "tile " + std::to_string(index) + " is not configured");
  return tiles[index];
}

inline void configure_tiles(const TileConfig& config) {
  if (config.palette != 1 || config.start_row != 0) tile_fault("LDTILECFG", "palette must be 1, start row 0");
  for (int i = 0; i < 16; ++i) {
    const bool used = i < 8;
    if (config.row_bytes[i] > (used ? 64 : 0) || config.rows[i] > (used ? 16 : 0) || config.row_bytes[i] % 4)
      tile_fault("LDTILECFG", "tile " + std::to_string(i) + " is too large, or its rows are no whole words");
    if (used) tiles[i] = Tile{config.rows[i], config.row_bytes[i], {}};
  }
  tiles_are_configured = true;
}
inline void release_tiles() {
  tiles_are_configured = false;
}

template <int Index>
inline void zero_tile() {
  std::memset(configured("TILEZERO", Index).words, 0, sizeof tiles[Index].words);
}
template <int Index>
inline void load_tile(const void* rows, int64_t stride_bytes) {
  Tile& tile = configured("TILELOADD", Index);
  std::memset(tile.words, 0, sizeof tile.words);
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(tile.words[row], static_cast<const char*>(rows) + row * stride_bytes, tile.row_bytes);
}
template <int Index>
inline void store_tile(void* rows, int64_t stride_bytes) {
  const Tile& tile = configured("TILESTORED", Index);
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(static_cast<char*>(rows) + row * stride_bytes, tile.words[row], tile.row_bytes);
}

// TDPBF16PS and TDPFP16PS sum the products of the lower halves and those of the upper halves separately, from
// 0. Then they add the two sums, and the result to the tile.
template <int Sum, int Left, int Right>
inline void dot_tiles(const char* instruction, float (*half_of)(float, int)) {
  Tile& sum = configured(instruction, Sum);
  const Tile& left = configured(instruction, Left);
  const Tile& right = configured(instruction, Right);
  if (sum.rows != left.rows || sum.row_bytes != right.row_bytes || left.row_bytes != 4 * right.rows)
    tile_fault(instruction, "sizes of the tiles do not match");
  for (int row = 0; row < sum.rows; ++row) {
    for (int column = 0; column < sum.row_bytes / 4; ++column) {
      float parts[2] = {0, 0};
      for (int k = 0; k < right.rows; ++k) {
        for (int half = 0; half < 2; ++half) {
          parts[half] = emulation::multiply_add_flushed(half_of(left.words[row][k], half),
                                                        half_of(right.words[k][column], half), parts[half]);
        }
      }
      sum.words[row][column] = emulation::flushed(emulation::flushed(sum.words[row][column]) +
                                                  emulation::flushed(parts[0] + parts[1]));
    }
  }
}
template <int Sum, int Left, int Right>
inline void dot_tiles_bfloat16() {
  dot_tiles<Sum, Left, Right>("TDPBF16PS", emulation::bfloat16_half);
}
template <int Sum, int Left, int Right>
inline void dot_tiles_float16() {
  dot_tiles<Sum, Left, Right>("TDPFP16PS", emulation::float16_half);
}
inline bool has_float16_tiles() {
  return emulation::has_float16_tiles;
}
#endif

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
