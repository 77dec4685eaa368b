// Panels: the weight, packed for the main loops on vectors and on tiles. A panel stores, for each word of
// in_features, that word of all its neurons side by side, in two vectors.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

constexpr int kWidth = 2 * kLanes;  // neurons of a panel

int64_t panel_size(const Projection& p) {
  return words_per_row(p) * kWidth;
}

template <int... Index>
struct Lanes {};

#if NEMO_EXT_LANES == 16
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif NEMO_EXT_LANES == 8
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#endif

// Transposes a square of kLanes × kLanes words: for Size = 1, 2, 4, …, it swaps the two off-diagonal blocks
// of every 2·Size × 2·Size square.
template <int Size, int... Lane>
inline void swap_blocks(Vector (&rows)[kLanes], Lanes<Lane...> lanes) {
  if constexpr (Size < kLanes) {
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) {
      if (row & Size) continue;
      const Vector upper = rows[row], lower = rows[row + Size];
#if defined(__clang__)
      rows[row] = __builtin_shufflevector(upper, lower, (Lane & Size ? kLanes + Lane - Size : Lane)...);
      rows[row + Size] =
          __builtin_shufflevector(upper, lower, (Lane & Size ? kLanes + Lane : Lane + Size)...);
#else
      typedef int Order __attribute__((vector_size(4 * NEMO_EXT_LANES)));
      rows[row] = __builtin_shuffle(upper, lower, Order{(Lane & Size ? kLanes + Lane - Size : Lane)...});
      rows[row + Size] =
          __builtin_shuffle(upper, lower, Order{(Lane & Size ? kLanes + Lane : Lane + Size)...});
#endif
    }
    swap_blocks<2 * Size>(rows, lanes);
  }
}

// Loads kLanes words of a row, from index `first` on. If `source` is a 16-bit type, the row holds elements of
// that type and each is converted to a float; otherwise it holds words, which are loaded as they are.
template <Element source>
inline Vector load_words(const char* row, int64_t first) {
  if constexpr (source == Element::Float32) return load(reinterpret_cast<const float*>(row) + first);
  const auto* halves = reinterpret_cast<const uint16_t*>(row) + first;
  if constexpr (source == Element::BFloat16) {
    const Halves upper = *reinterpret_cast<const UnalignedHalves*>(halves);
    return (Vector)(__builtin_convertvector(upper, Bits) << 16);
  }
  float floats[kLanes];
  for (int lane = 0; lane < kLanes; lane += 8) eight_halves_to_floats(halves + lane, floats + lane);
  return load(floats);
}

// Transposes `count` words of kWidth rows. `row_bytes` is the distance from one row to the next.
template <Element source>
void transpose(const char* rows, int64_t row_bytes, int64_t count, float* target) {
  constexpr int64_t kBytes = source == Element::Float32 ? 4 : 2;
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int half = 0; half < kWidth; half += kLanes) {
      Vector square[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const char* const row = rows + (half + lane) * row_bytes;
        square[lane] = load_words<source>(row, i);
        // Prefetch the same position of the next panel, because the rows are too short for the hardware
        // prefetcher to detect the pattern.
        __builtin_prefetch(row + kWidth * row_bytes + i * kBytes, 0, 2);
      }
      swap_blocks<1>(square, AllLanes{});
      for (int word = 0; word < kLanes; ++word) store(target + (i + word) * kWidth + half, square[word]);
    }
  }
}

void pack(const Projection& p, int64_t panel, float* packed) {
  const int64_t first_row = panel * kWidth;
  const bool whole = first_row + kWidth <= p.out_features && p.weight_strides[1] == 1;
  const auto* rows = static_cast<const char*>(offset(p, p.weight, first_row * p.weight_strides[0]));
  int64_t done = 0;  // words of each row that are packed already
  if (whole && can_read_as_words(p, p.weight, p.weight_strides[0], 1)) {
    done = words_per_row(p) / kLanes * kLanes;
    transpose<Element::Float32>(rows, p.weight_strides[0] * (multiplies_pairs(p) ? 2 : 4), done, packed);
  } else if (whole && !multiplies_pairs(p)) {
    done = words_per_row(p) / kLanes * kLanes;
    if (p.element == Element::BFloat16) {
      transpose<Element::BFloat16>(rows, p.weight_strides[0] * 2, done, packed);
    } else {
      transpose<Element::Float16>(rows, p.weight_strides[0] * 2, done, packed);
    }
  }
  // All else takes a detour through `copy`: strided rows, a last panel that is not full, and the last words
  // of each row.
  constexpr int kStep = 4 * kLanes;  // words of a row that are copied at a time
  float copy[kWidth][kStep];
  const int64_t per_word = multiplies_pairs(p) ? 2 : 1;
  for (int64_t begin = done; begin < words_per_row(p); begin += kStep) {
    const int64_t count = words_per_row(p) - begin < kStep ? words_per_row(p) - begin : kStep;
    const int64_t first = begin * per_word;
    const int64_t left = p.in_features - first < count * per_word ? p.in_features - first : count * per_word;
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      const int64_t neuron = first_row + lane;
      if (neuron < p.out_features) {
        copy_words(p, offset(p, p.weight, neuron * p.weight_strides[0] + first * p.weight_strides[1]),
                   p.weight_strides[1], left, copy[lane], kStep);
      } else {
        __builtin_memset(copy[lane], 0, sizeof copy[lane]);
      }
    }
    float transposed[kStep][kWidth];
    transpose<Element::Float32>(reinterpret_cast<const char*>(copy), sizeof copy[0], kStep, transposed[0]);
    __builtin_memcpy(packed + begin * kWidth, transposed, count * sizeof transposed[0]);
  }
}

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
