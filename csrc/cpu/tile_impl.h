// The kernels of one variant. A translation unit sets its target, NEMO_EXT_VARIANT (a namespace),
// NEMO_EXT_LANES (floats in a vector), NEMO_EXT_ROWS (tokens in a tile), and then includes this file;
// everything here is in that namespace, so no two variants can be merged by the linker. Nothing of the
// standard library is called: an inline function of it compiled here could be the one that a CPU without the
// target runs.
//
// Every value is one chain of fused multiply-adds over in_features, in blocks of kBlock, in an order that
// depends neither on the batch, nor on the thread, nor on where in a tile it stands. That is what makes
// results bit-identical whatever the batch size and the number of threads.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

constexpr int kLanes = NEMO_EXT_LANES;
constexpr int kRows = NEMO_EXT_ROWS;
constexpr int kWidth = 2 * kLanes;
constexpr int kTokens = 7 * kRows;  // tokens of one block: its copy of hidden stays in the L2 cache
constexpr int kBlock = 384;  // terms that are added up before they join the total: bounds the rounding error

typedef float Vector __attribute__((vector_size(4 * NEMO_EXT_LANES)));
typedef float UnalignedVector __attribute__((vector_size(4 * NEMO_EXT_LANES), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * NEMO_EXT_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * NEMO_EXT_LANES)));
typedef Halves UnalignedHalves __attribute__((aligned(2)));

inline Vector load(const float* source) {
  return *reinterpret_cast<const UnalignedVector*>(source);
}
inline void store(float* target, Vector vector) {
  *reinterpret_cast<UnalignedVector*>(target) = vector;
}
inline void store(uint16_t* target, Halves halves) {
  *reinterpret_cast<UnalignedHalves*>(target) = halves;
}

// A unit is what one lane takes in one step: a float, or a pair of bfloat16 where the CPU has their dot
// product.
inline bool in_pairs(const Projection& p) {
#if defined(NEMO_EXT_BF16_DOT)
  return p.element == Element::BFloat16;
#else
  return false;
#endif
}

inline int64_t units(const Projection& p) {
  return in_pairs(p) ? (p.in_features + 1) / 2 : p.in_features;
}

// Lane by lane, because arithmetic on a unit that holds a pair could turn its bits into another NaN.
inline Vector broadcast(float unit) {
#if NEMO_EXT_LANES == 16
  return Vector{unit, unit, unit, unit, unit, unit, unit, unit,
                unit, unit, unit, unit, unit, unit, unit, unit};
#elif NEMO_EXT_LANES == 8
  return Vector{unit, unit, unit, unit, unit, unit, unit, unit};
#else
  return Vector{unit, unit, unit, unit};
#endif
}

template <int... Index>
struct Lanes {};

#if NEMO_EXT_LANES == 16
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif NEMO_EXT_LANES == 8
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

// Swaps the off-diagonal blocks of every 2·Size × 2·Size square; for Size = 1, 2, 4, … this is a
// transposition.
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

template <bool Pairs>
inline void multiply_add(Vector& sum, Vector left, Vector right) {
#if defined(NEMO_EXT_BF16_DOT)
  if constexpr (Pairs) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
    return;
  }
#endif
  sum += left * right;
}

inline float to_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

#if defined(NEMO_EXT_F16C)
inline float half_to_float(uint16_t half) {
  return _cvtsh_ss(half);
}
inline Halves to_halves(Vector values) {
#if NEMO_EXT_LANES == 16
  // With a mask, because g++ 12 takes what its header leaves undefined for an oversight.
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)values, _MM_FROUND_TO_NEAREST_INT);
#else
  return (Halves)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
#endif
}
#else
inline float half_to_float(uint16_t half) {
  return c10::detail::fp16_ieee_to_fp32_value(half);
}
inline Halves to_halves(Vector values) {
  Halves halves;
  for (int lane = 0; lane < kLanes; ++lane)
    halves[lane] = c10::detail::fp16_ieee_from_fp32_value(values[lane]);
  return halves;
}
#endif

// Round to nearest even; a NaN stays one.
inline Halves to_bfloat16(Vector values) {
#if defined(NEMO_EXT_BF16_DOT)
  return (Halves)_mm512_cvtneps_pbh((__m512)values);
#else
  const Bits bits = (Bits)values;
  const Bits nan = (Bits)(values != values);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
#endif
}

