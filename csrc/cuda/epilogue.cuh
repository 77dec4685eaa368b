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

template <typename Tile, typename Values>
class Epilogue {
 public:
  NEMO_EXT_DEVICE Epilogue(const Projection& p, const WarpPosition<Tile>& warp) : p_(p), warp_(warp) {}

  // Finishes the values of one token tile. `is_first` says that no other tile of its prompt came before.
  NEMO_EXT_DEVICE void finish_tile(const TokenTile& tile, Values& values, bool is_first) {
    const uint32_t counted = counted_tokens(tile);
    const int64_t row =
        (tile.prompt * p_.tokens + tile.first_token + Values::token(warp_.lane, 0)) * p_.out_features;
    // One group after another, so that bias, scale and sums of few neurons at a time occupy registers.
#pragma unroll
    for (int group = 0; group < Values::kGroups; ++group) {
      const int neuron = warp_.neuron + Values::neuron(warp_.lane, group);
      const int left = static_cast<int>(p_.out_features) - neuron;
      const Neurons neurons{neuron, left < 0 ? 0 : left < kGroup ? left : kGroup, row};
      if (p_.bias) add_bias(values, group, neurons);
      if (p_.reduces_over_tokens()) {
        float sums[kGroup] = {};
        if (p_.activation) {
          sum_magnitudes(values, group, counted, sums);
        } else {
          sum_products(values, group, tile, neurons, sums);
        }
        add_to_prompt(group, sums, is_first);
      }
      if (p_.values && neurons.count > 0) store_values(values, group, tile, neurons);
    }
    if (is_first) counted_of_prompt_ = 0;
    if (p_.activation) counted_of_prompt_ += Values::sum_over_lanes(count_bits(counted));
  }

  // Turns the complete sums of a prompt into results: the gradient of the scale, or the activation, which
  // also enters the running mean and m2 of this row of warps. Each lane takes neurons lane, lane + 32, …, the
  // same ones for every prompt.
  NEMO_EXT_DEVICE void finish_prompt(int prompt, int round) {
    // Other lanes wrote the sums. They write the next ones after a barrier of the main loop.
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
  }

  // Writes mean and m2 of this row of warps for `merge`, which knows from the number of a partial how many
  // prompts it covers.
  NEMO_EXT_DEVICE void write_partials() const {
    const int64_t partial = block_index_y() * Tile::kWarpRows + warp_.row;
    if (partial >= p_.batch) return;
    for (int index = warp_.lane; index < Tile::kWarpNeurons; index += kWarpSize) {
      const int neuron = warp_.neuron + index;
      if (neuron >= p_.out_features) continue;
      const int64_t target = partial * p_.out_features + neuron;
      store_global(p_.partial_mean + target, load_shared<float>(address(Tile::kMeans, index)));
      store_global(p_.partial_m2 + target, load_shared<float>(address(Tile::kM2s, index)));
    }
  }

 private:
  using Element = typename Tile::Element;
  static constexpr int kGroup = Values::kGroupNeurons;
  static constexpr int kTokens = Values::kTokens;

  // The neurons of a group: the first one, and how many of them exist. `row` is the offset of the lane's
  // first token in [batch, tokens, out_features].
  struct Neurons {
    int first, count;
    int64_t row;
  };

  // Whether the lane's i-th token exists.
  NEMO_EXT_DEVICE bool exists(const TokenTile& tile, int i) const {
    return Values::token(warp_.lane, i) < tile.tokens;
  }
  // The distance from one token of the lane to its next in [batch, tokens, out_features].
  NEMO_EXT_DEVICE int64_t value_stride() const { return Values::kTokenStride * p_.out_features; }

