// The kernel of the path `Library`: a library has computed the products, and this kernel finishes them with
// the epilogue of `project`.
#pragma once

#include <cstdint>

#include "csrc/cuda/epilogue.cuh"
#include "csrc/cuda/main_loop.cuh"
#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.h"
#include "csrc/cuda/tiles.cuh"
#include "csrc/cuda/value_projection.cuh"

namespace nemo_ext::cuda {

// Loads the products of a token tile into the places where the main loop would have left them.
template <typename Tile>
NEMO_EXT_DEVICE void load_products(const Projection& p, const TokenTile& tile, const WarpPosition<Tile>& warp,
                                   Accumulators<Tile>& accumulators) {
  using Values = Accumulators<Tile>;
  constexpr int kGroup = Values::kGroupNeurons;
  const bool is_aligned = p.out_features % kGroup == 0;
#pragma unroll
  for (int i = 0; i < Values::kTokens; ++i) {
    const int token = Values::token(warp.lane, i);
    const float* row = p.products + (tile.prompt * p.tokens + tile.first_token + token) * p.out_features;
#pragma unroll
    for (int group = 0; group < Values::kGroups; ++group) {
      const int64_t neuron = warp.neuron + Values::neuron(warp.lane, group);
      Vector<float, kGroup> products{};
      if (token < tile.tokens && is_aligned && neuron < p.out_features) {
        products = load_global(reinterpret_cast<const Vector<float, kGroup>*>(row + neuron));
      } else if (token < tile.tokens) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (neuron + j < p.out_features) products.data[j] = load_global(row + neuron + j);
        }
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) accumulators.value(i, group, j) = products.data[j];
    }
  }
}

// Goes through the token tiles as `project` does.
template <typename Tile>
NEMO_EXT_KERNEL(Tile::kThreads, Tile::kBlocks)
finish(const Projection p) {
  const WarpPosition<Tile> warp(block_index_x() * Tile::kNeurons);
  const Loops loops = loops_of<Tile>(p);
  keep_count(p);
  Accumulators<Tile> accumulators;
  Epilogue<Tile, Accumulators<Tile>> epilogue(p, warp);
  if (p.count_before && p.first_round > 0) epilogue.read_partials();
  for (int round = 0; round < loops.rounds; ++round) {
    for (int index = 0; index < loops.tiles; ++index) {
      const TokenTile tile = token_tile_of<Tile>(p, round, warp.row, index);
      load_products(p, tile, warp, accumulators);
      sync_warp();  // other lanes have cleared the sums to which this tile adds
      epilogue.finish_tile(tile, accumulators);
      if (p.reduces_over_tokens() && index == loops.tiles - 1 && tile.tokens >= 0) {
        epilogue.finish_prompt(tile.prompt, round);
      }
    }
  }
  if (p.count_before) epilogue.write_partials();
}

// The kernel for a tile.
template <typename Tile>
constexpr auto* kernel_of() {
  if constexpr (Tile::kStages == 0) {
    return &finish<Tile>;
  } else {
    return &project<Tile>;
  }
}

}  // namespace nemo_ext::cuda
