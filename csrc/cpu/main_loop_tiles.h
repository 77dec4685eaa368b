// Main loop on AMX tiles. It computes 32 tokens × 32 neurons at a time, in four tiles of accumulators.
//
// One instruction adds 32 products to each of 16 × 16 accumulators. It sums the products with even and with
// odd index separately, then adds both sums to the accumulator. Every tile is full, so that the tiles are
// configured once: the last tile of a token block begins 16 rows before the end of the block. Rows in which
// two tiles overlap are computed twice, with the same bits.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

constexpr int kTileRows = 16;
constexpr int kTileWords = 16;

// Tiles 0 to 3 hold accumulators, tiles 4 and 5 rows of hidden, tiles 6 and 7 columns of the panel.
inline void configure_full_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 4 * kTileWords;
    config.rows[tile] = kTileRows;
  }
  configure_tiles(config);
}

template <int Sum, int Left, int Right>
inline void dot_tiles_of(Element element) {
  if (element == Element::BFloat16) {
    dot_tiles_bfloat16<Sum, Left, Right>();
  } else {
    dot_tiles_float16<Sum, Left, Right>();
  }
}

// Computes the accumulators of the 16 tokens from `first` on and, if Two is true, of the 16 from `second` on.
template <Element element, bool Two>
void multiply_tiles(const float* hidden, int64_t row_stride, int64_t first, int64_t second,
                    const float* panel, int64_t depth, float (*accumulators)[kWidth], Lookahead& lookahead) {
  constexpr int64_t kRowBytes = 4 * kWidth;
  zero_tile<0>();
  zero_tile<1>();
  if constexpr (Two) {
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t k = 0; k < depth; k += kTileWords) {
    load_tile<6>(panel + k * kWidth, kRowBytes);
    load_tile<4>(hidden + first * row_stride + k, 4 * row_stride);
    dot_tiles_of<0, 4, 6>(element);
    load_tile<7>(panel + k * kWidth + kLanes, kRowBytes);
    dot_tiles_of<1, 4, 7>(element);
    if constexpr (Two) {
      load_tile<5>(hidden + second * row_stride + k, 4 * row_stride);
      dot_tiles_of<2, 5, 6>(element);
      dot_tiles_of<3, 5, 7>(element);
    }
    lookahead.fetch(2);
  }
  store_tile<0>(accumulators[first], kRowBytes);
  store_tile<1>(accumulators[first] + kLanes, kRowBytes);
  if constexpr (Two) {
    store_tile<2>(accumulators[second], kRowBytes);
    store_tile<3>(accumulators[second] + kLanes, kRowBytes);
  }
}

template <Element element>
void multiply_on_tiles(const float* hidden, int64_t row_stride, int64_t tokens, const float* panel,
                       int64_t depth, float (*accumulators)[kWidth], Lookahead& lookahead) {
  // A block of fewer than 16 tokens was copied to a buffer with room for 16.
  const int64_t rows = tokens < kTileRows ? kTileRows : tokens;
  int64_t token = 0;
  for (; token + kTileRows < rows; token += 2 * kTileRows) {
    const int64_t next = token + kTileRows;
    multiply_tiles<element, true>(hidden, row_stride, token,
                                  next + kTileRows <= rows ? next : rows - kTileRows, panel, depth,
                                  accumulators, lookahead);
  }
  if (token < rows) {
    multiply_tiles<element, false>(hidden, row_stride, rows - kTileRows, 0, panel, depth, accumulators,
                                   lookahead);
  }
}

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
