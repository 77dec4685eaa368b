// Main loop on AMX tiles: 32 tokens by 32 neurons at a time, in four tiles of sums.
//
// One instruction adds 32 products to each of 16 × 16 sums: the even ones and the odd ones summed apart, then
// both to the tile. All tiles are whole, so that they are configured once: the last one of a block of tokens
// begins 16 rows before its end, and what overlaps is computed twice, to the same bits.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

constexpr int kTileRows = 16;
constexpr int kTileUnits = 16;

// Tiles 0 to 3 have the sums, 4 and 5 tokens, 6 and 7 neurons.
inline void configure_whole_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 4 * kTileUnits;
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

// Sums of the 16 tokens at `first` and, with Two, of the 16 at `second`.
template <Element element, bool Two>
void multiply_tiles(const float* hidden, int64_t row_stride, int64_t first, int64_t second,
                    const float* panel, int64_t depth, float (*total)[kWidth], Lookahead& lookahead) {
  constexpr int64_t kRowBytes = 4 * kWidth;
  zero_tile<0>();
  zero_tile<1>();
  if constexpr (Two) {
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t k = 0; k < depth; k += kTileUnits) {
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
  store_tile<0>(total[first], kRowBytes);
  store_tile<1>(total[first] + kLanes, kRowBytes);
  if constexpr (Two) {
    store_tile<2>(total[second], kRowBytes);
    store_tile<3>(total[second] + kLanes, kRowBytes);
  }
}

template <Element element>
void multiply_on_tiles(const float* hidden, int64_t row_stride, int64_t tokens, const float* panel,
                       int64_t depth, float (*total)[kWidth], Lookahead& lookahead) {
  const int64_t rows = tokens < kTileRows ? kTileRows : tokens;  // fewer are copied, with room for 16
  int64_t token = 0;
  for (; token + kTileRows < rows; token += 2 * kTileRows) {
    const int64_t next = token + kTileRows;
    multiply_tiles<element, true>(hidden, row_stride, token,
                                  next + kTileRows <= rows ? next : rows - kTileRows, panel, depth, total,
                                  lookahead);
  }
  if (token < rows) {
    multiply_tiles<element, false>(hidden, row_stride, rows - kTileRows, 0, panel, depth, total, lookahead);
  }
}

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
