// How one call is divided into blocks and warps. The kernels, the launch code and the emulation read this
// file; it needs neither torch nor the CUDA runtime.
#pragma once

#include <cstdint>
#include <type_traits>

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
  // [Plan::partials, out_features], Welford's mean and m2 over the prompts of one row of warps. Both are NaN
  // if an activation cannot enter the statistics.
  float* partial_mean = nullptr;
  float* partial_m2 = nullptr;
  // [Plan::partials, Plan::columns], whether some partial of a warp is NaN: every warp writes its own.
  int* refused = nullptr;
  // [batch, tokens, out_features], hidden weightᵀ, if a library has computed it. The call is then divided
  // into several launches, and `first_round` is how many prompts each row of warps has finished in those
  // before.
  const float* products = nullptr;
  int64_t first_round = 0;

  NEMO_EXT_HOST_DEVICE bool reduces_over_tokens() const { return activation || scale_gradient; }
};

// Arguments of the second kernel, which merges the partials of a Projection into the running statistics.
struct Merge {
  int64_t batch, out_features, partials;
  const float* partial_mean;
  const float* partial_m2;
  int64_t warps;       // Plan::partials · Plan::columns
  const int* refused;  // [warps]
  const double* count_before;
  double* count;
  double* mean;
  double* m2;
};

// A token tile is up to kTileTokens tokens of one prompt, and one warp computes all of them. 80 rows are five
// mma tiles of 16 rows, enough for the 77 tokens of a CLIP text; longer texts have several token tiles.
// Because no two warps share a token, the sum over the tokens of a tile is a reduction inside one warp.
constexpr int kLeastTileTokens = 16;

enum class Shape {
  Wide,     // 320 tokens: the least traffic from the L2 cache
  Medium,   // 160 tokens: twice the blocks, for calls in which Wide would leave multiprocessors idle
  Narrow,   // 80 tokens: more blocks still
  Strided,  // as Narrow, but loads single elements: any strides, any alignment, any in_features
  Loaded,   // as Narrow, for products that a library has computed
  Small,    // 16 tokens: five times the blocks, for small calls that do not reduce over tokens
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

  static constexpr int kTileTokens = kShape == Shape::Small ? kLeastTileTokens : 80;

  static constexpr int kThreads = kWarpSize * kWarpRows * kWarpColumns;
  static constexpr int kTokens = kWarpRows * kTileTokens;
  static constexpr int kNeurons = kWarpColumns * kWarpNeurons;

  // Blocks that shall be resident on one multiprocessor: the compiler's register budget follows from it.
  static constexpr int kBlocks = kShape == Shape::Wide     ? 1
                                 : kShape == Shape::Medium ? 2
                                 : kShape == Shape::Small  ? 4
                                                           : 3;

  // A stage holds the operands of one step of the main loop: kStepBytes of in_features for every token and
  // every neuron of the tile.
  static constexpr int kStepBytes = kShape == Shape::Small ? 128 : 64;
  static constexpr int kStepFeatures = kStepBytes / sizeof(T);
  static constexpr int kStages = kShape == Shape::Wide ? 3 : kShape == Shape::Loaded ? 0 : 4;
  static constexpr int kStageBytes = (kTokens + kNeurons) * kStepBytes;

  // Three float32 arrays [kWarpRows, kNeurons] follow the stages in shared memory: the sum over tokens, and
  // the running mean and m2 of the activation.
  static constexpr int kArrayBytes = kWarpRows * kNeurons * 4;
  static constexpr int kSums = kStages * kStageBytes;
  static constexpr int kMeans = kSums + kArrayBytes;
  static constexpr int kM2s = kMeans + kArrayBytes;
  static constexpr int kSharedBytes = kM2s + kArrayBytes;
};

// What the plan must know of a GPU.
struct Gpu {
  int multiprocessors;
  int shared_bytes;  // of one multiprocessor
  int architecture;  // the compute capability times ten
};

// The blocks that are resident on one multiprocessor at a time. Each takes 1 KiB of shared memory beside its
// own.
template <typename Tile>
constexpr int resident_blocks(const Gpu& gpu) {
  const int fitting = gpu.shared_bytes / (Tile::kSharedBytes + 1024);
  return fitting < 1 ? 1 : fitting < Tile::kBlocks ? fitting : Tile::kBlocks;
}

// The clocks for which one block occupies its multiprocessor: those measured on an H200, as docs/kernels.md
// tells under "Plans". Other GPUs have not been measured.
struct Clocks {
  int step;  // for 64 bytes of in_features, beside other blocks
  int wait;  // more for a step, where no other block runs meanwhile: the barrier, the first fragments, the
             // last products
  int epilogue;  // for the epilogue of a round
};

