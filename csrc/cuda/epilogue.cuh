// The epilogue: what becomes of the accumulators. It adds the bias, reduces over tokens, keeps the statistics
// over prompts, and stores the scaled values.
//
// The epilogue knows accumulators only as values of (token, neuron). It takes any class with the members of
// `Accumulators` in main_loop.cuh that say which ones a lane holds, so that a second main loop whose warps
// hold whole token tiles needs no second epilogue.
#pragma once

#include <cstdint>

#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.h"
#include "csrc/cuda/tiles.cuh"
#include "csrc/math.h"

namespace nemo_ext::cuda {

// Copies the running count to where `merge` finds it.
NEMO_EXT_DEVICE void keep_count(const Projection& p) {
  if (p.count_before && thread_index() == 0 && block_index_x() == 0 && block_index_y() == 0) {
    store_global(p.count_before, load_global(p.count));
  }
}

template <typename Tile, typename Values>
class Epilogue {
 public:
  NEMO_EXT_DEVICE Epilogue(const Projection& p, const WarpPosition<Tile>& warp) : p_(p), warp_(warp) {
    if (p_.reduces_over_tokens()) clear_sums();
  }

  // Finishes the values of one token tile.
  NEMO_EXT_DEVICE void finish_tile(const TokenTile& tile, Values& values) {
    const uint32_t counted = counted_tokens(tile);
    if (p_.bias) add_bias(values);
    if (p_.activation) sum_magnitudes(values, counted);
    if (p_.scale_gradient) sum_products(values, tile);
    if (p_.values) {
      multiply_by_scale(values, tile);
      const bool is_whole = warp_.neuron + Tile::kWarpNeurons <= static_cast<int>(p_.out_features);
      if (is_whole && p_.out_features % kGroup == 0) {
        store_groups(values, tile);
      } else {
        store_elements(values, tile);
      }
    }
    if (p_.activation) counted_of_prompt_ += Values::sum_over_lanes(count_bits(counted));
  }

  // Turns the complete sums of a prompt into results: the gradient of the scale, or the activation, which
  // also enters the running mean and m2 of this row of warps. Each lane takes neurons lane, lane + 32, …, the
  // same ones for every prompt.
  NEMO_EXT_DEVICE void finish_prompt(int prompt, int round) {
    // Other lanes wrote the sums. They add the next ones after a barrier of the main loop.
    sync_warp();
    for (int index = warp_.lane; index < Tile::kWarpNeurons; index += kWarpSize) {
      const int neuron = warp_.neuron + index;
      if (neuron >= p_.out_features) continue;
      const float sum = load_shared<float>(address(Tile::kSums, index));
      if (p_.scale_gradient) {
        store_global(p_.scale_gradient + prompt * p_.out_features + neuron, sum);
        continue;
      }
      const float activation = sum / static_cast<float>(counted_of_prompt_);
      store_global(p_.activation + prompt * p_.out_features + neuron, activation);
      if (p_.count_before) add_to_moments(index, activation, round);
    }
    clear_sums();
    counted_of_prompt_ = 0;
  }

  // Writes mean and m2 of this row of warps for `merge`, which knows from the number of a partial how many
  // prompts it covers, and whether one of them is NaN.
  NEMO_EXT_DEVICE void write_partials() const {
    int refused = 0;
    for_each_partial([&](int index, int64_t place) {
      const float m2 = load_shared<float>(address(Tile::kM2s, index));
      refused |= m2 != m2;
      store_global(p_.partial_mean + place, load_shared<float>(address(Tile::kMeans, index)));
      store_global(p_.partial_m2 + place, m2);
    });
    refused = or_over_lanes(refused);
    const int columns = ceil_divide(static_cast<int>(p_.out_features), Tile::kWarpNeurons);
    const int column = warp_.neuron / Tile::kWarpNeurons;
    if (warp_.lane == 0 && column < columns) store_global(p_.refused + partial() * columns + column, refused);
  }

  // Goes on where the launch before has written its partials.
  NEMO_EXT_DEVICE void read_partials() const {
    for_each_partial([&](int index, int64_t place) {
      store_shared(address(Tile::kMeans, index), load_global(p_.partial_mean + place));
      store_shared(address(Tile::kM2s, index), load_global(p_.partial_m2 + place));
    });
  }

 private:
  using Element = typename Tile::Element;
  static constexpr int kGroup = Values::kGroupNeurons;
  static constexpr int kTokens = Values::kTokens;

