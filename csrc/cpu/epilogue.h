// Epilogue: adds the bias to the accumulators, sums over tokens, multiplies by the scale and writes the
// values. All main loops share it, and no other code writes results.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

// Operands of one panel's neurons for one prompt, and their sums over the tokens so far.
struct PanelOperands {
  int64_t first, count;  // index of the first neuron, number of neurons
  float bias[kWidth], scale[kWidth], sum[kWidth];
};

enum class SumOver { Nothing, Magnitudes, Gradients };

// Tokens are added to a partial sum, and partial sums to the sum of the prompt, which reduces the rounding
// error. A token block holds whole partial sums, so that all variants add in the same order.
constexpr int kTokensPerPartialSum = 11;
static_assert(kTokenBlock % kTokensPerPartialSum == 0);

template <Element element>
inline void store_values(void* target, Vector values) {
  if constexpr (element == Element::Float32) {
    store(static_cast<float*>(target), values);
  } else if constexpr (element == Element::BFloat16) {
    store(static_cast<uint16_t*>(target), to_bfloat16(values));
  } else {
    store(static_cast<uint16_t*>(target), to_halves(values));
  }
}

template <Element element>
inline Vector load_gradient(const void* source) {
  if constexpr (element == Element::Float32) return load(static_cast<const float*>(source));
  Vector gradient;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint16_t half;
    __builtin_memcpy(&half, static_cast<const uint16_t*>(source) + lane, sizeof half);
    gradient[lane] = element == Element::BFloat16 ? to_float(half) : half_to_float(half);
  }
  return gradient;
}

// Epilogue of `tokens` rows of accumulators, which begin with the token `token`, and of Columns vectors of
// neurons, which begin at `column` of the panel. A vector may have fewer neurons than lanes only if Columns
// is 1.
template <Element element, bool write_values, SumOver sum_over, int Columns>
void finish_columns(const Projection& p, int64_t token, int64_t tokens, const float (*accumulators)[kWidth],
                    int64_t column, PanelOperands& panel) {
  constexpr int64_t kBytes = element == Element::Float32 ? 4 : 2;
  constexpr int64_t kVectorBytes = kLanes * kBytes;
  const int64_t count = panel.count - column;
  const int64_t row_bytes = p.out_features * kBytes;
  const int64_t start = token * row_bytes + (panel.first + column) * kBytes;
  const Bits magnitude = Bits{} + 0x7fffffff;
  Vector bias[Columns], scale[Columns], sum[Columns];
  for (int i = 0; i < Columns; ++i) {
    bias[i] = load(panel.bias + column + i * kLanes);
    scale[i] = load(panel.scale + column + i * kLanes);
    sum[i] = load(panel.sum + column + i * kLanes);
  }
  for (int64_t begin = 0; begin < tokens; begin += kTokensPerPartialSum) {
    const int64_t end = begin + kTokensPerPartialSum < tokens ? begin + kTokensPerPartialSum : tokens;
    Vector partial[Columns] = {};
    for (int64_t row = begin; row < end; ++row) {
      const bool is_counted = sum_over == SumOver::Magnitudes && (!p.token_mask || p.token_mask[token + row]);
      const int64_t byte_offset = start + row * row_bytes;
#pragma GCC unroll 4
      for (int i = 0; i < Columns; ++i) {
        const Vector projected = load(accumulators[row] + column + i * kLanes) + bias[i];
        float buffer[kLanes] = {};  // replaces memory that a partly filled vector must not access
        const bool whole = Columns > 1 || count >= kLanes;
        if constexpr (sum_over == SumOver::Magnitudes) {
          if (is_counted) partial[i] += (Vector)((Bits)projected & magnitude);
        }
        if constexpr (sum_over == SumOver::Gradients) {
          const void* source = static_cast<const char*>(p.gradient) + byte_offset + i * kVectorBytes;
          if (!whole) source = __builtin_memcpy(buffer, source, count * kBytes);
          multiply_add(partial[i], projected, load_gradient<element>(source));
        }
        if constexpr (write_values) {
          // Adding 0 turns -0 into 0, so that a switched-off neuron has the same bits whether or not its
          // products were computed.
          const Vector values = projected * scale[i] + Vector{};
          char* const target = static_cast<char*>(p.values) + byte_offset + i * kVectorBytes;
          store_values<element>(whole ? target : reinterpret_cast<char*>(buffer), values);
          if (!whole) __builtin_memcpy(target, buffer, count * kBytes);
        }
      }
    }
    for (int i = 0; i < Columns; ++i) sum[i] += partial[i];
  }
  for (int i = 0; i < Columns; ++i) store(panel.sum + column + i * kLanes, sum[i]);
}

template <Element element, bool write_values, SumOver sum_over>
void finish_panel(const Projection& p, int64_t token, int64_t tokens, const float (*accumulators)[kWidth],
                  PanelOperands& panel) {
  constexpr int kColumns = 2;  // more vectors do not fit into the registers of the baseline
  int64_t column = 0;
  for (; column + kColumns * kLanes <= panel.count; column += kColumns * kLanes)
    finish_columns<element, write_values, sum_over, kColumns>(p, token, tokens, accumulators, column, panel);
  for (; column < panel.count; column += kLanes)
    finish_columns<element, write_values, sum_over, 1>(p, token, tokens, accumulators, column, panel);
}

template <Element element>
void finish_element(const Projection& p, int64_t token, int64_t tokens, const float (*accumulators)[kWidth],
                    PanelOperands& panel) {
  if (p.scale_gradient) {
    finish_panel<element, false, SumOver::Gradients>(p, token, tokens, accumulators, panel);
  } else if (!p.activation) {
    finish_panel<element, true, SumOver::Nothing>(p, token, tokens, accumulators, panel);
  } else if (!p.values) {
    finish_panel<element, false, SumOver::Magnitudes>(p, token, tokens, accumulators, panel);
  } else {
    finish_panel<element, true, SumOver::Magnitudes>(p, token, tokens, accumulators, panel);
  }
}

inline void finish(const Projection& p, int64_t token, int64_t tokens, const float (*accumulators)[kWidth],
                   PanelOperands& panel) {
  if (p.element == Element::Float32) {
    finish_element<Element::Float32>(p, token, tokens, accumulators, panel);
  } else if (p.element == Element::BFloat16) {
    finish_element<Element::BFloat16>(p, token, tokens, accumulators, panel);
  } else {
    finish_element<Element::Float16>(p, token, tokens, accumulators, panel);
  }
}

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