// Strided, which is never compared with another shape, has Narrow's numbers, and Loaded needs none.
template <typename T, Shape kShape>
constexpr Clocks clocks_of(BlockTile<T, kShape>) {
  constexpr bool is_short = sizeof(T) == 2;
  if (kShape == Shape::Wide) return is_short ? Clocks{850, 700, 10000} : Clocks{2200, 500, 7000};
  if (kShape == Shape::Medium) return is_short ? Clocks{700, 230, 4400} : Clocks{1240, 140, 1350};
  if (kShape == Shape::Small) return is_short ? Clocks{124, 180, 260} : Clocks{180, 274, 1900};
  return is_short ? Clocks{280, 230, 1900} : Clocks{750, 225, 1000};
}

// The clocks of a multiprocessor for one step of each of its blocks, of which `resident` run at a time.
constexpr int64_t multiprocessor_clocks(int64_t blocks, int64_t resident, int64_t step, int64_t wait) {
  const auto together = [&](int64_t count) {
    const int64_t alone = step + wait;
    return count == 0 ? 0 : count * step < alone ? alone : count * step;
  };
  return blocks / resident * together(resident) + together(blocks % resident);
}

// Calls function(BlockTile<T, …>) with the tile of the shape.
template <typename T, typename Function>
auto with_block_tile_of(Shape shape, Function&& function) {
  switch (shape) {
    case Shape::Wide:
      return function(BlockTile<T, Shape::Wide>{});
    case Shape::Medium:
      return function(BlockTile<T, Shape::Medium>{});
    case Shape::Narrow:
      return function(BlockTile<T, Shape::Narrow>{});
    case Shape::Strided:
      return function(BlockTile<T, Shape::Strided>{});
    case Shape::Small:
      return function(BlockTile<T, Shape::Small>{});
    default:
      return function(BlockTile<T, Shape::Loaded>{});
  }
}

// Calls function(BlockTile<…>) with the tile of the element and shape.
template <typename Function>
auto with_block_tile(Element element, Shape shape, Function&& function) {
  switch (element) {
    case Element::BFloat16:
      return with_block_tile_of<BFloat16>(shape, function);
    case Element::Float16:
      return with_block_tile_of<Float16>(shape, function);
    default:
      return with_block_tile_of<float>(shape, function);
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
  int64_t columns;   // the columns of warps that have a neuron
  int64_t prompts;   // of one launch: all, but for Loaded
  int64_t cost;      // clocks of the busiest multiprocessor for all of its work
};

// The plan compares grids of 1, 2, … up to this many blocks for each multiprocessor. More blocks spread the
// work more evenly, but every block adds partials that `merge` has to read.
constexpr int64_t kMostBlocksPerMultiprocessor = 8;

inline Plan plan_of_shape(const Projection& p, Shape shape, const Gpu& gpu) {
  return with_block_tile(p.element, shape, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t units =
        p.reduces_over_tokens() ? p.batch : p.batch * ceil_divide(p.tokens, Tile::kTileTokens);
    // Without any neuron there is still one block, because the running count must grow.
    const int64_t grid_x = p.out_features > 0 ? ceil_divide(p.out_features, Tile::kNeurons) : 1;
    const int64_t most = ceil_divide(units, Tile::kWarpRows);
    const int64_t columns = ceil_divide(p.out_features, Tile::kWarpNeurons);
    Plan best{shape, grid_x, 0, 0, columns, p.batch, 0};
    const int64_t resident = resident_blocks<Tile>(gpu);
    constexpr Clocks kClocks = clocks_of(Tile{});
    constexpr int64_t kWait = kClocks.wait * 64 / Tile::kStepBytes;  // a step of more bytes waits no longer
    const int64_t steps = ceil_divide(p.in_features * int64_t(sizeof(typename Tile::Element)), int64_t(64));
    for (int64_t blocks = 1; most > 0 && blocks <= kMostBlocksPerMultiprocessor; ++blocks) {
      const int64_t wanted = blocks * gpu.multiprocessors / grid_x;
      const int64_t grid_y = wanted < 1 ? 1 : wanted < most ? wanted : most;
      const int64_t busiest = ceil_divide(grid_x * grid_y, gpu.multiprocessors);
      const int64_t round = steps * multiprocessor_clocks(busiest, resident, kClocks.step, kWait) +
                            multiprocessor_clocks(busiest, resident, kClocks.epilogue, 0);
      const int64_t cost = ceil_divide(most, grid_y) * round;
      // Among equal costs, blocks that are resident together are better than one block that does their work
      // in turn, because the epilogue of one runs beside the main loop of another. Further blocks are not:
      // a block that goes on loads ahead, a new one begins with an empty pipeline.
      const bool is_better = cost < best.cost || (cost == best.cost && busiest <= resident);
      if (best.grid_y == 0 || is_better) {
        best = {shape, grid_x, grid_y, grid_y * Tile::kWarpRows, columns, p.batch, cost};
      }
    }
    return best;
  });
}

