// How one call is divided into blocks and warps. The kernels, the launch code and the emulation read this
// file; it needs neither torch nor the CUDA runtime.
#pragma once

#include <cstdint>

#include "csrc/cuda/primitives.h"
#include "csrc/math.h"
#include "csrc/projection.h"

namespace nemo_ext::cuda {

// A call, with the workspace of its running statistics. All these pointers are null if the call updates none.
struct Projection : nemo_ext::Projection {
  // [], the running count. The kernel `merge` changes it while other blocks of it still need the value from
  // before the call, which is why `project` copies it to `count_before`.
  const double* count = nullptr;
  double* count_before = nullptr;  // []
  int* refused = nullptr;  // [], the launch code clears it; 1 if an activation cannot enter the statistics
  // [Plan::partials, out_features], Welford's mean and m2 over the prompts of one row of warps.
  float* partial_mean = nullptr;
  float* partial_m2 = nullptr;

  NEMO_EXT_HOST_DEVICE bool reduces_over_tokens() const { return activation || scale_gradient; }
};

// Arguments of the second kernel, which merges the partials of a Projection into the running statistics.
struct Merge {
  int64_t batch, out_features, partials;
  const float* partial_mean;
  const float* partial_m2;
  const int* refused;
  const double* count_before;
  double* count;
  double* mean;
  double* m2;
};

// A token tile is up to 80 tokens of one prompt, and one warp computes all of them. 80 rows are five mma
// tiles of 16 rows, enough for the 77 tokens of a CLIP text; longer texts have several token tiles. Because
// no two warps share a token, the sum over the tokens of a tile is a reduction inside one warp.
constexpr int kTileTokens = 80;

enum class Shape {
  Wide,     // 320 tokens: the least traffic from the L2 cache
  Medium,   // 160 tokens: twice the blocks, for calls in which Wide would leave multiprocessors idle
  Narrow,   // 80 tokens: more blocks still
  Strided,  // as Narrow, but loads single elements: any strides, any alignment, any in_features
};

// What a block computes at a time. docs/kernels.md derives the sizes.
template <typename T, Shape kShape>
struct BlockTile {
  using Element = T;
  static constexpr bool kAligned = kShape != Shape::Strided;
  static constexpr bool kLarge = kShape == Shape::Wide || kShape == Shape::Medium;

  // The warps of a block form a grid: a row of warps shares a token tile, a column shares neurons.
  static constexpr int kWarpRows = kShape == Shape::Wide ? 4 : kShape == Shape::Medium ? 2 : 1;
  static constexpr int kWarpColumns = kLarge ? 2 : 4;
  static constexpr int kWarpNeurons = kLarge ? (sizeof(T) == 2 ? 64 : 32) : 16;

  static constexpr int kThreads = kWarpSize * kWarpRows * kWarpColumns;
  static constexpr int kTokens = kWarpRows * kTileTokens;
  static constexpr int kNeurons = kWarpColumns * kWarpNeurons;

  // Blocks that shall be resident on one multiprocessor: the compiler's register budget follows from it.
  static constexpr int kBlocks = kShape == Shape::Wide ? 1 : kShape == Shape::Medium ? 2 : 3;

  // A stage holds the operands of one step of the main loop: kStepBytes of in_features for every token and
  // every neuron of the tile.
  static constexpr int kStepBytes = 64;
  static constexpr int kStepFeatures = kStepBytes / sizeof(T);
  static constexpr int kStages = kShape == Shape::Wide ? 3 : 4;
  static constexpr int kStageBytes = (kTokens + kNeurons) * kStepBytes;

