// The kernels, as device code only: compiled by nvcc, and by any C++ compiler against csrc/emulation.
//
// project: a block multiplies 80 rows of hidden per slot with kColumns rows of weight, warp by warp on the
// tensor cores, through kStages stages of shared memory that asynchronous copies fill ahead; what is done
// with a value once it is there happens in the warp's registers. merge: the blocks' statistics into the
// running ones.
//
// Every value is one sum over in_features in an order that depends on nothing else, and a prompt's activation
// one sum over its tokens; so both are bit-identical whatever the batch, the shape of the tile and the grid.
#pragma once

#include <cstdint>

#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.h"
#include "csrc/math.h"

namespace nemo_ext::cuda {

constexpr int kChunkBytes = 16;  // what one thread copies at a time
constexpr int kRowTiles = kSlotRows / 16;
constexpr int kLaneRows = kSlotRows / 8;  // of which a lane holds some columns

// Tokens [first_token, first_token + rows) of one prompt; rows is -1 where the work does not fill the last
// round.
struct Piece {
  int prompt, first_token, rows;
};

// Pieces are counted in 32 bits (the launch code refuses more), because a division in 64 is a function call.
template <typename Tile>
NEMO_EXT_DEVICE Piece piece_of(const Projection& p, int round, int slot, int chunk) {
  const int index = (round * grid_size_y() + block_index_y()) * Tile::kSlots + slot;
  int prompt = index;
  if (!p.reduces_over_tokens()) {
    const int chunks = static_cast<int>(ceil_divide(p.tokens, kSlotRows));
    prompt = index / chunks;
    chunk = index % chunks;
  }
  Piece piece{prompt, chunk * kSlotRows, -1};
  if (prompt < p.batch) {
    const int64_t left = p.tokens - piece.first_token;
    piece.rows = static_cast<int>(left < kSlotRows ? left : kSlotRows);
  }
  return piece;
}

// The loops that loading and multiplying both go through, one a few steps ahead of the other.
struct Extent {
  int rounds, chunks, steps;
};

template <typename Tile>
NEMO_EXT_DEVICE Extent extent_of(const Projection& p) {
  const int chunks = static_cast<int>(ceil_divide(p.tokens, kSlotRows));
  const int pieces = static_cast<int>(p.batch) * (p.reduces_over_tokens() ? 1 : chunks);
  const int steps = static_cast<int>(ceil_divide(p.in_features, Tile::kStepFeatures));
  return {(ceil_divide(pieces, Tile::kSlots) - block_index_y() - 1) / grid_size_y() + 1,
          p.reduces_over_tokens() && chunks > 0 ? chunks : 1,
          // A projection of no features is still its bias: one step of zeros.
          steps > 0 ? steps : 1};
}

// 16-byte chunks of a 64-byte row lie at other places in other rows, so that the eight rows of an ldmatrix
// never meet in a bank: two rows fill the banks once, and four such pairs must differ. The rows of weight
// that a matrix takes are 0, 1, 4, 5, 8, 9, 12, 13 (see multiply).
NEMO_EXT_DEVICE uint32_t hidden_chunk(int row, int chunk) {
  return row * 64 + (chunk ^ (row >> 1 & 3)) * kChunkBytes;
}
NEMO_EXT_DEVICE uint32_t weight_chunk(int row, int chunk) {
  return row * 64 + (chunk ^ (row >> 2 & 3)) * kChunkBytes;
}

// Copies the steps of this block's work into the stages of shared memory, one call a step.
template <typename Tile>
class Loader {
 public:
  NEMO_EXT_DEVICE Loader(const Projection& p, const Extent& extent, int first_column)
      : p_(p), extent_(extent), first_column_(first_column) {
    const int64_t columns = p.out_features - first_column;
    columns_ = static_cast<int>(columns < Tile::kColumns ? columns : Tile::kColumns);
    find_rows();
  }

  NEMO_EXT_DEVICE void load_next(int stage) {
    if (round_ < extent_.rounds) {
      load(stage * Tile::kStageBytes);
      advance();
    }
    copy_async_commit();  // an empty group keeps the count of those under way
  }

