// Which part of the projection each warp computes: its neurons, and one token tile after another.
#pragma once

#include <cstdint>

#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.h"

namespace nemo_ext::cuda {

// Where a thread's warp stands in the grid of warps of its block.
template <typename Tile>
struct WarpPosition {
  int lane;
  int row;           // the warps of a row share a token tile
  int block_neuron;  // the first neuron of the warp, counted from the first of the block
  int neuron;        // the same neuron, counted from the first of the layer

  NEMO_EXT_DEVICE explicit WarpPosition(int first_neuron)
      : lane(thread_index() % kWarpSize),
        row(thread_index() / kWarpSize / Tile::kWarpColumns),
        block_neuron(thread_index() / kWarpSize % Tile::kWarpColumns * Tile::kWarpNeurons),
        neuron(first_neuron + block_neuron) {}
};

// Tokens [first_token, first_token + tokens) of one prompt, at most kTileTokens. In the last round some warps
// may find nothing left to do: `tokens` is -1 for them.
struct TokenTile {
  int prompt, first_token, tokens;
};

// The nested loops of a block, outermost first. The loader is a few steps ahead of the main loop in them.
struct Loops {
  int rounds;  // each round takes the next prompts, or the next token tiles if these are independent
  int tiles;   // token tiles of a prompt if the call reduces over tokens, else 1
  int steps;   // steps of the main loop, of kStepFeatures features each
};

template <typename Tile>
NEMO_EXT_DEVICE Loops loops_of(const Projection& p) {
  const int tiles = static_cast<int>(ceil_divide(p.tokens, Tile::kTileTokens));
  const int units = static_cast<int>(p.batch) * (p.reduces_over_tokens() ? 1 : tiles);
  const int steps = static_cast<int>(ceil_divide(p.in_features, Tile::kStepFeatures));
  return {(ceil_divide(units, Tile::kWarpRows) - block_index_y() - 1) / grid_size_y() + 1,
          p.reduces_over_tokens() && tiles > 0 ? tiles : 1,
          // Without any feature the result is the bias: one step of zeros.
          steps > 0 ? steps : 1};
}

// The token tile of a row of warps in one round. Tiles are counted in 32 bits, because a division in 64 bits
// is a function call; the launch code refuses calls with more tiles.
template <typename Tile>
NEMO_EXT_DEVICE TokenTile token_tile_of(const Projection& p, int round, int warp_row, int tile) {
  const int index = (round * grid_size_y() + block_index_y()) * Tile::kWarpRows + warp_row;
  int prompt = index;
  if (!p.reduces_over_tokens()) {
    const int tiles = static_cast<int>(ceil_divide(p.tokens, Tile::kTileTokens));
    prompt = index / tiles;
    tile = index % tiles;
  }
  TokenTile found{prompt, tile * Tile::kTileTokens, -1};
  if (prompt < p.batch) {
    const int64_t left = p.tokens - found.first_token;
    found.tokens = static_cast<int>(left < Tile::kTileTokens ? left : Tile::kTileTokens);
  }
  return found;
}

}  // namespace nemo_ext::cuda