  // Sets the sums of a prompt to 0, each lane those that it reads in finish_prompt.
  NEMO_EXT_DEVICE void clear_sums() const {
    for (int index = warp_.lane; index < Tile::kWarpNeurons; index += kWarpSize) {
      store_shared(address(Tile::kSums, index), 0.0f);
    }
  }

  // The first neuron of a group, and how many of its neurons exist.
  NEMO_EXT_DEVICE int first_neuron(int group) const {
    return warp_.neuron + Values::neuron(warp_.lane, group);
  }
  NEMO_EXT_DEVICE int neurons_of(int group) const {
    const int left = static_cast<int>(p_.out_features) - first_neuron(group);
    return left < 0 ? 0 : left < kGroup ? left : kGroup;
  }

  // The place of the lane's first token and first neuron in [batch, tokens, out_features].
  NEMO_EXT_DEVICE int64_t first_place(const TokenTile& tile) const {
    return (tile.prompt * p_.tokens + tile.first_token + Values::token(warp_.lane, 0)) * p_.out_features +
           first_neuron(0);
  }
  // The distance from one token of the lane to its next there.
  NEMO_EXT_DEVICE int64_t token_stride() const { return Values::kTokenStride * p_.out_features; }

  // The partial of this row of warps.
  NEMO_EXT_DEVICE int partial() const { return block_index_y() * Tile::kWarpRows + warp_.row; }

  // Calls function(index, place) for this lane's neurons of the warp, with the place of their partial.
  template <typename Function>
  NEMO_EXT_DEVICE void for_each_partial(const Function& function) const {
    if (partial() >= p_.batch) return;
    for (int index = warp_.lane; index < Tile::kWarpNeurons; index += kWarpSize) {
      const int neuron = warp_.neuron + index;
      if (neuron < p_.out_features) function(index, partial() * p_.out_features + neuron);
    }
  }

  // How many of the lane's tokens exist, the first ones. Negative if the tile has none.
  NEMO_EXT_DEVICE int tokens_of(const TokenTile& tile) const {
    return (tile.tokens - Values::token(warp_.lane, 0) + Values::kTokenStride - 1) / Values::kTokenStride;
  }

  // Bit i: whether the lane's i-th token exists and is not masked out.
  NEMO_EXT_DEVICE uint32_t counted_tokens(const TokenTile& tile) const {
    const int tokens = tokens_of(tile);
    uint32_t bits = tokens > 0 ? (1u << tokens) - 1 : 0;
    if (p_.token_mask) {
      const bool* mask =
          p_.token_mask + tile.prompt * p_.tokens + tile.first_token + Values::token(warp_.lane, 0);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (i < tokens && !load_global(mask + i * Values::kTokenStride)) bits ^= 1u << i;
      }
    }
    return bits;
  }

  NEMO_EXT_DEVICE void add_bias(Values& values) const {
#pragma unroll
    for (int group = 0; group < Values::kGroups; ++group) {
      const float* source = p_.bias + first_neuron(group);
      const int neurons = neurons_of(group);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float bias = j < neurons ? load_global(source + j) : 0;
#pragma unroll
        for (int i = 0; i < kTokens; ++i) values.value(i, group, j) += bias;
      }
    }
  }

  // Adds the magnitudes of the lane's values to the sums of the prompt, for the activation. Token by token,
  // so that one comparison decides about the values of all groups.
  NEMO_EXT_DEVICE void sum_magnitudes(Values& values, uint32_t counted) const {
    float sums[Values::kGroups][kGroup] = {};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (counted >> i & 1) {
#pragma unroll
        for (int group = 0; group < Values::kGroups; ++group) {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) sums[group][j] += absolute(values.value(i, group, j));
        }
      }
    }