 private:
  using Element = typename Tile::Element;
  static constexpr int kRowChunks = Tile::kStepBytes / kChunkBytes;
  static constexpr int kRowsAtOnce = Tile::kThreads / kRowChunks;
  static constexpr int kElements = kChunkBytes / sizeof(Element);

  // Thread t copies chunk t % 4 of rows t / 4, t / 4 + kRowsAtOnce, …
  NEMO_EXT_DEVICE void find_rows() {
    rows_ = 0;
#pragma unroll
    for (int slot = 0; slot < Tile::kSlots; ++slot) {
      const Piece piece = piece_of<Tile>(p_, round_, slot, chunk_);
      rows_ |= static_cast<uint32_t>(piece.rows > 0 ? piece.rows : 0) << (8 * slot);
      first_[slot] =
          static_cast<const Element*>(p_.hidden) + piece.prompt * p_.hidden_strides[0] +
          (piece.first_token + thread_index() / kRowChunks - slot * kSlotRows) * p_.hidden_strides[1];
    }
  }

  NEMO_EXT_DEVICE void advance() {
    if (++step_ < extent_.steps) return;
    step_ = 0;
    if (++chunk_ == extent_.chunks) {
      chunk_ = 0;
      ++round_;
    }
    find_rows();
  }

  NEMO_EXT_DEVICE void load(uint32_t stage) {
    // The swizzle repeats every 16 rows, so a thread's chunks lie at one place of all its rows.
    static_assert(kRowsAtOnce % 16 == 0);
    const int row = thread_index() / kRowChunks;
    const int chunk = thread_index() % kRowChunks;
    const int64_t feature = int64_t(step_) * Tile::kStepFeatures + chunk * kElements;
    const uint32_t hidden = stage + hidden_chunk(row, chunk);
#pragma unroll
    for (int first = 0; first < Tile::kRows; first += kRowsAtOnce) {
      if (Tile::kRows % kRowsAtOnce != 0 && first + row >= Tile::kRows) break;
      // The rows that the threads copy at once are of one slot or of two.
      const int low = first / kSlotRows;
      const int high = low < Tile::kSlots - 1 ? (first + kRowsAtOnce - 1) / kSlotRows : low;
      const bool in_high = low != high && first + row >= high * kSlotRows;
      const Element* source = (in_high ? first_[high] : first_[low]) + first * p_.hidden_strides[1];
      const int slot = in_high ? high : low;
      const int rows = static_cast<int>(rows_ >> (8 * slot) & 0xff);
      copy(hidden + first * Tile::kStepBytes, source, feature, p_.hidden_strides[2],
           first + row - slot * kSlotRows < rows);
    }
    const uint32_t weight = stage + Tile::kRows * Tile::kStepBytes + weight_chunk(row, chunk);
    const Element* source =
        static_cast<const Element*>(p_.weight) + int64_t(first_column_ + row) * p_.weight_strides[0];
#pragma unroll
    for (int first = 0; first < Tile::kColumns; first += kRowsAtOnce) {
      copy(weight + first * Tile::kStepBytes, source + first * p_.weight_strides[0], feature,
           p_.weight_strides[1], first + row < columns_);
    }
  }

  // A chunk of a row from `feature` on, zeros behind its end.
  NEMO_EXT_DEVICE void copy(uint32_t target, const Element* row, int64_t feature, int64_t stride,
                            bool exists) {
    if constexpr (Tile::kAligned) {
      copy_async_16(target, row + feature, exists && feature < p_.in_features);
    } else {
      Vector<Element, kElements> chunk{};
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (exists && feature + i < p_.in_features) chunk.data[i] = load_global(row + (feature + i) * stride);
      }
      store_shared(target, chunk);
    }
  }

  const Projection& p_;
  const Extent extent_;
  const int first_column_;
  int columns_;  // of the block that exist
  int round_ = 0, chunk_ = 0, step_ = 0;
  const Element* first_[Tile::kSlots];  // this thread's first row, as if it were of that slot
  uint32_t rows_;                       // of each slot, a byte for each
};

