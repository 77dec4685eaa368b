// Main loop on vectors: fused multiply-adds of floats, or dot products of pairs. NEMO_EXT_ROWS must be
// defined as the number of tokens of a register block.
//
// A sum over in_features is computed in depth blocks of kDepthBlock words: each block is summed in sequence,
// and its result is added to the accumulator. The rounding error then grows with kDepthBlock instead of with
// in_features, and one block of a panel stays in the L1 cache.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

constexpr int kRows = NEMO_EXT_ROWS;
// Tokens of a token block, whose rows of hidden stay in the L2 cache: a multiple of the register block and of
// the epilogue's partial sums.
constexpr int kTokenBlock = kRows == 11 ? 77 : 11 * kRows;
constexpr int kDepthBlock = 128;

template <bool Pairs>
inline void multiply_words(Vector& sum, Vector left, Vector right) {
#if defined(NEMO_EXT_BF16_DOT)
  if constexpr (Pairs) return dot_pairs(sum, left, right);
#endif
  multiply_add(sum, left, right);
}

// Multiplies `steps` words of Rows tokens with a panel. The first depth block initializes the accumulators,
// the others are added to them.
template <int Rows, bool Pairs>
void multiply_block(const float* hidden, int64_t row_stride, const float* panel, int64_t steps, bool first,
                    float (*accumulators)[kWidth]) {
  Vector sum[Rows][2] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < steps; ++k) {
    const Vector left = load(panel + k * kWidth);
    const Vector right = load(panel + k * kWidth + kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Vector word = broadcast(hidden[row * row_stride + k]);
      multiply_words<Pairs>(sum[row][0], word, left);
      multiply_words<Pairs>(sum[row][1], word, right);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      float* const target = accumulators[row] + half * kLanes;
      store(target, first ? sum[row][half] : load(target) + sum[row][half]);
    }
  }
}

using MultiplyBlock = void (*)(const float*, int64_t, const float*, int64_t, bool, float (*)[kWidth]);

template <bool Pairs, int Rows = kRows>
MultiplyBlock multiply_block_of(int64_t rows) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_block_of<Pairs, Rows - 1>(rows);
  }
  return multiply_block<Rows, Pairs>;
}

template <bool Pairs>
void multiply_on_vectors(const float* hidden, int64_t row_stride, int64_t tokens, const float* panel,
                         int64_t depth, float (*accumulators)[kWidth], Lookahead& lookahead) {
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    const int64_t steps = depth - k < kDepthBlock ? depth - k : kDepthBlock;
    for (int64_t token = 0; token < tokens; token += kRows) {
      const int64_t rows = tokens - token < kRows ? tokens - token : kRows;
      lookahead.fetch(rows * ((steps + 15) / 16));
      multiply_block_of<Pairs>(rows)(hidden + token * row_stride + k, row_stride, panel + k * kWidth, steps,
                                     k == 0, accumulators + token);
    }
  }
}

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