  // Three float32 arrays [kWarpRows, kNeurons] follow the stages in shared memory: the sum over tokens, and
  // the running mean and m2 of the activation.
  static constexpr int kArrayBytes = kWarpRows * kNeurons * 4;
  static constexpr int kSums = kStages * kStageBytes;
  static constexpr int kMeans = kSums + kArrayBytes;
  static constexpr int kM2s = kMeans + kArrayBytes;
  static constexpr int kSharedBytes = kM2s + kArrayBytes;
};

// The time that a tile takes for one value, in percent of Wide's. The numbers follow from the bounds that
// docs/kernels.md derives for 16-bit elements on an A100. For 32 bytes of in_features, one block needs:
//
//             tensor cores   shared memory   L2 cache
//   Wide        640 clocks      400 clocks   14,336 bytes   for 320 × 128 values
//   Medium      320 clocks      216 clocks    9,216 bytes   for 160 × 128 values
//   Narrow       80 clocks      132 clocks    4,608 bytes   for  80 ×  64 values
//
// The tensor cores need 1/64 clock for a value in every tile, and they are the bound of Wide and of Medium.
// Narrow is bound by shared memory, which takes 132 / 80 of that time. Medium would cost the same as Wide,
// but it loads 29 % more bytes from the L2 cache for a value. kMediumMargin stands for their cost: Medium
// must promise a tenth less time before it replaces Wide. The margin is a choice, it has not been measured.
// float32 uses the same numbers, and Strided, which is never compared with another shape, uses Narrow's.
constexpr int kMediumMargin = 10;
constexpr int cost_per_value(Shape shape) {
  return shape == Shape::Wide ? 100 : shape == Shape::Medium ? 100 + kMediumMargin : 100 * 132 / 80;
}

// Calls function(BlockTile<…>) with the tile of the element and shape.
template <typename Function>
auto with_block_tile(Element element, Shape shape, Function&& function) {
  const auto with_element = [&]<typename T>(T) {
    switch (shape) {
      case Shape::Wide:
        return function(BlockTile<T, Shape::Wide>{});
      case Shape::Medium:
        return function(BlockTile<T, Shape::Medium>{});
      case Shape::Narrow:
        return function(BlockTile<T, Shape::Narrow>{});
      default:
        return function(BlockTile<T, Shape::Strided>{});
    }
  };
  switch (element) {
    case Element::BFloat16:
      return with_element(BFloat16{});
    case Element::Float16:
      return with_element(Float16{});
    default:
      return with_element(float{});
  }
}

// A grid of blocks: grid_x along the neurons, grid_y along the prompts. If the call reduces over tokens, the
// r-th row of warps of block y computes prompt i = y · kWarpRows + r in the first round, prompt i + partials
// in the second, i + 2 · partials in the third, and so on. Otherwise it takes token tiles instead of prompts,
// which are then independent of each other.
struct Plan {
  Shape shape;
  int64_t grid_x;
  int64_t grid_y;    // 0 if there is nothing to compute
  int64_t partials;  // grid_y · kWarpRows: rows of warps in the grid
  int64_t cost;      // time of the busiest multiprocessor; Wide's time for one value is 1
};

// The plan compares grids of 1, 2, … up to this many blocks for each multiprocessor. More blocks spread the
// work more evenly, but every block adds partials that `merge` has to read. More than 8 are rarely worth it:
// of 405,600 calls (1 to 4,096 prompts, 1 to 300 tokens, 1 to 10,240 neurons, 1 to 188 multiprocessors) a
// limit of 64 would lower the cost of 7 %, by 17 % at most.
constexpr int64_t kMostBlocksPerMultiprocessor = 8;

inline Plan plan_of_shape(const Projection& p, Shape shape, int multiprocessors) {
  return with_block_tile(p.element, shape, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t units = p.reduces_over_tokens() ? p.batch : p.batch * ceil_divide(p.tokens, kTileTokens);
    // Without any neuron there is still one block, because the running count must grow.
    const int64_t grid_x = p.out_features > 0 ? ceil_divide(p.out_features, Tile::kNeurons) : 1;
    const int64_t most = ceil_divide(units, Tile::kWarpRows);
    Plan best{shape, grid_x, 0, 0, 0};
    // Among equal costs the smallest grid is kept, because it has the fewest partials.
    for (int64_t blocks = 1; most > 0 && blocks <= kMostBlocksPerMultiprocessor; ++blocks) {
      const int64_t wanted = blocks * multiprocessors / grid_x;
      const int64_t grid_y = wanted < 1 ? 1 : wanted < most ? wanted : most;
      const int64_t rounds = ceil_divide(most, grid_y);
      const int64_t values = int64_t(Tile::kTokens) * Tile::kNeurons;
      const int64_t cost =
          rounds * ceil_divide(grid_x * grid_y, multiprocessors) * values * cost_per_value(shape) / 100;
      if (best.grid_y == 0 || cost < best.cost) {
        best = {shape, grid_x, grid_y, grid_y * Tile::kWarpRows, cost};
      }
    }
    return best;
  });
}

// Whether every row consists of whole, aligned chunks of 16 bytes, as cp.async copies them. The stride of an
// axis of size 1 counts too: the loader forms addresses of rows that do not exist with it, which cp.async
// wants aligned although it reads nothing there.
inline bool is_aligned(const void* data, const int64_t* sizes, const int64_t* strides, int axes,
                       int element_size) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || sizes[axes - 1] * element_size % 16 != 0) return false;
  for (int axis = 0; axis < axes; ++axis) {
    const bool innermost = axis == axes - 1;
    if (innermost ? strides[axis] != 1 : strides[axis] * element_size % 16 != 0) return false;
  }
  return true;
}

inline Plan plan(const Projection& p, int multiprocessors) {
  const int element_size = p.element == Element::Float32 ? 4 : 2;
  const int64_t hidden_sizes[] = {p.batch, p.tokens, p.in_features};
  const int64_t weight_sizes[] = {p.out_features, p.in_features};
  if (!is_aligned(p.hidden, hidden_sizes, p.hidden_strides, 3, element_size) ||
      !is_aligned(p.weight, weight_sizes, p.weight_strides, 2, element_size)) {
    return plan_of_shape(p, Shape::Strided, multiprocessors);
  }
  Plan best = plan_of_shape(p, Shape::Wide, multiprocessors);
  for (const Shape shape : {Shape::Medium, Shape::Narrow}) {
    const Plan other = plan_of_shape(p, shape, multiprocessors);
    if (other.cost < best.cost) best = other;
  }
  return best;
}

}  // namespace nemo_ext::cuda
