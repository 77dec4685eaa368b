// Epilogue: from the sums over in_features to bias, sums over tokens, scale and values. The one place that
// writes results, whatever main loop came before.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

// Per-neuron operands of one panel for one prompt, and its sums over tokens so far.
struct PanelOperands {
  int64_t first, count;  // neurons
  float bias[kWidth], scale[kWidth], sum[kWidth];
};

enum class SumOver { Nothing, Magnitudes, Gradients };

// Tokens whose sums are made apart before they join the total: a smaller rounding error. Blocks consist of
// whole parts, so that all variants add up in one order.
constexpr int kTokensOfPart = 11;
static_assert(kTokens % kTokensOfPart == 0);

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

// `tokens` rows of sums, of which `token` is the first; Columns vectors of neurons, `column` the first of
// them. The last may have fewer neurons than lanes, if it is alone.
template <Element element, bool write_values, SumOver sum_over, int Columns>
void finish_columns(const Projection& p, int64_t token, int64_t tokens, const float (*total)[kWidth],
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
  for (int64_t begin = 0; begin < tokens; begin += kTokensOfPart) {
    const int64_t end = begin + kTokensOfPart < tokens ? begin + kTokensOfPart : tokens;
    Vector part[Columns] = {};
    for (int64_t row = begin; row < end; ++row) {
      const bool counts = sum_over == SumOver::Magnitudes && (!p.token_mask || p.token_mask[token + row]);
      const int64_t place = start + row * row_bytes;
#pragma GCC unroll 4
      for (int i = 0; i < Columns; ++i) {
        const Vector projected = load(total[row] + column + i * kLanes) + bias[i];
        float buffer[kLanes] = {};  // of a last vector, which must not be read or written beyond the neurons
        const bool whole = Columns > 1 || count >= kLanes;
        if constexpr (sum_over == SumOver::Magnitudes) {
          if (counts) part[i] += (Vector)((Bits)projected & magnitude);
        }
        if constexpr (sum_over == SumOver::Gradients) {
          const void* source = static_cast<const char*>(p.gradient) + place + i * kVectorBytes;
          if (!whole) source = __builtin_memcpy(buffer, source, count * kBytes);
          multiply_add(part[i], projected, load_gradient<element>(source));
        }
        if constexpr (write_values) {
          // Adding 0 makes 0 of -0: a switched-off neuron does not show whether it was multiplied.
          const Vector values = projected * scale[i] + Vector{};
          char* const target = static_cast<char*>(p.values) + place + i * kVectorBytes;
          store_values<element>(whole ? target : reinterpret_cast<char*>(buffer), values);
          if (!whole) __builtin_memcpy(target, buffer, count * kBytes);
        }
      }
    }
    for (int i = 0; i < Columns; ++i) sum[i] += part[i];
  }
  for (int i = 0; i < Columns; ++i) store(panel.sum + column + i * kLanes, sum[i]);
}

template <Element element, bool write_values, SumOver sum_over>
void finish_panel(const Projection& p, int64_t token, int64_t tokens, const float (*total)[kWidth],
                  PanelOperands& panel) {
  constexpr int kColumns = 2;  // more would not fit into the registers of the baseline
  int64_t column = 0;
  for (; column + kColumns * kLanes <= panel.count; column += kColumns * kLanes)
    finish_columns<element, write_values, sum_over, kColumns>(p, token, tokens, total, column, panel);
  for (; column < panel.count; column += kLanes)
    finish_columns<element, write_values, sum_over, 1>(p, token, tokens, total, column, panel);
}

template <Element element>
void finish_element(const Projection& p, int64_t token, int64_t tokens, const float (*total)[kWidth],
                    PanelOperands& panel) {
  if (p.scale_gradient) {
    finish_panel<element, false, SumOver::Gradients>(p, token, tokens, total, panel);
  } else if (!p.activation) {
    finish_panel<element, true, SumOver::Nothing>(p, token, tokens, total, panel);
  } else if (!p.values) {
    finish_panel<element, false, SumOver::Magnitudes>(p, token, tokens, total, panel);
  } else {
    finish_panel<element, true, SumOver::Magnitudes>(p, token, tokens, total, panel);
  }
}

inline void finish(const Projection& p, int64_t token, int64_t tokens, const float (*total)[kWidth],
                   PanelOperands& panel) {
  if (p.element == Element::Float32) {
    finish_element<Element::Float32>(p, token, tokens, total, panel);
  } else if (p.element == Element::BFloat16) {
    finish_element<Element::BFloat16>(p, token, tokens, total, panel);
  } else {
    finish_element<Element::Float16>(p, token, tokens, total, panel);
  }
}

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