// The sums of one warp. Tiles of columns come in pairs: of the 16 neurons of pair j, column c of tile 2j + h
// is neuron 4 · (c / 2) + 2 · h + c % 2, so that a lane, which mma gives columns 2q and 2q + 1 of both, holds
// four neurons that lie side by side.
template <typename Tile>
struct Sums {
  static constexpr int kPairs = Tile::kWarpColumns / 16;

  float of[kRowTiles][2 * kPairs][4];

  NEMO_EXT_DEVICE void clear() {
#pragma unroll
    for (auto& row : of) {
#pragma unroll
      for (auto& tile : row) {
#pragma unroll
        for (float& sum : tile) sum = 0;
      }
    }
  }

  // Of the four neurons 16 · pair + 4 · (lane % 4) + i, in row 8 · row + lane / 4.
  NEMO_EXT_DEVICE float& at(int row, int pair, int i) {
    return of[row / 2][2 * pair + i / 2][row % 2 * 2 + i % 2];
  }
};

// float32 as the sum of two tf32, whose low 13 bits mma ignores: `high` is the nearest tf32, and what is lost
// of `low` is below 2⁻²² of the number. Only `low` need keep a NaN.
struct Split {
  uint32_t high, low;
};

NEMO_EXT_DEVICE Split split(uint32_t bits) {
  const uint32_t high = (bits + 0x1000u) & 0xffffe000u;
  return {high, as_bits(as_float(bits) - as_float(high))};
}

// Two tiles of 16-bit elements, side by side.
template <typename T, int kPairs>
struct Right {
  uint32_t words[kPairs][4];

  NEMO_EXT_DEVICE void load(int pair, uint32_t row) { load_matrices(words[pair], row); }

  NEMO_EXT_DEVICE void multiply(const uint32_t (&left)[4], float (&sums)[2 * kPairs][4]) const {
#pragma unroll
    for (int tile = 0; tile < 2 * kPairs; ++tile) {
      multiply_add(sums[tile], left, words[tile / 2][tile % 2 * 2], words[tile / 2][tile % 2 * 2 + 1], T{});
    }
  }
};

// float32 in three products of tf32. The tensor cores round a sum towards zero, which over many steps would
// drift, so they only add up one step's, and the rest is added in ordinary float32: Ootomo and Yokota,
// "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
// performance", 2022.
template <int kPairs>
struct Right<float, kPairs> {
  Split words[kPairs][4];

  NEMO_EXT_DEVICE void load(int pair, uint32_t row) {
    uint32_t bits[4];
    load_matrices(bits, row);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[pair][i] = split(bits[i]);
  }

  NEMO_EXT_DEVICE void multiply(const uint32_t (&left)[4], float (&sums)[2 * kPairs][4]) const {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split word = split(left[i]);
      high[i] = word.high;
      low[i] = word.low;
    }
    // Tile by tile, so that no product waits for the one before.
    float step[2 * kPairs][4] = {};
#pragma unroll
    for (int tile = 0; tile < 2 * kPairs; ++tile) {
      multiply_add_tf32(step[tile], low, first(tile).high, second(tile).high);
    }
#pragma unroll
    for (int tile = 0; tile < 2 * kPairs; ++tile) {
      multiply_add_tf32(step[tile], high, first(tile).low, second(tile).low);
    }
#pragma unroll
    for (int tile = 0; tile < 2 * kPairs; ++tile) {
      multiply_add_tf32(step[tile], high, first(tile).high, second(tile).high);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] += step[tile][i];
    }
  }

 private:
  // The two registers of a tile's fragment.
  NEMO_EXT_DEVICE const Split& first(int tile) const { return words[tile / 2][tile % 2 * 2]; }
  NEMO_EXT_DEVICE const Split& second(int tile) const { return words[tile / 2][tile % 2 * 2 + 1]; }
};

