// The epilogue alone, for `kernel_limits.epilogue_instructions`: one token tile of the wide tile in bfloat16,
// with statistics, values and a scale, without bias, and with neurons that fill the warps. The accumulators
// come from shared memory, one load each, so that the compiler knows nothing about them.
#include "csrc/cuda/value_projection.cuh"

using namespace nemo_ext::cuda;
using Tile = BlockTile<BFloat16, Shape::Wide>;

__global__ void __launch_bounds__(Tile::kThreads, 1) epilogue(Projection p, TokenTile tile) {
  p.bias = nullptr;
  p.gradient = nullptr;
  p.scale_gradient = nullptr;
#if !defined(MASK)
  p.token_mask = nullptr;
#endif
  __builtin_assume(p.activation && p.values && p.scale);
  p.out_features = p.out_features / 4 * 4;
  const WarpPosition<Tile> warp(block_index_x() * Tile::kNeurons);
  __builtin_assume(warp.neuron + Tile::kWarpNeurons <= static_cast<int>(p.out_features));
  Accumulators<Tile> accumulators;
  uint32_t address = threadIdx.x * 4;
  for (auto& row : accumulators.mma_tiles) {
    for (auto& mma_tile : row) {
      for (float& value : mma_tile) {
        uint32_t bits;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(address));
        value = as_float(bits);
        address += 1024;
      }
    }
  }
  Epilogue<Tile, Accumulators<Tile>>(p, warp).finish_tile(tile, accumulators);
}
