// The main loop's arithmetic: fragments from shared memory, products on the tensor cores, and the
// accumulators, which the epilogue receives as values of (token, neuron).
#pragma once

#include <cstdint>

#include "csrc/cuda/loader.cuh"
#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.h"
#include "csrc/cuda/tiles.cuh"

namespace nemo_ext::cuda {

// An mma tile has 16 tokens and 8 neurons. A token tile has kMmaRows of them below each other.
constexpr int kMmaTokens = 16;

// The accumulators of one warp: kTileTokens × kWarpNeurons values, divided among 32 lanes. Each lane holds
// kTokens tokens for each of kGroups groups of kGroupNeurons adjacent neurons. The functions `token` and
// `neuron` say which ones, so that an epilogue does not depend on the layout.
//
// mma gives a lane columns 2q and 2q + 1 of every mma tile. So that the lane's columns of two mma tiles are
// four adjacent neurons, column c of tile 2g + h holds neuron 16 · g + 4 · (c / 2) + 2 · h + c % 2 of the
// warp: `multiply` reads the rows of weight in this order.
template <typename Tile>
class Accumulators {
 public:
  static constexpr int kMmaRows = Tile::kTileTokens / kMmaTokens;
  static constexpr int kTokens = 2 * kMmaRows;  // each lane has two of the 16 rows of an mma tile
  static constexpr int kGroupNeurons = 4;
  static constexpr int kGroups = Tile::kWarpNeurons / 16;

  NEMO_EXT_DEVICE void clear() {
#pragma unroll
    for (auto& row : mma_tiles) {
#pragma unroll
      for (auto& tile : row) {
#pragma unroll
        for (float& value : tile) value = 0;
      }
    }
  }

  // The lane's i-th token, counted from the first of the token tile. Successive ones are kTokenStride apart.
  static constexpr int kTokenStride = 8;
  static NEMO_EXT_DEVICE int token(int lane, int i) { return kTokenStride * i + lane / 4; }

  // The first neuron of a group, counted from the first of the warp. Successive groups are kGroupStride
  // apart.
  static constexpr int kGroupStride = 16;
  static NEMO_EXT_DEVICE int neuron(int lane, int group) { return kGroupStride * group + lane % 4 * 4; }

  // The value of the i-th token and the j-th neuron of a group.
  NEMO_EXT_DEVICE float& value(int i, int group, int j) {
    return mma_tiles[i / 2][2 * group + j / 2][i % 2 * 2 + j % 2];
  }

  // Adds up the numbers of the eight lanes that hold the same neurons; together they hold every token of the
  // tile. All eight receive the sum. `is_first_of_neurons` is true for one of them.
  template <typename Number>
  static NEMO_EXT_DEVICE Number sum_over_lanes(Number number) {
#pragma unroll
    for (int mask = 4; mask < kWarpSize; mask *= 2) number += shuffle_xor(number, mask);
    return number;
  }
  static NEMO_EXT_DEVICE bool is_first_of_neurons(int lane) { return lane < 4; }

  // Four accumulators of each mma tile, as PTX ISA lays them out under "mma.m16n8k16".
  float mma_tiles[kMmaRows][2 * kGroups][4];
};

// A float32 as the sum of two tf32 numbers, of which mma ignores the low 13 bits. `high` is the nearest tf32.
// What mma ignores of `low` is less than 2⁻²² of the number. The low part of a NaN is NaN, whatever `high`
// is.
struct Tf32Pair {
  uint32_t high, low;
};

NEMO_EXT_DEVICE Tf32Pair split(uint32_t bits) {
  const uint32_t high = (bits + 0x1000u) & 0xffffe000u;
  return {high, as_bits(as_float(bits) - as_float(high))};
}

// A warp's fragments of weight (operand B of mma) for 32 bytes of in_features. Each group has two mma tiles,
// with two registers for each.
template <typename T, int kGroups>
struct WeightFragments {
  uint32_t words[kGroups][4];

  NEMO_EXT_DEVICE void load(int group, uint32_t row) { load_matrices(words[group], row); }

