// Converts the operators' tensors to the plain pointers that kernels take. All devices share it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "csrc/checks.h"
#include "csrc/projection.h"

namespace nemo_ext {

inline Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Element::BFloat16;
    case ScalarType::Half:
      return Element::Float16;
    default:
      return Element::Float32;
  }
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

// A Projection and the tensors that own its memory: converted copies of small arguments, and the results.
struct Call {
  Projection projection{};
  std::optional<Tensor> bias, scale, token_mask, gradient;
  std::optional<Tensor> values, activation, scale_gradient;
};

inline Call describe(const Sizes& sizes, const Tensor& hidden, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& scale) {
  Call call;
  Projection& p = call.projection;
  p.batch = sizes.batch;
  p.tokens = sizes.tokens;
  p.in_features = sizes.in_features;
  p.out_features = sizes.out_features;
  p.element = element_of(hidden);
  p.hidden = hidden.const_data_ptr();
  for (int axis = 0; axis < 3; ++axis) p.hidden_strides[axis] = hidden.stride(axis);
  p.weight = weight.const_data_ptr();
  for (int axis = 0; axis < 2; ++axis) p.weight_strides[axis] = weight.stride(axis);
  if (bias) {
    call.bias = contiguous_as(*bias, ScalarType::Float);
    p.bias = call.bias->const_data_ptr<float>();
  }
  if (scale) {
    call.scale = contiguous_as(*scale, ScalarType::Float);
    p.scale = call.scale->const_data_ptr<float>();
    p.scale_batch_stride = scale->dim() == 2 ? sizes.out_features : 0;
  }
  return call;
}

// The empty tensor that is returned if no values are wanted. The schema returns a tensor in both cases,
// because torch.compile cannot functionalize an operator with an optional result.
inline Tensor no_values(const Tensor& hidden) {
  return torch::stable::new_empty(hidden, {0});
}

inline void want_values(Call& call, const Tensor& hidden) {
  Projection& p = call.projection;
  call.values = torch::stable::new_empty(hidden, {p.batch, p.tokens, p.out_features});
  p.values = call.values->mutable_data_ptr();
}

inline void want_activation(Call& call, const Tensor& hidden, const std::optional<Tensor>& token_mask) {
  Projection& p = call.projection;
  if (token_mask) {
    call.token_mask = torch::stable::contiguous(*token_mask);
    p.token_mask = call.token_mask->const_data_ptr<bool>();
  }
  call.activation = torch::stable::new_empty(hidden, {p.batch, p.out_features}, ScalarType::Float);
  p.activation = call.activation->mutable_data_ptr<float>();
}

inline void want_scale_gradient(Call& call, const Tensor& hidden, const Tensor& gradient) {
  Projection& p = call.projection;
  call.gradient = torch::stable::contiguous(gradient);
  p.gradient = call.gradient->const_data_ptr();
  call.scale_gradient = torch::stable::new_empty(hidden, {p.batch, p.out_features}, ScalarType::Float);
  // Without tokens no kernel runs, and the sums are 0.
  if (p.tokens == 0) torch::stable::zero_(*call.scale_gradient);
  p.scale_gradient = call.scale_gradient->mutable_data_ptr<float>();
}

}  // namespace nemo_ext
