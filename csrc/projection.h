// One call of a value projection, in plain pointers: what the kernels of every device compute.
#pragma once

#include <cstdint>

namespace nemo_ext {

enum class Element { Float32, BFloat16, Float16 };

// values = (hidden weightᵀ + bias) · scale, and per prompt and neuron either
//   activation = mean over counted tokens of abs(hidden weightᵀ + bias), or
//   scale_gradient = sum over tokens of (hidden weightᵀ + bias) · gradient.
// Strides are in elements; what has none is contiguous.
struct Projection {
  int64_t batch, tokens, in_features, out_features;
  Element element;  // of hidden, weight, values and gradient
  const void* hidden;
  int64_t hidden_strides[3];
  const void* weight;
  int64_t weight_strides[2];
  const float* bias;           // [out_features] or null
  const float* scale;          // [out_features], [batch, out_features] or null
  int64_t scale_batch_stride;  // 0: one scale for all prompts
  const bool* token_mask;      // [batch, tokens] or null: every token counts
  void* values;                // [batch, tokens, out_features] or null
  float* activation;           // [batch, out_features] or null
  const void* gradient;        // [batch, tokens, out_features]: only with scale_gradient
  float* scale_gradient;       // [batch, out_features] or null: only without activation
};

}  // namespace nemo_ext