// One stage into the sums of the warp that owns rows of `slot` and columns from `warp_column` on.
template <typename Tile>
NEMO_EXT_DEVICE void multiply(int stage, int slot, int warp_column, Sums<Tile>& sums) {
  constexpr int kPairs = Sums<Tile>::kPairs;
  const int lane = thread_index() % kWarpSize;
  const uint32_t hidden = stage * Tile::kStageBytes;
  const uint32_t weight = hidden + Tile::kRows * Tile::kStepBytes;
  // Lane l names row l % 8 of matrix l / 8. Of hidden the four are: upper and lower 8 rows, left and right
  // chunk; of weight: left and right chunk of one tile, then of the other.
  constexpr int kTileBytes = 16 * Tile::kStepBytes;  // the swizzle is the same 16 rows on
  const int hidden_row = slot * kSlotRows + lane % 16;
  const int weight_row = warp_column + lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
  // Unrolled, float32 needs more registers than there are.
#pragma unroll(sizeof(typename Tile::Element) == 2 ? 2 : 1)
  for (int chunk = 0; chunk < Tile::kStepBytes / kChunkBytes; chunk += 2) {
    Right<typename Tile::Element, kPairs> right;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      right.load(pair, weight + weight_chunk(weight_row, chunk + lane / 8 % 2) + pair * kTileBytes);
    }
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      uint32_t left[4];
      load_matrices(left, hidden + hidden_chunk(hidden_row, chunk + lane / 16) + tile * kTileBytes);
      right.multiply(left, sums.of[tile]);
    }
  }
}

// What a warp knows of its place in the block and the projection.
template <typename Tile>
struct Place {
  int lane, slot, warp_column;
  int first_neuron;  // of the warp

  NEMO_EXT_DEVICE explicit Place(int first_column)
      : lane(thread_index() % kWarpSize),
        slot(thread_index() / kWarpSize / Tile::kColumnWarps),
        warp_column(thread_index() / kWarpSize % Tile::kColumnWarps * Tile::kWarpColumns),
        first_neuron(first_column + warp_column) {}

  // Shared memory of a column of this warp in one of the arrays kSums, kMeans, kM2s.
  NEMO_EXT_DEVICE uint32_t shared(int array, int column) const {
    return array + (slot * Tile::kColumns + warp_column + column) * 4;
  }
};

// Bit i: whether row 8 · i + lane / 4 exists, and counts where there is a mask.
NEMO_EXT_DEVICE uint32_t counted_rows(const Projection& p, const Piece& piece, int lane) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int row = 8 * i + lane / 4;
    if (row < piece.rows &&
        (!p.token_mask || load_global(p.token_mask + piece.prompt * p.tokens + piece.first_token + row))) {
      bits |= 1u << i;
    }
  }
  return bits;
}

// Adds up over the eight lanes that hold the same columns, i.e. over the rows of a tile.
template <typename Number>
NEMO_EXT_DEVICE Number sum_over_rows(Number number) {
#pragma unroll
  for (int mask = 4; mask < kWarpSize; mask *= 2) number += shuffle_xor(number, mask);
  return number;
}

