// Main loop on vectors: fused multiply-adds of floats, or dot products of pairs. Needs NEMO_EXT_ROWS, the
// tokens of a register tile.
//
// Every sum is one chain over kBlock units of in_features at a time, whose results are added up: an error
// that grows with kBlock instead of with in_features, and a block of a panel that stays in the L1 cache.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

constexpr int kRows = NEMO_EXT_ROWS;
// Of one block, whose rows of hidden stay in the L2 cache: whole register tiles, and whole parts of the
// epilogue.
constexpr int kTokens = kRows == 11 ? 77 : 11 * kRows;
constexpr int kBlock = 128;

template <bool Pairs>
inline void multiply_units(Vector& sum, Vector left, Vector right) {
#if defined(NEMO_EXT_BF16_DOT)
  if constexpr (Pairs) return dot_pairs(sum, left, right);
#endif
  multiply_add(sum, left, right);
}

// Products of `steps` units of Rows tokens with those of a panel; the first block's begin `total`.
template <int Rows, bool Pairs>
void multiply_block(const float* hidden, int64_t row_stride, const float* panel, int64_t steps, bool first,
                    float (*total)[kWidth]) {
  Vector sum[Rows][2] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < steps; ++k) {
    const Vector left = load(panel + k * kWidth);
    const Vector right = load(panel + k * kWidth + kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Vector unit = broadcast(hidden[row * row_stride + k]);
      multiply_units<Pairs>(sum[row][0], unit, left);
      multiply_units<Pairs>(sum[row][1], unit, right);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      float* const target = total[row] + half * kLanes;
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
                         int64_t depth, float (*total)[kWidth], Lookahead& lookahead) {
  for (int64_t k = 0; k < depth; k += kBlock) {
    const int64_t steps = depth - k < kBlock ? depth - k : kBlock;
    for (int64_t token = 0; token < tokens; token += kRows) {
      const int64_t rows = tokens - token < kRows ? tokens - token : kRows;
      lookahead.fetch(rows * ((steps + 15) / 16));
      multiply_block_of<Pairs>(rows)(hidden + token * row_stride + k, row_stride, panel + k * kWidth, steps,
                                     k == 0, total + token);
    }
  }
}

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