  // Multiplies the fragment of 16 tokens of hidden (operand A) by all of them.
  NEMO_EXT_DEVICE void multiply(const uint32_t (&hidden)[4], float (&accumulators)[2 * kGroups][4]) const {
#pragma unroll
    for (int tile = 0; tile < 2 * kGroups; ++tile) {
      multiply_add(accumulators[tile], hidden, words[tile / 2][tile % 2 * 2],
                   words[tile / 2][tile % 2 * 2 + 1], T{});
    }
  }
};

// For float32, three products of tf32 make one. Tensor cores round a sum towards zero, an error that would
// grow with the number of steps. They therefore add up the products of one step only, and ordinary float32
// additions do the rest: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
// surpassing the FP32 theoretical peak performance", 2022.
template <int kGroups>
struct WeightFragments<float, kGroups> {
  Tf32Pair words[kGroups][4];

  NEMO_EXT_DEVICE void load(int group, uint32_t row) {
    uint32_t bits[4];
    load_matrices(bits, row);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[group][i] = split(bits[i]);
  }

  NEMO_EXT_DEVICE void multiply(const uint32_t (&hidden)[4], float (&accumulators)[2 * kGroups][4]) const {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Tf32Pair word = split(hidden[i]);
      high[i] = word.high;
      low[i] = word.low;
    }
    // Each loop runs over all mma tiles, so that no product waits for the one before it.
    float step[2 * kGroups][4] = {};
#pragma unroll
    for (int tile = 0; tile < 2 * kGroups; ++tile) {
      multiply_add_tf32(step[tile], low, first(tile).high, second(tile).high);
    }
#pragma unroll
    for (int tile = 0; tile < 2 * kGroups; ++tile) {
      multiply_add_tf32(step[tile], high, first(tile).low, second(tile).low);
    }
#pragma unroll
    for (int tile = 0; tile < 2 * kGroups; ++tile) {
      multiply_add_tf32(step[tile], high, first(tile).high, second(tile).high);
#pragma unroll
      for (int i = 0; i < 4; ++i) accumulators[tile][i] += step[tile][i];
    }
  }

 private:
  // The two registers of an mma tile's fragment.
  NEMO_EXT_DEVICE const Tf32Pair& first(int tile) const { return words[tile / 2][tile % 2 * 2]; }
  NEMO_EXT_DEVICE const Tf32Pair& second(int tile) const { return words[tile / 2][tile % 2 * 2 + 1]; }
};

// One step of the main loop: adds the products of one stage to the accumulators of a warp.
template <typename Tile>
NEMO_EXT_DEVICE void multiply(int stage, const WarpPosition<Tile>& warp, Accumulators<Tile>& accumulators) {
  constexpr int kGroups = Accumulators<Tile>::kGroups;
  const int lane = thread_index() % kWarpSize;
  const uint32_t hidden = stage * Tile::kStageBytes;
  const uint32_t weight = hidden + Tile::kTokens * Tile::kStepBytes;
  // ldmatrix loads four matrices of eight rows and one chunk; lane l names row l % 8 of matrix l / 8. Of
  // hidden these are the upper and the lower eight rows in the left chunk, then in the right chunk. Of weight
  // they are the left and the right chunk of one mma tile, then of the other.
  constexpr int kMmaTileBytes = kMmaTokens * Tile::kStepBytes;  // the swizzle repeats after 16 rows
  const int hidden_row = warp.row * Tile::kTileTokens + lane % 16;
  const int weight_row = warp.block_neuron + lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
  // For float32 the unrolled loop would need more registers than there are.
#pragma unroll(sizeof(typename Tile::Element) == 2 ? 2 : 1)
  for (int chunk = 0; chunk < Tile::kStepBytes / kChunkBytes; chunk += 2) {
    WeightFragments<typename Tile::Element, kGroups> weights;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      weights.load(group, weight + weight_chunk<Tile::kStepBytes>(weight_row, chunk + lane / 8 % 2) +
                              group * kMmaTileBytes);
    }
#pragma unroll
    for (int row = 0; row < Accumulators<Tile>::kMmaRows; ++row) {
      uint32_t tokens[4];
      load_matrices(tokens, hidden + hidden_chunk<Tile::kStepBytes>(hidden_row, chunk + lane / 16) +
                                row * kMmaTileBytes);
      weights.multiply(tokens, accumulators.mma_tiles[row]);
    }
  }
}

}  // namespace nemo_ext::cuda
