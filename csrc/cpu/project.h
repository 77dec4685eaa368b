// One prompt through one variant: its rows of hidden, panel by panel through the main loop and the epilogue.
//
// A sum's order depends neither on the batch, nor on the thread, nor on where in a tile or a block it stands.
// That is what makes results bit-identical whatever the batch size and the number of threads.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

inline bool reads_in_place(const Projection& p) {
  if (!is_of_units(p, p.hidden, p.hidden_strides[1], p.hidden_strides[2])) return false;
#if defined(NEMO_EXT_LIBRARY)
  return is_aligned(p.hidden) && p.hidden_strides[1] == p.in_features &&
         p.in_features * 4 % kAlignment == 0 && p.hidden_strides[0] * 4 % kAlignment == 0;
#else
  if (!in_pairs(p)) return true;
#if defined(NEMO_EXT_TILES)
  if (p.tokens % kTokens > 0 && p.tokens % kTokens < kTileRows) return false;
#endif
  return p.hidden_strides[0] % 2 == 0;
#endif
}

int64_t scratch_size(const Projection& p) {
  return kTokens * (kWidth + (reads_in_place(p) ? 0 : units(p)));
}

// Products of a block of tokens with a panel.
template <bool Pairs>
void multiply(const Projection& p, const float* hidden, int64_t row_stride, int64_t tokens,
              const float* panel, int64_t depth, int64_t neurons, float (*total)[kWidth],
              Lookahead& lookahead) {
#if defined(NEMO_EXT_LIBRARY)
  multiply_by_library(hidden, row_stride, tokens, panel, depth, neurons, total);
#else
#if defined(NEMO_EXT_TILES)
  if constexpr (Pairs) {
    if (p.element == Element::BFloat16) {
      multiply_on_tiles<Element::BFloat16>(hidden, row_stride, tokens, panel, depth, total, lookahead);
    } else {
      multiply_on_tiles<Element::Float16>(hidden, row_stride, tokens, panel, depth, total, lookahead);
    }
    return;
  }
#endif
  multiply_on_vectors<Pairs>(hidden, row_stride, tokens, panel, depth, total, lookahead);
#endif
}

template <bool Pairs>
void project_units(const Projection& p, const float* packed, int64_t prompt, int64_t begin, int64_t end,
                   float* scratch) {
  const bool in_place = reads_in_place(p);
  auto* const total = reinterpret_cast<float (*)[kWidth]>(scratch);
  float* const copy = scratch + kTokens * kWidth;
  float* const sums = p.activation ? p.activation : p.scale_gradient;  // over tokens, per prompt and neuron
  for (int64_t block = 0; block < p.tokens; block += kTokens) {
    const int64_t tokens = p.tokens - block < kTokens ? p.tokens - block : kTokens;
    const int64_t first_token = prompt * p.tokens + block;
    const void* source = offset(p, p.hidden, prompt * p.hidden_strides[0] + block * p.hidden_strides[1]);
    const float* hidden = static_cast<const float*>(source);
    int64_t row_stride = p.hidden_strides[1] / (Pairs ? 2 : 1);
    if (!in_place) {
      row_stride = units(p);
      hidden = copy;
      for (int64_t token = 0; token < tokens; ++token) {
        copy_units(p, offset(p, source, token * p.hidden_strides[1]), p.hidden_strides[2], p.in_features,
                   copy + token * row_stride, row_stride);
      }
    }
    bool hidden_is_finite = false, hidden_is_checked = false;
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* const weight = packed + (panel - begin) * panel_size(p);
      PanelOperands operands{panel * kWidth, p.out_features - panel * kWidth, {}, {}, {}};
      if (operands.count > kWidth) operands.count = kWidth;
      bool off = !sums;
      for (int64_t i = 0; i < operands.count; ++i) {
        const int64_t neuron = operands.first + i;
        operands.bias[i] = p.bias ? p.bias[neuron] : 0;
        operands.scale[i] = p.scale ? p.scale[prompt * p.scale_batch_stride + neuron] : 1;
        operands.sum[i] = sums && block ? sums[prompt * p.out_features + neuron] : 0;
        off = off && operands.scale[i] == 0;
      }
      // Where all neurons are switched off nothing is multiplied, unless 0 would hide an infinity.
      if (off && !hidden_is_checked) {
        hidden_is_finite = true;
        for (int64_t token = 0; token < tokens && hidden_is_finite; ++token) {
          hidden_is_finite = is_finite(p, hidden + token * row_stride, units(p));
        }
        hidden_is_checked = true;
      }
      off = off && hidden_is_finite && is_finite(p, weight, units(p) * kWidth);
      if (off || units(p) == 0) {
        __builtin_memset(total, 0, tokens * sizeof total[0]);
      } else {
        Lookahead lookahead;
        if (in_place && row_stride == units(p)) {
          lookahead = Lookahead::share(hidden + p.hidden_strides[0] / (Pairs ? 2 : 1), tokens * row_stride,
                                       panel - begin, end - begin);
        }
        multiply<Pairs>(p, hidden, row_stride, tokens, weight, units(p), operands.count, total, lookahead);
      }
      finish(p, first_token, tokens, total, operands);
      if (sums) {
        for (int64_t i = 0; i < operands.count; ++i)
          sums[prompt * p.out_features + operands.first + i] = operands.sum[i];
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
#if defined(NEMO_EXT_BF16_DOT)
  if (in_pairs(p)) {
#if defined(NEMO_EXT_TILES)
    configure_whole_tiles();
#endif
    project_units<true>(p, packed, prompt, begin, end, scratch);
#if defined(NEMO_EXT_TILES)
    release_tiles();
#endif
    return;
  }
#endif
  project_units<false>(p, packed, prompt, begin, end, scratch);
}

constexpr Variant kVariant{kWidth, panel_size, scratch_size, pack, project};

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
