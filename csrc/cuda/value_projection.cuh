// The kernel of the value projection, put together from loader, main loop and epilogue. This is device code
// only: nvcc compiles it for GPUs, and any C++ compiler against csrc/emulation.
//
// A persistent grid: every block goes through several token tiles (tiles.cuh). For each one the main loop
// runs over in_features, on kStages stages of shared memory that asynchronous copies fill ahead of it, and
// the epilogue finishes the accumulators in registers.
//
// Every value is one sum over in_features whose order depends on nothing else, and a prompt's activation is
// one sum over its tokens. Both are therefore bit-identical for every batch, tile and grid.
#pragma once

#include "csrc/cuda/epilogue.cuh"
#include "csrc/cuda/loader.cuh"
#include "csrc/cuda/main_loop.cuh"
#include "csrc/cuda/merge.cuh"
#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.h"
#include "csrc/cuda/tiles.cuh"

namespace nemo_ext::cuda {

template <typename Tile>
NEMO_EXT_KERNEL(Tile::kThreads, Tile::kBlocks)
project(const Projection p) {
  const int first_neuron = block_index_x() * Tile::kNeurons;
  const WarpPosition<Tile> warp(first_neuron);
  const Loops loops = loops_of<Tile>(p);
  Loader<Tile> loader(p, loops, first_neuron);
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) loader.load_next(stage);

  keep_count(p);

  int stage = 0;
  Accumulators<Tile> accumulators;
  Epilogue<Tile, Accumulators<Tile>> epilogue(p, warp);
  for (int round = 0; round < loops.rounds; ++round) {
    for (int index = 0; index < loops.tiles; ++index) {
      accumulators.clear();
      for (int step = 0; step < loops.steps; ++step) {
        copy_async_wait<Tile::kStages - 2>();
        // Now the copies of all threads into this stage have landed, and no thread still reads the stage that
        // is filled next.
        sync_threads();
        loader.load_next((stage + Tile::kStages - 1) % Tile::kStages);
        multiply<Tile>(stage, warp, accumulators);
        stage = (stage + 1) % Tile::kStages;
      }
      const TokenTile tile = token_tile_of<Tile>(p, round, warp.row, index);
      epilogue.finish_tile(tile, accumulators);
      if (p.reduces_over_tokens() && index == loops.tiles - 1 && tile.tokens >= 0) {
        epilogue.finish_prompt(tile.prompt, round);
      }
    }
  }
  if (p.count_before) epilogue.write_partials();
}

}  // namespace nemo_ext::cuda