// Copies `count` elements that lie `stride` apart, as units; the odd half of a last pair is 0.
inline void copy_units(const Projection& p, const void* source, int64_t stride, int64_t count,
                       float* target) {
  const auto* wide = static_cast<const float*>(source);
  const auto* narrow = static_cast<const uint16_t*>(source);
  if (in_pairs(p)) {
    auto* halves = reinterpret_cast<unsigned char*>(target);
    if (stride == 1) {
      __builtin_memcpy(halves, narrow, 2 * count);
    } else {
      for (int64_t i = 0; i < count; ++i) __builtin_memcpy(halves + 2 * i, narrow + i * stride, 2);
    }
    if (count % 2) __builtin_memset(halves + 2 * count, 0, 2);
  } else if (p.element == Element::Float32) {
    for (int64_t i = 0; i < count; ++i) target[i] = wide[i * stride];
  } else if (p.element == Element::BFloat16) {
    for (int64_t i = 0; i < count; ++i) target[i] = to_float(narrow[i * stride]);
  } else {
    int64_t i = 0;
#if defined(NEMO_EXT_F16C)
    if (stride == 1) {
      for (; i + 8 <= count; i += 8) {
        _mm256_storeu_ps(target + i,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow + i))));
      }
    }
#endif
    for (; i < count; ++i) target[i] = half_to_float(narrow[i * stride]);
  }
}

inline const void* offset(const Projection& p, const void* base, int64_t elements) {
  return static_cast<const char*>(base) + elements * (p.element == Element::Float32 ? 4 : 2);
}

int64_t panel_size(const Projection& p) {
  return units(p) * kWidth;
}

// Whether a matrix whose rows lie `row_stride` elements apart can be read as units where it is.
inline bool is_of_units(const Projection& p, const void* base, int64_t row_stride, int64_t stride) {
  if (stride != 1) return false;
  return p.element == Element::Float32 || (in_pairs(p) && p.in_features % 2 == 0 && row_stride % 2 == 0 &&
                                           reinterpret_cast<uintptr_t>(base) % 4 == 0);
}

inline bool reads_in_place(const Projection& p) {
  return is_of_units(p, p.hidden, p.hidden_strides[1], p.hidden_strides[2]) &&
         (!in_pairs(p) || p.hidden_strides[0] % 2 == 0);
}

int64_t scratch_size(const Projection& p) {
  return reads_in_place(p) ? 0 : kTokens * units(p);
}

void pack(const Projection& p, int64_t panel, float* packed) {
  constexpr int kStep = 64;  // units of a row that are moved at a time
  float rows[kWidth][kStep];
  const int64_t per_unit = in_pairs(p) ? 2 : 1;
  const bool in_place = is_of_units(p, p.weight, p.weight_strides[0], p.weight_strides[1]) &&
                        (panel + 1) * kWidth <= p.out_features;
  for (int64_t begin = 0; begin < units(p); begin += kStep) {
    const int64_t count = units(p) - begin < kStep ? units(p) - begin : kStep;
    const int64_t first = begin * per_unit;
    const float* source = rows[0];
    int64_t stride = kStep;
    if (in_place) {
      source = static_cast<const float*>(offset(p, p.weight, panel * kWidth * p.weight_strides[0] + first));
      stride = p.weight_strides[0] / per_unit;
    } else {
      const int64_t left = p.in_features - first;
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const int64_t neuron = panel * kWidth + lane;
        if (neuron < p.out_features) {
          copy_units(p, offset(p, p.weight, neuron * p.weight_strides[0] + first * p.weight_strides[1]),
                     p.weight_strides[1], left < count * per_unit ? left : count * per_unit, rows[lane]);
        } else {
          __builtin_memset(rows[lane], 0, sizeof rows[lane]);
        }
      }
    }
    float* target = packed + begin * kWidth;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int half = 0; half < kWidth; half += kLanes) {
        Vector square[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          square[lane] = load(source + (half + lane) * stride + i);
          // The same place in the next panel: rows are too short for the hardware to see where they go on.
          __builtin_prefetch(source + (half + lane + kWidth) * stride + i, 0, 2);
        }
        swap_blocks<1>(square, AllLanes{});
        for (int unit = 0; unit < kLanes; ++unit) store(target + (i + unit) * kWidth + half, square[unit]);
      }
    }
    for (; i < count; ++i) {
      for (int64_t lane = 0; lane < kWidth; ++lane) target[i * kWidth + lane] = source[lane * stride + i];
    }
  }
}