// Values out, and the piece's sums over tokens into shared memory.
template <typename Tile>
NEMO_EXT_DEVICE void finish_piece(const Projection& p, const Place<Tile>& place, const Piece& piece,
                                  Sums<Tile>& sums, uint32_t counted, bool first_chunk) {
  using Element = typename Tile::Element;
  const int first_row = place.lane / 4;
  const int64_t stride = 8 * p.out_features;  // from one of this lane's rows to the next
  const int64_t first_value = (piece.prompt * p.tokens + piece.first_token + first_row) * p.out_features;
#pragma unroll
  for (int pair = 0; pair < Sums<Tile>::kPairs; ++pair) {
    const int column = 16 * pair + place.lane % 4 * 4;
    const int neuron = place.first_neuron + column;
    const int left = static_cast<int>(p.out_features) - neuron;
    const int neurons = left < 0 ? 0 : left < 4 ? left : 4;
    if (p.bias) {
      float bias[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bias[i] = i < neurons ? load_global(p.bias + neuron + i) : 0;
#pragma unroll
      for (int row = 0; row < kLaneRows; ++row) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.at(row, pair, i) += bias[i];
      }
    }
    if (p.reduces_over_tokens()) {
      float total[4] = {0, 0, 0, 0};
      if (p.activation) {
#pragma unroll
        for (int row = 0; row < kLaneRows; ++row) {
          if (counted >> row & 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += absolute(sums.at(row, pair, i));
          }
        }
      } else {
        const Element* gradient = static_cast<const Element*>(p.gradient) + first_value + neuron;
#pragma unroll
        for (int row = 0; row < kLaneRows; ++row) {
          keep_order();  // or the loads of all rows would wait in registers
          if (first_row + 8 * row < piece.rows) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (i < neurons) total[i] += sums.at(row, pair, i) * to_float(load_global(gradient + i));
            }
          }
          gradient += stride;
        }
      }
      Vector<float, 4> all;
#pragma unroll
      for (int i = 0; i < 4; ++i) all.data[i] = sum_over_rows(total[i]);
      if (place.lane < 4) {
        const uint32_t target = place.shared(Tile::kSums, column);
        if (!first_chunk) {
          const auto before = load_shared<Vector<float, 4>>(target);
#pragma unroll
          for (int i = 0; i < 4; ++i) all.data[i] += before.data[i];
        }
        store_shared(target, all);
      }
    }
    if (p.values && neurons > 0) {
      float scale[4] = {1, 1, 1, 1};
      if (p.scale && piece.rows >= 0) {
        const float* source = p.scale + piece.prompt * p.scale_batch_stride + neuron;
#pragma unroll
        for (int i = 0; i < 4; ++i) scale[i] = i < neurons ? load_global(source + i) : 0;
      }
      Element* values = static_cast<Element*>(p.values) + first_value + neuron;
      const bool in_fours = p.out_features % 4 == 0;
#pragma unroll
      for (int row = 0; row < kLaneRows; ++row) {
        if (first_row + 8 * row < piece.rows) {
          Vector<Element, 4> rounded;
#pragma unroll
          for (int i = 0; i < 4; ++i) from_float(rounded.data[i], sums.at(row, pair, i) * scale[i]);
          if (in_fours) {
            store_global(reinterpret_cast<Vector<Element, 4>*>(values + row * stride), rounded);
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (i < neurons) store_global(values + row * stride + i, rounded.data[i]);
            }
          }
        }
      }
    }
  }
}

// One prompt's sums over tokens, complete: out as the activation, which enters the slot's running mean and
// m2, or as the gradient of the scale. Each lane takes columns lane, lane + 32, …, the same for every prompt.
template <typename Tile>
NEMO_EXT_DEVICE void finish_prompt(const Projection& p, const Place<Tile>& place, int prompt, int round,
                                   int tokens) {
  sync_warp();  // the sums were written by other lanes; until they are again, all threads have met
  for (int column = place.lane; column < Tile::kWarpColumns; column += kWarpSize) {
    const int neuron = place.first_neuron + column;
    if (neuron >= p.out_features) continue;
    const float sum = load_shared<float>(place.shared(Tile::kSums, column));
    if (p.scale_gradient) {
      store_global(p.scale_gradient + prompt * p.out_features + neuron, sum);
      continue;
    }
    const float activation = sum / static_cast<float>(tokens);
    store_global(p.activation + prompt * p.out_features + neuron, activation);
    if (!p.count_before) continue;
    if (!is_finite(activation)) atomic_or_global(p.not_finite, 1);
    const uint32_t mean = place.shared(Tile::kMeans, column), m2 = place.shared(Tile::kM2s, column);
    Moments<float> moments;
    if (round > 0) moments = {static_cast<float>(round), load_shared<float>(mean), load_shared<float>(m2)};
    welford_update(moments, activation);
    store_shared(mean, moments.mean);
    store_shared(m2, moments.m2);
  }
}

// The slot's mean and m2, for the merge. Its prompts are partial, partial + partials, …: see
// prompts_of_partial.
template <typename Tile>
NEMO_EXT_DEVICE void write_partial(const Projection& p, const Place<Tile>& place) {
  const int64_t partial = block_index_y() * Tile::kSlots + place.slot;
  if (partial >= p.batch) return;
  for (int column = place.lane; column < Tile::kWarpColumns; column += kWarpSize) {
    const int neuron = place.first_neuron + column;
    if (neuron >= p.out_features) continue;
    const int64_t target = partial * p.out_features + neuron;
    store_global(p.partial_mean + target, load_shared<float>(place.shared(Tile::kMeans, column)));
    store_global(p.partial_m2 + target, load_shared<float>(place.shared(Tile::kM2s, column)));
  }
}