  // Bit i: whether the lane's i-th token exists and is not masked out.
  NEMO_EXT_DEVICE uint32_t counted_tokens(const TokenTile& tile) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int token = Values::token(warp_.lane, i);
      if (token < tile.tokens && (!p_.token_mask || load_global(p_.token_mask + tile.prompt * p_.tokens +
                                                                tile.first_token + token))) {
        bits |= 1u << i;
      }
    }
    return bits;
  }

  NEMO_EXT_DEVICE void add_bias(Values& values, int group, const Neurons& neurons) const {
    float bias[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      bias[j] = j < neurons.count ? load_global(p_.bias + neurons.first + j) : 0;
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) values.value(i, group, j) += bias[j];
    }
  }

  // Adds to `sums` the magnitudes of the lane's values, for the activation.
  NEMO_EXT_DEVICE void sum_magnitudes(Values& values, int group, uint32_t counted,
                                      float (&sums)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (counted >> i & 1) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) sums[j] += absolute(values.value(i, group, j));
      }
    }
  }

  // Adds to `sums` the products of the lane's values with the gradient of the values, for the gradient of the
  // scale.
  NEMO_EXT_DEVICE void sum_products(Values& values, int group, const TokenTile& tile, const Neurons& neurons,
                                    float (&sums)[kGroup]) const {
    const int64_t stride = value_stride();
    const Element* gradient = static_cast<const Element*>(p_.gradient) + neurons.row + neurons.first;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      keep_order();  // keeps the loads of all tokens from being moved up, where they would fill the registers
      if (exists(tile, i)) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (j < neurons.count) sums[j] += values.value(i, group, j) * to_float(load_global(gradient + j));
        }
      }
      gradient += stride;
    }
  }

  // Reduces the lanes' sums, and adds the result to what the prompt's tiles before have left in shared
  // memory.
  NEMO_EXT_DEVICE void add_to_prompt(int group, const float (&sums)[kGroup], bool is_first) const {
    Vector<float, kGroup> total;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) total.data[j] = Values::sum_over_lanes(sums[j]);
    if (Values::is_first_of_neurons(warp_.lane)) {
      const uint32_t target = address(Tile::kSums, Values::neuron(warp_.lane, group));
      if (!is_first) {
        const auto before = load_shared<Vector<float, kGroup>>(target);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) total.data[j] += before.data[j];
      }
      store_shared(target, total);
    }
  }

  NEMO_EXT_DEVICE void store_values(Values& values, int group, const TokenTile& tile,
                                    const Neurons& neurons) const {
    float scale[kGroup] = {1, 1, 1, 1};
    if (p_.scale && tile.tokens >= 0) {
      const float* source = p_.scale + tile.prompt * p_.scale_batch_stride + neurons.first;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) scale[j] = j < neurons.count ? load_global(source + j) : 0;
    }
    const int64_t stride = value_stride();
    Element* target = static_cast<Element*>(p_.values) + (neurons.row + neurons.first);
    const bool is_aligned = p_.out_features % kGroup == 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (exists(tile, i)) {
        Vector<Element, kGroup> rounded;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) from_float(rounded.data[j], values.value(i, group, j) * scale[j]);
        if (is_aligned) {
          store_global(reinterpret_cast<Vector<Element, kGroup>*>(target + i * stride), rounded);
        } else {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            if (j < neurons.count) store_global(target + i * stride + j, rounded.data[j]);
          }
        }
      }
    }
  }

  // Shared memory of a neuron of this warp in one of the arrays kSums, kMeans and kM2s.
  NEMO_EXT_DEVICE uint32_t address(int array, int index) const {
    return array + (warp_.row * Tile::kNeurons + warp_.block_neuron + index) * 4;
  }

  // Welford's update. In round r, this row of warps has finished r prompts before.
  NEMO_EXT_DEVICE void add_to_moments(int index, float activation, int round) const {
    if (!enters_statistics(activation)) atomic_or_global(p_.refused, 1);
    const uint32_t mean = address(Tile::kMeans, index), m2 = address(Tile::kM2s, index);
    Moments<float> moments;
    if (round > 0) moments = {static_cast<float>(round), load_shared<float>(mean), load_shared<float>(m2)};
    welford_update(moments, activation);
    store_shared(mean, moments.mean);
    store_shared(m2, moments.m2);
  }

  const Projection& p_;
  const WarpPosition<Tile>& warp_;
  int counted_of_prompt_ = 0;  // tokens of the current prompt that count, so far
};

}  // namespace nemo_ext::cuda