// Adds the products of `steps` units of Rows tokens with those of a panel to `total`.
template <int Rows, bool Pairs>
void multiply(const float* hidden, int64_t row_stride, const float* panel, int64_t steps,
              float (*total)[kWidth]) {
  Vector sum[Rows][2] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < steps; ++k) {
    const Vector left = load(panel + k * kWidth);
    const Vector right = load(panel + k * kWidth + kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Vector unit = broadcast(hidden[row * row_stride + k]);
      multiply_add<Pairs>(sum[row][0], unit, left);
      multiply_add<Pairs>(sum[row][1], unit, right);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
    store(total[row], load(total[row]) + sum[row][0]);
    store(total[row] + kLanes, load(total[row] + kLanes) + sum[row][1]);
  }
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, float (*)[kWidth]);

template <bool Pairs, int Rows = kRows>
Multiply multiply_for(int64_t rows) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_for<Pairs, Rows - 1>(rows);
  }
  return multiply<Rows, Pairs>;
}

// Whether no element of `count` units is infinite or NaN.
template <bool Pairs>
bool is_finite(const float* units, int64_t count) {
  uint32_t not_finite = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, units + i, sizeof bits);
    not_finite |= (bits & 0x7f800000) == 0x7f800000;
    if (Pairs) not_finite |= (bits & 0x7f80) == 0x7f80;
  }
  return not_finite == 0;
}

// Writes the first `count` values of one token, rounded once to the type of hidden.
inline void write_values(const Projection& p, int64_t first, Vector left, Vector right, int64_t count) {
  void* const target = const_cast<void*>(offset(p, p.values, first));
  float buffer[kWidth];
  void* const row = count == kWidth ? target : buffer;
  if (p.element == Element::Float32) {
    store(static_cast<float*>(row), left);
    store(static_cast<float*>(row) + kLanes, right);
  } else {
    const bool bfloat16 = p.element == Element::BFloat16;
    auto* halves = static_cast<uint16_t*>(row);
    store(halves, bfloat16 ? to_bfloat16(left) : to_halves(left));
    store(halves + kLanes, bfloat16 ? to_bfloat16(right) : to_halves(right));
  }
  if (row != target) __builtin_memcpy(target, buffer, count * (p.element == Element::Float32 ? 4 : 2));
}

// The other way round: `count` elements of the gradient of one token.
inline void read_gradient(const Projection& p, int64_t first, int64_t count, float* gradient) {
  const void* source = offset(p, p.gradient, first);
  for (int64_t i = 0; i < count; ++i) {
    if (p.element == Element::Float32) {
      gradient[i] = static_cast<const float*>(source)[i];
    } else if (p.element == Element::BFloat16) {
      gradient[i] = to_float(static_cast<const uint16_t*>(source)[i]);
    } else {
      gradient[i] = half_to_float(static_cast<const uint16_t*>(source)[i]);
    }
  }
}

// Bias, sums over tokens and values of `rows` tokens, of which `token` is the first, once they are
// multiplied. Adds to `sum`.
inline void finish(const Projection& p, int64_t token, int64_t rows, int64_t first, int64_t count,
                   const float (*total)[kWidth], const float* bias, const float* scale, float* sum) {
  const Vector bias_left = load(bias), bias_right = load(bias + kLanes);
  const Vector scale_left = load(scale), scale_right = load(scale + kLanes);
  const Bits magnitude = Bits{} + 0x7fffffff;
  Vector part_left = {}, part_right = {};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t index = token + row;
    const Vector left = load(total[row]) + bias_left, right = load(total[row] + kLanes) + bias_right;
    if (p.activation && (!p.token_mask || p.token_mask[index])) {
      part_left += (Vector)((Bits)left & magnitude);
      part_right += (Vector)((Bits)right & magnitude);
    }
    if (p.scale_gradient) {
      float gradient[kWidth] = {};
      read_gradient(p, index * p.out_features + first, count, gradient);
      part_left += left * load(gradient);
      part_right += right * load(gradient + kLanes);
    }
    if (p.values) {
      // Adding 0 makes 0 of -0: a switched-off neuron does not show whether it was multiplied.
      const Vector zero = {};
      write_values(p, index * p.out_features + first, left * scale_left + zero, right * scale_right + zero,
                   count);
    }
  }
  store(sum, load(sum) + part_left);
  store(sum + kLanes, load(sum + kLanes) + part_right);
}