#pragma unroll
    for (int group = 0; group < Values::kGroups; ++group) add_to_prompt(group, sums[group]);
  }

  // Adds the products of the lane's values with the gradient of the values to the sums of the prompt, for the
  // gradient of the scale. Group by group, because the loads of all groups would fill the registers.
  NEMO_EXT_DEVICE void sum_products(Values& values, const TokenTile& tile) const {
    const int tokens = tokens_of(tile);
    const int64_t stride = token_stride();
#pragma unroll
    for (int group = 0; group < Values::kGroups; ++group) {
      const int neurons = neurons_of(group);
      const Element* gradient =
          static_cast<const Element*>(p_.gradient) + first_place(tile) + group * Values::kGroupStride;
      float sums[kGroup] = {};
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        // Keeps the loads of all tokens from being moved up, where they would fill the registers.
        keep_order();
        if (i < tokens) {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            if (j < neurons) sums[j] += values.value(i, group, j) * to_float(load_global(gradient + j));
          }
        }
        gradient += stride;
      }
      add_to_prompt(group, sums);
    }
  }

  // Reduces the lanes' sums, and adds the result to the sums of the prompt in shared memory.
  NEMO_EXT_DEVICE void add_to_prompt(int group, const float (&sums)[kGroup]) const {
    Vector<float, kGroup> total;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) total.data[j] = Values::sum_over_lanes(sums[j]);
    if (Values::is_first_of_neurons(warp_.lane)) {
      const uint32_t target = address(Tile::kSums, Values::neuron(warp_.lane, group));
      const auto before = load_shared<Vector<float, kGroup>>(target);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) total.data[j] += before.data[j];
      store_shared(target, total);
    }
  }

  NEMO_EXT_DEVICE void multiply_by_scale(Values& values, const TokenTile& tile) const {
    if (!p_.scale || tile.tokens < 0) return;
#pragma unroll
    for (int group = 0; group < Values::kGroups; ++group) {
      keep_order();  // as in sum_products
      const float* source = p_.scale + tile.prompt * p_.scale_batch_stride + first_neuron(group);
      const int neurons = neurons_of(group);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float scale = j < neurons ? load_global(source + j) : 0;
#pragma unroll
        for (int i = 0; i < kTokens; ++i) values.value(i, group, j) *= scale;
      }
    }
  }

  // Stores each group by one instruction, if all neurons of the warp exist and rows are aligned to groups. A
  // lane's groups are at constant distances.
  NEMO_EXT_DEVICE void store_groups(Values& values, const TokenTile& tile) const {
    const int tokens = tokens_of(tile);
    using Group = Vector<Element, kGroup>;
    constexpr int kDistance = Values::kGroupStride / kGroup;
    Group* target = reinterpret_cast<Group*>(static_cast<Element*>(p_.values) + first_place(tile));
    const int64_t stride = token_stride() / kGroup;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i < tokens) {
#pragma unroll
        for (int group = 0; group < Values::kGroups; ++group) {
          const float four[kGroup] = {values.value(i, group, 0), values.value(i, group, 1),
                                      values.value(i, group, 2), values.value(i, group, 3)};
          Group rounded;
          from_floats(rounded, four);
          store_global(target + group * kDistance, rounded);
        }
      }
      target += stride;
    }
  }

  NEMO_EXT_DEVICE void store_elements(Values& values, const TokenTile& tile) const {
    const int tokens = tokens_of(tile);
    Element* target = static_cast<Element*>(p_.values) + first_place(tile);
    const int64_t stride = token_stride();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i < tokens) {
#pragma unroll
        for (int group = 0; group < Values::kGroups; ++group) {
          const int neurons = neurons_of(group);
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            Element rounded;
            from_float(rounded, values.value(i, group, j));
            if (j < neurons) store_global(target + group * Values::kGroupStride + j, rounded);
          }
        }
      }
      target += stride;
    }
  }

  // Shared memory of a neuron of this warp in one of the arrays kSums, kMeans and kM2s.
  NEMO_EXT_DEVICE uint32_t address(int array, int index) const {
    return array + (warp_.row * Tile::kNeurons + warp_.block_neuron + index) * 4;
  }

  // Welford's update. In round r, this row of warps has finished r prompts before, and `first_round` in
  // launches before. An activation that cannot enter the statistics makes mean and m2 NaN, which they stay.
  NEMO_EXT_DEVICE void add_to_moments(int index, float activation, int round) const {
    if (!enters_statistics(activation)) activation = as_float(0x7fc00000);
    const uint32_t mean = address(Tile::kMeans, index), m2 = address(Tile::kM2s, index);
    Moments<float> moments;
    const int64_t before = p_.first_round + round;
    if (before > 0) moments = {static_cast<float>(before), load_shared<float>(mean), load_shared<float>(m2)};
    welford_update(moments, activation);
    store_shared(mean, moments.mean);
    store_shared(m2, moments.m2);
  }

  const Projection& p_;
  const WarpPosition<Tile>& warp_;
  int counted_of_prompt_ = 0;  // tokens of the current prompt that count, so far
};

}  // namespace nemo_ext::cuda
