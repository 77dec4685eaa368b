// One call of a value projection in plain pointers, as the kernels of every device take it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace nemo_ext {

enum class Element { Float32, BFloat16, Float16 };

// The element with a dtype's name in Python.
inline Element element_named(const std::string& name) {
  if (name == "float32") return Element::Float32;
  if (name == "bfloat16") return Element::BFloat16;
  if (name == "float16") return Element::Float16;
  throw std::runtime_error("element must be float32, bfloat16 or float16, got " + name);
}

// The kernels compute values = (hidden weightᵀ + bias) · scale, and for each prompt and neuron one of
//   activation = mean over the tokens of token_mask of abs(hidden weightᵀ + bias)
//   scale_gradient = sum over tokens of (hidden weightᵀ + bias) · gradient
// A result whose pointer is null is not computed. Strides are in elements; an operand without strides is
// contiguous.
struct Projection {
  int64_t batch, tokens, in_features, out_features;
  Element element;  // dtype of hidden, weight, values and gradient
  const void* hidden;
  int64_t hidden_strides[3];
  const void* weight;
  int64_t weight_strides[2];
  const float* bias;           // [out_features] or null
  const float* scale;          // [out_features], [batch, out_features] or null
  int64_t scale_batch_stride;  // 0 if all prompts share one scale
  const bool* token_mask;      // [batch, tokens], or null to include every token
  void* values;                // [batch, tokens, out_features] or null
  float* activation;           // [batch, out_features] or null
  const void* gradient;        // [batch, tokens, out_features], used with scale_gradient only
  float* scale_gradient;       // [batch, out_features] or null; null if activation is not
};

}  // namespace nemo_ext