template <bool Pairs>
void project_units(const Projection& p, const float* packed, int64_t prompt, int64_t begin, int64_t end,
                   float* scratch) {
  const bool in_place = reads_in_place(p);
  float* const sums = p.activation ? p.activation : p.scale_gradient;  // over tokens, per prompt and neuron
  for (int64_t block = 0; block < p.tokens; block += kTokens) {
    const int64_t tokens = p.tokens - block < kTokens ? p.tokens - block : kTokens;
    const void* source = offset(p, p.hidden, prompt * p.hidden_strides[0] + block * p.hidden_strides[1]);
    const float* hidden = static_cast<const float*>(source);
    int64_t row_stride = p.hidden_strides[1] / (Pairs ? 2 : 1);
    if (!in_place) {
      row_stride = units(p);
      hidden = scratch;
      for (int64_t token = 0; token < tokens; ++token) {
        copy_units(p, offset(p, source, token * p.hidden_strides[1]), p.hidden_strides[2], p.in_features,
                   scratch + token * row_stride);
      }
    }
    bool hidden_is_finite = false, hidden_is_checked = false;
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* const weight = packed + (panel - begin) * panel_size(p);
      const int64_t first = panel * kWidth;
      const int64_t count = p.out_features - first < kWidth ? p.out_features - first : kWidth;
      float bias[kWidth] = {}, scale[kWidth] = {}, sum[kWidth] = {}, total[kTokens][kWidth];
      bool off = !sums;
      for (int64_t i = 0; i < count; ++i) {
        bias[i] = p.bias ? p.bias[first + i] : 0;
        scale[i] = p.scale ? p.scale[prompt * p.scale_batch_stride + first + i] : 1;
        sum[i] = sums && block ? sums[prompt * p.out_features + first + i] : 0;
        off = off && scale[i] == 0;
      }
      // Where all neurons are switched off nothing is multiplied, unless 0 would hide an infinity.
      if (off && !hidden_is_checked) {
        hidden_is_finite = true;
        for (int64_t token = 0; token < tokens && hidden_is_finite; ++token) {
          hidden_is_finite = is_finite<Pairs>(hidden + token * row_stride, units(p));
        }
        hidden_is_checked = true;
      }
      off = off && hidden_is_finite && is_finite<Pairs>(weight, units(p) * kWidth);
      const int64_t depth = off ? 0 : units(p);
      __builtin_memset(total, 0, sizeof total);
      int64_t k = 0;
      do {
        const int64_t steps = depth - k < kBlock ? depth - k : kBlock;
        for (int64_t token = 0; token < tokens; token += kRows) {
          const int64_t rows = tokens - token < kRows ? tokens - token : kRows;
          if (in_place && panel + 1 == end) {  // fetches the same part of the next prompt
            const float* next = hidden + p.hidden_strides[0] / (Pairs ? 2 : 1) + token * row_stride + k;
            for (int64_t row = 0; row < rows; ++row) {
              for (int64_t i = 0; i < steps; i += 16) __builtin_prefetch(next + row * row_stride + i, 0, 2);
            }
          }
          multiply_for<Pairs>(rows)(hidden + token * row_stride + k, row_stride, weight + k * kWidth, steps,
                                    total + token);
          if (k + steps == depth) {
            finish(p, prompt * p.tokens + block + token, rows, first, count, total + token, bias, scale, sum);
          }
        }
        k += steps;
      } while (k < depth);
      if (sums) {
        for (int64_t i = 0; i < count; ++i) sums[prompt * p.out_features + first + i] = sum[i];
      }
    }
  }
  if (p.activation) {
    int64_t counted = p.tokens;
    if (p.token_mask) {
      counted = 0;
      for (int64_t token = 0; token < p.tokens; ++token) counted += p.token_mask[prompt * p.tokens + token];
    }
    const int64_t last = end * kWidth < p.out_features ? end * kWidth : p.out_features;
    for (int64_t i = begin * kWidth; i < last; ++i) p.activation[prompt * p.out_features + i] /= counted;
  }
}

void project(const Projection& p, const float* packed, int64_t prompt, int64_t begin, int64_t end,
             float* scratch) {
  if (in_pairs(p)) {
    project_units<NEMO_EXT_PAIRS>(p, packed, prompt, begin, end, scratch);
  } else {
    project_units<false>(p, packed, prompt, begin, end, scratch);
  }
}

constexpr Variant kVariant{kWidth, panel_size, scratch_size, pack, project};

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
