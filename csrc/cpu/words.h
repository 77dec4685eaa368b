// Words: a word is the 32 bits that one lane of a vector or one element of a tile takes in one step. It holds
// a float, or a pair of 16-bit elements if the variant multiplies pairs. This file copies rows of hidden and
// weight to words.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

inline bool multiplies_pairs(const Projection& p) {
#if defined(NEMO_EXT_TILES)
  return p.element == Element::BFloat16 || (p.element == Element::Float16 && has_float16_tiles());
#elif defined(NEMO_EXT_BF16_DOT)
  return p.element == Element::BFloat16;
#else
  return false;
#endif
}

// Number of words of one row, including the zeros that fill its last pair or tile.
inline int64_t words_per_row(const Projection& p) {
  if (!multiplies_pairs(p)) return p.in_features;
#if defined(NEMO_EXT_TILES)
  return (p.in_features + 31) / 32 * 16;
#else
  return (p.in_features + 1) / 2;
#endif
}

inline const void* offset(const Projection& p, const void* base, int64_t elements) {
  return static_cast<const char*>(base) + elements * (p.element == Element::Float32 ? 4 : 2);
}

// True if a matrix can be read as words in place. Both strides are in elements.
inline bool can_read_as_words(const Projection& p, const void* base, int64_t row_stride, int64_t stride) {
  if (stride != 1) return false;
  if (!multiplies_pairs(p)) return p.element == Element::Float32;
  return p.in_features == 2 * words_per_row(p) && row_stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(base) % 4 == 0;
}

// Copies `count` elements with stride `stride` into `size` words. The remaining words become 0.
inline void copy_words(const Projection& p, const void* source, int64_t stride, int64_t count, float* target,
                       int64_t size) {
  const auto* wide = static_cast<const float*>(source);
  const auto* narrow = static_cast<const uint16_t*>(source);
  if (multiplies_pairs(p)) {
    auto* halves = reinterpret_cast<unsigned char*>(target);
    if (stride == 1) {
      __builtin_memcpy(halves, narrow, 2 * count);
    } else {
      for (int64_t i = 0; i < count; ++i) __builtin_memcpy(halves + 2 * i, narrow + i * stride, 2);
    }
    __builtin_memset(halves + 2 * count, 0, 4 * size - 2 * count);
    return;
  }
  int64_t i = 0;
  if (p.element == Element::Float32) {
    if (stride == 1) {
      __builtin_memcpy(target, wide, 4 * count);
      i = count;
    }
    for (; i < count; ++i) target[i] = wide[i * stride];
  } else if (p.element == Element::BFloat16) {
    if (stride == 1) {
      // A loop of its own, so that the compiler vectorizes it.
      for (; i < count; ++i) target[i] = to_float(narrow[i]);
    }
    for (; i < count; ++i) target[i] = to_float(narrow[i * stride]);
  } else {
    if (stride == 1) {
      for (; i + 8 <= count; i += 8) eight_halves_to_floats(narrow + i, target + i);
    }
    for (; i < count; ++i) target[i] = half_to_float(narrow[i * stride]);
  }
  __builtin_memset(target + count, 0, 4 * (size - count));
}

// True if no element of `count` words is infinite or NaN.
inline bool is_finite(const Projection& p, const float* words, int64_t count) {
  // Masks of the exponent, whose bits are all 1 in an infinity or a NaN: one for a float, one for each
  // element of a pair.
  const uint32_t upper = !multiplies_pairs(p) || p.element == Element::BFloat16 ? 0x7f800000 : 0x7c000000;
  const uint32_t lower = !multiplies_pairs(p) ? 0 : upper >> 16;
  uint32_t not_finite = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, words + i, sizeof bits);
    not_finite |= (bits & upper) == upper || (lower && (bits & lower) == lower);
  }
  return not_finite == 0;
}

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
