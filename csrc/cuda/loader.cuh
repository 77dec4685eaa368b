// Loads the operands into shared memory: the layout of a stage, and the loader, which is stages ahead.
#pragma once

#include <cstdint>

#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.h"
#include "csrc/cuda/tiles.cuh"

namespace nemo_ext::cuda {

// One cp.async copies a chunk of 16 bytes. A stage holds rows of 64 bytes, four chunks, or of 128: first a
// row for every token of the block, then one for every neuron.
constexpr int kChunkBytes = 16;

// The offset of a chunk in the rows of hidden, or of weight. Chunks are swizzled: they change places by row,
// so that the eight rows of one ldmatrix lie in different banks. Two rows of 64 bytes fill the 32 banks once,
// so that four pairs of rows need four different orders; of 128 bytes each row needs one. An ldmatrix reads
// consecutive rows of hidden, but rows 0, 1, 4, 5, 8, 9, 12 and 13 of weight (see `multiply` in
// main_loop.cuh).
template <int kRowBytes>
NEMO_EXT_DEVICE uint32_t hidden_chunk(int row, int chunk) {
  if constexpr (kRowBytes == 64) return row * 64 + (chunk ^ (row >> 1 & 3)) * kChunkBytes;
  return row * 128 + (chunk ^ (row & 7)) * kChunkBytes;
}
template <int kRowBytes>
NEMO_EXT_DEVICE uint32_t weight_chunk(int row, int chunk) {
  if constexpr (kRowBytes == 64) return row * 64 + (chunk ^ (row >> 2 & 3)) * kChunkBytes;
  return row * 128 + (chunk ^ ((row & 1) | (row >> 1 & 6))) * kChunkBytes;
}

// Fills one stage per call, in the order of the block's loops. Threads split a stage by rows: thread t copies
// chunk t % kRowChunks of rows t / kRowChunks, that + kRowsAtOnce, …
template <typename Tile>
class Loader {
 public:
  NEMO_EXT_DEVICE Loader(const Projection& p, const Loops& loops, int first_neuron)
      : p_(p), loops_(loops), first_neuron_(first_neuron) {
    const int64_t neurons = p.out_features - first_neuron;
    neurons_ = static_cast<int>(neurons < Tile::kNeurons ? neurons : Tile::kNeurons);
    find_rows();
  }

  // Begins the copies of the next step into `stage`. After the last step it commits an empty group, so that
  // the number of pending groups stays what the main loop's wait expects.
  NEMO_EXT_DEVICE void load_next(int stage) {
    if (round_ < loops_.rounds) {
      load(stage * Tile::kStageBytes);
      advance();
    }
    copy_async_commit();
  }

 private:
  using Element = typename Tile::Element;
  static constexpr int kRowChunks = Tile::kStepBytes / kChunkBytes;
  static constexpr int kRowsAtOnce = Tile::kThreads / kRowChunks;
  static constexpr int kChunkElements = kChunkBytes / sizeof(Element);

  // Looks up the token tiles of the current round.
  NEMO_EXT_DEVICE void find_rows() {
    tokens_ = 0;
#pragma unroll
    for (int warp_row = 0; warp_row < Tile::kWarpRows; ++warp_row) {
      const TokenTile tile = token_tile_of<Tile>(p_, round_, warp_row, tile_);
      tokens_ |= static_cast<uint32_t>(tile.tokens > 0 ? tile.tokens : 0) << (8 * warp_row);
      sources_[warp_row] = static_cast<const Element*>(p_.hidden) + tile.prompt * p_.hidden_strides[0] +
                           (tile.first_token + thread_index() / kRowChunks - warp_row * Tile::kTileTokens) *
                               p_.hidden_strides[1];
    }
  }

  NEMO_EXT_DEVICE void advance() {
    if (++step_ < loops_.steps) return;
    step_ = 0;
    if (++tile_ == loops_.tiles) {
      tile_ = 0;
      ++round_;
    }
    find_rows();
  }

  NEMO_EXT_DEVICE void load(uint32_t stage) {
    // The swizzle repeats every 16 rows, so that a thread's chunk has the same place in all of its rows.
    static_assert(kRowsAtOnce % 16 == 0);
    const int row = thread_index() / kRowChunks;
    const int chunk = thread_index() % kRowChunks;
    const int64_t feature = int64_t(step_) * Tile::kStepFeatures + chunk * kChunkElements;
    const uint32_t hidden = stage + hidden_chunk<Tile::kStepBytes>(row, chunk);
#pragma unroll
    for (int first = 0; first < Tile::kTokens; first += kRowsAtOnce) {
      if (Tile::kTokens % kRowsAtOnce != 0 && first + row >= Tile::kTokens) break;
      // The rows that the threads copy at once belong to one token tile or to two.
      const int low = first / Tile::kTileTokens;
      const int high = low < Tile::kWarpRows - 1 ? (first + kRowsAtOnce - 1) / Tile::kTileTokens : low;
      const bool in_high = low != high && first + row >= high * Tile::kTileTokens;
      const Element* source = (in_high ? sources_[high] : sources_[low]) + first * p_.hidden_strides[1];
      const int warp_row = in_high ? high : low;
      const int tokens = static_cast<int>(tokens_ >> (8 * warp_row) & 0xff);
      copy(hidden + first * Tile::kStepBytes, source, feature, p_.hidden_strides[2],
           first + row - warp_row * Tile::kTileTokens < tokens);
    }
    const uint32_t weight =
        stage + Tile::kTokens * Tile::kStepBytes + weight_chunk<Tile::kStepBytes>(row, chunk);
    const Element* source =
        static_cast<const Element*>(p_.weight) + int64_t(first_neuron_ + row) * p_.weight_strides[0];
#pragma unroll
    for (int first = 0; first < Tile::kNeurons; first += kRowsAtOnce) {
      copy(weight + first * Tile::kStepBytes, source + first * p_.weight_strides[0], feature,
           p_.weight_strides[1], first + row < neurons_);
    }
  }

  // Copies the chunk of a row that begins at `feature`. Features beyond the last, and rows that do not exist,
  // become zeros.
  NEMO_EXT_DEVICE void copy(uint32_t target, const Element* row, int64_t feature, int64_t stride,
                            bool exists) {
    if constexpr (Tile::kAligned) {
      copy_async_16(target, row + feature, exists && feature < p_.in_features);
    } else {
      Vector<Element, kChunkElements> chunk{};
#pragma unroll
      for (int i = 0; i < kChunkElements; ++i) {
        if (exists && feature + i < p_.in_features) chunk.data[i] = load_global(row + (feature + i) * stride);
      }
      store_shared(target, chunk);
    }
  }

  const Projection& p_;
  const Loops loops_;
  const int first_neuron_;
  int neurons_;                          // the neurons of the block that exist
  int round_ = 0, tile_ = 0, step_ = 0;  // the next step to load
  // For each token tile of the block the address of this thread's first row, extrapolated as if all rows of
  // the block belonged to that tile.
  const Element* sources_[Tile::kWarpRows];
  uint32_t tokens_;  // how many tokens each of these tiles has, one byte for each
};

}  // namespace nemo_ext::cuda
