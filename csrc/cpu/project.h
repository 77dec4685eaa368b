// Computes one prompt: for each token block and each panel it runs the main loop, then the epilogue.
//
// The order in which a sum is computed depends neither on the batch, nor on the thread, nor on the position
// in a tile or a block. So results are bit-identical for every batch size and every number of threads.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

inline bool reads_in_place(const Projection& p) {
  if (!can_read_as_words(p, p.hidden, p.hidden_strides[1], p.hidden_strides[2])) return false;
#if defined(NEMO_EXT_LIBRARY)
  return is_aligned(p.hidden) && p.hidden_strides[1] == p.in_features &&
         p.in_features * 4 % kAlignment == 0 && p.hidden_strides[0] * 4 % kAlignment == 0;
#else
  if (!multiplies_pairs(p)) return true;
#if defined(NEMO_EXT_TILES)
  if (p.tokens % kTokenBlock > 0 && p.tokens % kTokenBlock < kTileRows) return false;
#endif
  return p.hidden_strides[0] % 2 == 0;
#endif
}

int64_t scratch_size(const Projection& p) {
  return kTokenBlock * (kWidth + (reads_in_place(p) ? 0 : words_per_row(p)));
}

// Multiplies a token block with a panel by this variant's main loop.
template <bool Pairs>
void multiply(const Projection& p, const float* hidden, int64_t row_stride, int64_t tokens,
              const float* panel, int64_t depth, int64_t neurons, float (*accumulators)[kWidth],
              Lookahead& lookahead) {
#if defined(NEMO_EXT_LIBRARY)
  multiply_by_library(hidden, row_stride, tokens, panel, depth, neurons, accumulators);
#else
#if defined(NEMO_EXT_TILES)
  if constexpr (Pairs) {
    if (p.element == Element::BFloat16) {
      multiply_on_tiles<Element::BFloat16>(hidden, row_stride, tokens, panel, depth, accumulators, lookahead);
    } else {
      multiply_on_tiles<Element::Float16>(hidden, row_stride, tokens, panel, depth, accumulators, lookahead);
    }
    return;
  }
#endif
  multiply_on_vectors<Pairs>(hidden, row_stride, tokens, panel, depth, accumulators, lookahead);
#endif
}

template <bool Pairs>
void project_prompt(const Projection& p, const float* packed, int64_t prompt, int64_t begin, int64_t end,
                    float* scratch) {
  const bool in_place = reads_in_place(p);
  auto* const accumulators = reinterpret_cast<float (*)[kWidth]>(scratch);
  float* const copy = scratch + kTokenBlock * kWidth;
  // The sums over tokens, [batch, out_features], if any are wanted.
  float* const sums = p.activation ? p.activation : p.scale_gradient;
  for (int64_t block = 0; block < p.tokens; block += kTokenBlock) {
    const int64_t tokens = p.tokens - block < kTokenBlock ? p.tokens - block : kTokenBlock;
    const int64_t first_token = prompt * p.tokens + block;
    const void* source = offset(p, p.hidden, prompt * p.hidden_strides[0] + block * p.hidden_strides[1]);
    const float* hidden = static_cast<const float*>(source);
    int64_t row_stride = p.hidden_strides[1] / (Pairs ? 2 : 1);
    if (!in_place) {
      row_stride = words_per_row(p);
      hidden = copy;
      for (int64_t token = 0; token < tokens; ++token) {
        copy_words(p, offset(p, source, token * p.hidden_strides[1]), p.hidden_strides[2], p.in_features,
                   copy + token * row_stride, row_stride);
      }
    }
    bool hidden_is_finite = false, hidden_is_checked = false;
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* const weight = packed + (panel - begin) * panel_size(p);
      PanelOperands operands{panel * kWidth, p.out_features - panel * kWidth, {}, {}, {}};
      if (operands.count > kWidth) operands.count = kWidth;
      bool all_off = !sums;
      for (int64_t i = 0; i < operands.count; ++i) {
        const int64_t neuron = operands.first + i;
        operands.bias[i] = p.bias ? p.bias[neuron] : 0;
        operands.scale[i] = p.scale ? p.scale[prompt * p.scale_batch_stride + neuron] : 1;
        operands.sum[i] = sums && block ? sums[prompt * p.out_features + neuron] : 0;
        all_off = all_off && operands.scale[i] == 0;
      }
      // If all neurons of the panel are switched off and no sums are wanted, their products are not computed,
      // unless an operand is infinite or NaN: 0 · ∞ must stay NaN.
      if (all_off && !hidden_is_checked) {
        hidden_is_finite = true;
        for (int64_t token = 0; token < tokens && hidden_is_finite; ++token) {
          hidden_is_finite = is_finite(p, hidden + token * row_stride, words_per_row(p));
        }
        hidden_is_checked = true;
      }
      all_off = all_off && hidden_is_finite && is_finite(p, weight, words_per_row(p) * kWidth);
      if (all_off || words_per_row(p) == 0) {
        __builtin_memset(accumulators, 0, tokens * sizeof accumulators[0]);
      } else {
        Lookahead lookahead;
        if (in_place && row_stride == words_per_row(p)) {
          lookahead = Lookahead::share(hidden + p.hidden_strides[0] / (Pairs ? 2 : 1), tokens * row_stride,
                                       panel - begin, end - begin);
        }
        multiply<Pairs>(p, hidden, row_stride, tokens, weight, words_per_row(p), operands.count, accumulators,
                        lookahead);
      }
      finish(p, first_token, tokens, accumulators, operands);
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
  if (multiplies_pairs(p)) {
#if defined(NEMO_EXT_TILES)
    configure_full_tiles();
#endif
    project_prompt<true>(p, packed, prompt, begin, end, scratch);
#if defined(NEMO_EXT_TILES)
    release_tiles();
#endif
    return;
  }
#endif
  project_prompt<false>(p, packed, prompt, begin, end, scratch);
}

constexpr Variant kVariant{kWidth, panel_size, scratch_size, pack, project};

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