template <typename Tile>
NEMO_EXT_KERNEL(Tile::kThreads, Tile::kBlocks)
project(const Projection p) {
  const int first_column = block_index_x() * Tile::kColumns;
  const Place<Tile> place(first_column);
  const Extent extent = extent_of<Tile>(p);
  Loader<Tile> loader(p, extent, first_column);
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) loader.load_next(stage);

  if (p.count_before && thread_index() == 0 && block_index_x() == 0 && block_index_y() == 0) {
    store_global(p.count_before, load_global(p.count));
  }

  int stage = 0;
  Sums<Tile> sums;
  for (int round = 0; round < extent.rounds; ++round) {
    int tokens = 0;
    for (int chunk = 0; chunk < extent.chunks; ++chunk) {
      sums.clear();
      for (int step = 0; step < extent.steps; ++step) {
        copy_async_wait<Tile::kStages - 2>();
        // Everyone's copies of this stage have landed, and everyone is done with the stage filled next.
        sync_threads();
        loader.load_next((stage + Tile::kStages - 1) % Tile::kStages);
        multiply<Tile>(stage, place.slot, place.warp_column, sums);
        stage = (stage + 1) % Tile::kStages;
      }
      const Piece piece = piece_of<Tile>(p, round, place.slot, chunk);
      const uint32_t counted = counted_rows(p, piece, place.lane);
      finish_piece<Tile>(p, place, piece, sums, counted, chunk == 0);
      if (p.activation) tokens += sum_over_rows(count_bits(counted));
      if (p.reduces_over_tokens() && chunk == extent.chunks - 1 && piece.rows >= 0) {
        finish_prompt<Tile>(p, place, piece.prompt, round, tokens);
      }
    }
  }
  if (p.count_before) write_partial<Tile>(p, place);
}

NEMO_EXT_DEVICE int64_t prompts_of_partial(const Merge& m, int64_t partial) {
  return partial < m.batch ? (m.batch - 1 - partial) / m.partials + 1 : 0;
}

// A block merges the partials of 32 neurons: eight threads a neuron take every eighth partial, then one of
// them merges those eight, in order, into the running float64 statistics.
constexpr int kMergeNeurons = 32;
constexpr int kMergeThreads = 8 * kMergeNeurons;
constexpr int kMergeSharedBytes = kMergeThreads * int(sizeof(Moments<float>));

NEMO_EXT_KERNEL(kMergeThreads, 4)
merge(const Merge m) {
  const int64_t neuron = int64_t(block_index_x()) * kMergeNeurons + thread_index() % kMergeNeurons;
  if (neuron < m.out_features) {
    Moments<float> moments;
    for (int64_t partial = thread_index() / kMergeNeurons; partial < m.partials; partial += 8) {
      const int64_t prompts = prompts_of_partial(m, partial);
      if (prompts == 0) break;
      const int64_t source = partial * m.out_features + neuron;
      chan_merge(moments, Moments<float>{static_cast<float>(prompts), load_global(m.partial_mean + source),
                                         load_global(m.partial_m2 + source)});
    }
    store_shared(thread_index() * int(sizeof(Moments<float>)), moments);
  }
  sync_threads();
  // A prompt without a token or with an activation that is not finite leaves everything as it was.
  if (load_global(m.not_finite)) return;
  const double count_before = load_global(m.count_before);
  if (thread_index() < kMergeNeurons && neuron < m.out_features) {
    Moments<double> running{count_before, load_global(m.mean + neuron), load_global(m.m2 + neuron)};
    for (int part = 0; part < 8; ++part) {
      chan_merge(running, load_shared<Moments<float>>((part * kMergeNeurons + thread_index()) *
                                                      int(sizeof(Moments<float>))));
    }
    store_global(m.mean + neuron, running.mean);
    store_global(m.m2 + neuron, running.m2);
  }
  if (thread_index() == 0 && block_index_x() == 0) {
    store_global(m.count, count_before + static_cast<double>(m.batch));
  }
}

}  // namespace nemo_ext::cuda