// The memory that a launch may take for products, in float32, if it has more than one prompt. One launch for
// all prompts is the fastest on an H200, also where its products are larger than the L2 cache
// (docs/kernels.md, "On an H200").
constexpr int64_t kProductBytes = int64_t(256) << 20;

// The plan of a call whose products a library computes.
inline Plan plan_of_library(const Projection& p, const Gpu& gpu, int64_t product_bytes = kProductBytes) {
  using Tile = BlockTile<float, Shape::Loaded>;
  const int64_t grid_x = p.out_features > 0 ? ceil_divide(p.out_features, Tile::kNeurons) : 1;
  const int64_t columns = ceil_divide(p.out_features, Tile::kWarpNeurons);
  if (p.batch == 0) return {Shape::Loaded, grid_x, 0, 0, columns, 0, 0};
  const int64_t prompt_bytes = p.tokens * p.out_features * 4;
  int64_t prompts = prompt_bytes > 0 ? product_bytes / prompt_bytes : p.batch;
  prompts = prompts < 1 ? 1 : prompts < p.batch ? prompts : p.batch;
  const int64_t wanted = int64_t(gpu.multiprocessors) * Tile::kBlocks / grid_x;
  const auto at_most = [&](int64_t units) { return wanted < 1 ? 1 : wanted < units ? wanted : units; };
  // A partial covers every grid_y-th prompt of the call, so that a launch must have a multiple of grid_y.
  // Calls that don't reduce over tokens have the same launches, so that the library computes the same bits.
  const int64_t partials = at_most(prompts);
  prompts = prompts / partials * partials;
  const int64_t tiles = ceil_divide(p.tokens, Tile::kTileTokens);
  const int64_t grid_y = p.reduces_over_tokens() ? partials : at_most(prompts * tiles);
  return {Shape::Loaded, grid_x, grid_y, grid_y, columns, prompts, 0};
}

// The launch for prompts [first, first + count) of a call, whose products are in `products`.
inline Projection launch_of(const Projection& p, const Plan& plan, int64_t first, int64_t count,
                            const float* products) {
  const auto moved = [&](auto* data, int64_t elements) { return data ? data + first * elements : data; };
  const auto moved_bytes = [&](auto* data, int64_t elements) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>, const char, char>;
    return moved(static_cast<Byte*>(data), elements * (p.element == Element::Float32 ? 4 : 2));
  };
  Projection launch = p;
  launch.batch = count;
  launch.products = products;
  launch.first_round = first / plan.partials;
  launch.scale = moved(p.scale, p.scale_batch_stride);
  launch.token_mask = moved(p.token_mask, p.tokens);
  launch.values = moved_bytes(p.values, p.tokens * p.out_features);
  launch.gradient = moved_bytes(p.gradient, p.tokens * p.out_features);
  launch.activation = moved(p.activation, p.out_features);
  launch.scale_gradient = moved(p.scale_gradient, p.out_features);
  return launch;
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

// Whether an operand that is not aligned is copied first: if its rows have whole chunks, so that the copy is
// aligned. Copying reads and writes every element once, in a kernel of its own; Strided reads 3 to 5 times
// the sectors, for every block that needs them. It is left for rows that do not have whole chunks.
inline bool is_better_copied(const void* data, const int64_t* sizes, const int64_t* strides, int axes,
                             int element_size) {
  return sizes[axes - 1] * element_size % 16 == 0 && !is_aligned(data, sizes, strides, axes, element_size);
}

inline Plan plan(const Projection& p, const Gpu& gpu) {
  const int element_size = p.element == Element::Float32 ? 4 : 2;
  const int64_t hidden_sizes[] = {p.batch, p.tokens, p.in_features};
  const int64_t weight_sizes[] = {p.out_features, p.in_features};
  if (!is_aligned(p.hidden, hidden_sizes, p.hidden_strides, 3, element_size) ||
      !is_aligned(p.weight, weight_sizes, p.weight_strides, 2, element_size)) {
    return plan_of_shape(p, Shape::Strided, gpu);
  }
  Plan best = plan_of_shape(p, Shape::Wide, gpu);
  for (const Shape shape : {Shape::Medium, Shape::Narrow, Shape::Small}) {
    // The sum over tokens is one over a tile of 80, whose order Small does not have.
    if (shape == Shape::Small && p.reduces_over_tokens()) continue;
    const Plan other = plan_of_shape(p, shape, gpu);
    if (other.cost < best.cost) best = other;
  }
  return best;
}

}  // namespace nemo_ext::cuda
