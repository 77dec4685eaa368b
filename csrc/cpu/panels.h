// Panels: weight packed for the main loops of our own. For each unit of in_features, the panel's neurons lie
// side by side, in two vectors.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

constexpr int kWidth = 2 * kLanes;  // neurons of a panel

int64_t panel_size(const Projection& p) {
  return units(p) * kWidth;
}

template <int... Index>
struct Lanes {};

#if NEMO_EXT_LANES == 16
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif NEMO_EXT_LANES == 8
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
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
                     p.weight_strides[1], left < count * per_unit ? left : count * per_unit, rows[lane],
                     count);
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

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
