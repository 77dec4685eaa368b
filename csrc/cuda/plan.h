// How one call is laid over blocks and threads: read by the kernels, by the launch
// code, and by the emulation. Plain pointers, no torch, no CUDA runtime.
#pragma once

#include <cstdint>

#include "csrc/cuda/primitives.h"
#include "csrc/math.h"
#include "csrc/projection.h"

namespace nemo_ext::cuda {

// A call, and where its running statistics go on their way: null throughout where none are wanted.
struct Projection : nemo_ext::Projection {
  const double* count = nullptr;  // [], the running count
  double* count_before =
      nullptr;                // [], its copy: count changes while other blocks of the merge still need it
  int* not_finite = nullptr;  // [], 0 at first: becomes 1 where an activation is not finite
  // Welford's mean and m2 over the prompts of each slot of each block, [Plan::partials, out_features].
  float* partial_mean = nullptr;
  float* partial_m2 = nullptr;

  NEMO_EXT_HOST_DEVICE bool reduces_over_tokens() const { return activation || scale_gradient; }
};

// The second kernel: the partials of a Projection into the running statistics.
struct Merge {
  int64_t batch, out_features, partials;
  const float* partial_mean;
  const float* partial_m2;
  const int* not_finite;
  const double* count_before;
  double* count;
  double* mean;
  double* m2;
};

// A slot is the 80 rows that one warp owns: the 77 tokens of a CLIP text, or as much of a longer one, in five
// tiles of mma's 16 rows. No prompt is shared by two slots, so that the sum over its tokens never leaves a
// warp.
constexpr int kSlotRows = 80;

enum class Shape {
  Wide,     // 320 rows: the least traffic from the L2 cache
  Medium,   // 160 rows: more blocks, where Wide would leave multiprocessors idle
  Narrow,   // 80 rows: more still
  Strided,  // as Narrow, loading one element at a time: any strides, any alignment, any in_features
};

// What a block computes: docs/kernels.md derives the sizes.
template <typename T, Shape kShape>
struct Tile {
  using Element = T;
  static constexpr bool kAligned = kShape != Shape::Strided;
  static constexpr bool kLarge = kShape == Shape::Wide || kShape == Shape::Medium;
  static constexpr int kSlots = kShape == Shape::Wide ? 4 : kShape == Shape::Medium ? 2 : 1;
  static constexpr int kColumnWarps = kLarge ? 2 : 4;
  static constexpr int kWarpColumns = kLarge ? (sizeof(T) == 2 ? 64 : 32) : 16;
  // On one multiprocessor at a time: what the compiler gives registers for.
  static constexpr int kBlocks = kShape == Shape::Wide ? 1 : kShape == Shape::Medium ? 2 : 3;

  // Time for one output, in percent of what Wide takes: by traffic from the L2 cache, and by shared memory.
  static constexpr int kCost = kShape == Shape::Wide ? 100 : kShape == Shape::Medium ? 110 : 165;

  static constexpr int kThreads = kWarpSize * kSlots * kColumnWarps;
  static constexpr int kRows = kSlots * kSlotRows;
  static constexpr int kColumns = kColumnWarps * kWarpColumns;

  // A stage holds kStepBytes of in_features of every row of hidden and of weight.
  static constexpr int kStepBytes = 64;
  static constexpr int kStepFeatures = kStepBytes / sizeof(T);
  static constexpr int kStages = kShape == Shape::Wide ? 3 : 4;
  static constexpr int kStageBytes = (kRows + kColumns) * kStepBytes;

  // Behind the stages, for every slot and column: the sum over tokens, and the running mean and m2.
  static constexpr int kSlotColumnBytes = kSlots * kColumns * 4;
  static constexpr int kSums = kStages * kStageBytes;
  static constexpr int kMeans = kSums + kSlotColumnBytes;
  static constexpr int kM2s = kMeans + kSlotColumnBytes;
  static constexpr int kSharedBytes = kM2s + kSlotColumnBytes;
};

// Calls function(Tile<…>) of the element and shape.
template <typename Function>
auto with_tile(Element element, Shape shape, Function&& function) {
  const auto with_element = [&]<typename T>(T) {
    switch (shape) {
      case Shape::Wide:
        return function(Tile<T, Shape::Wide>{});
      case Shape::Medium:
        return function(Tile<T, Shape::Medium>{});
      case Shape::Narrow:
        return function(Tile<T, Shape::Narrow>{});
      default:
        return function(Tile<T, Shape::Strided>{});
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

// A grid of column_blocks × groups blocks. A group goes through the prompts (or, where nothing is summed over
// tokens, through the 80-row pieces of prompts) group · slots + slot, + partials, + 2 · partials, …
struct Plan {
  Shape shape;
  int64_t column_blocks;
  int64_t groups;    // 0: there is nothing to compute
  int64_t partials;  // groups · slots
  int64_t cost;      // of the busiest multiprocessor, in the time that a wide tile takes for one output
};

inline Plan plan_of_shape(const Projection& p, Shape shape, int multiprocessors) {
  return with_tile(p.element, shape, [&](auto tile) {
    using T = decltype(tile);
    const int64_t pieces = p.reduces_over_tokens() ? p.batch : p.batch * ceil_divide(p.tokens, kSlotRows);
    // One block more than none: the running count grows even where there is no neuron.
    const int64_t column_blocks = p.out_features > 0 ? ceil_divide(p.out_features, T::kColumns) : 1;
    const int64_t most = ceil_divide(pieces, T::kSlots);
    Plan best{shape, column_blocks, 0, 0, 0};
    // The fewest groups that keep every multiprocessor busy: the more groups, the more partials.
    for (int64_t blocks = 1; most > 0 && blocks <= 8; ++blocks) {
      const int64_t wanted = blocks * multiprocessors / column_blocks;
      const int64_t groups = wanted < 1 ? 1 : wanted < most ? wanted : most;
      const int64_t rounds = ceil_divide(most, groups);
      const int64_t outputs = int64_t(T::kSlots) * kSlotRows * T::kColumns;
      const int64_t cost =
          rounds * ceil_divide(column_blocks * groups, multiprocessors) * outputs * T::kCost / 100;
      if (best.groups == 0 || cost < best.cost)
        best = {shape, column_blocks, groups, groups * T::kSlots, cost};
    }
    return best;
  });
}

// Whether every row consists of whole, aligned pieces of 16 bytes.
inline bool is_aligned(const void* data, const int64_t* sizes, const int64_t* strides, int axes,
                       int element_size) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || sizes[axes - 1] * element_size % 16 != 0) return false;
  for (int axis = 0; axis < axes; ++axis) {
    const bool innermost = axis == axes - 1;
    if (sizes[axis] > 1 && (innermost ? strides[axis] != 1 : strides[axis] * element_size % 16 != 0))
      return false;
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
