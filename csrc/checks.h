// Checks of the operators' arguments. Each message names the argument, what it must be, and what it is.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace nemo_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) text << (axis ? ", " : "") << tensor.size(axis);
  text << ']';
  return text.str();
}

// The dtype's name in Python.
inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string name_of(torch::stable::Device device) {
  const char* type = device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another device";
  return device.is_cuda() ? std::string(type) + ":" + std::to_string(device.index()) : type;
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& hidden) {
  if (tensor.device() != hidden.device()) {
    fail(name, " must be on ", name_of(hidden.device()), " like hidden, got ", name_of(tensor.device()));
  }
}

// `wanted` is the shape by the names of its axes, for example "[out_features]".
inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                        const char* wanted) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (auto size = sizes.begin(); same && size != sizes.end(); ++size, ++axis)
    same = tensor.size(axis) == *size;
  if (same) return;
  std::ostringstream numbers;
  for (auto size = sizes.begin(); size != sizes.end(); ++size)
    numbers << (size != sizes.begin() ? ", " : "") << *size;
  fail(name, " must have shape ", wanted, " = [", numbers.str(), "], got ", shape_of(tensor));
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType wanted) {
  if (tensor.scalar_type() != wanted) {
    fail(name, " must be ", name_of(wanted), ", got ", name_of(tensor.scalar_type()));
  }
}

// For bias and scale, which may be float32 although hidden and weight are half precision.
inline void check_dtype_or_float(const char* name, const Tensor& tensor, ScalarType wanted) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != wanted && dtype != ScalarType::Float) {
    const std::string like_hidden =
        wanted == ScalarType::Float ? "" : std::string(" or ") + name_of(wanted) + " like hidden";
    fail(name, " must be float32", like_hidden, ", got ", name_of(dtype));
  }
}

// Sizes of a value projection, after all checks.
struct Sizes {
  int64_t batch, tokens, in_features, out_features;
};

inline Sizes check_projection(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& scale) {
  if (hidden.dim() != 3) fail("hidden must have shape [batch, tokens, in_features], got ", shape_of(hidden));
  const ScalarType dtype = hidden.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    fail("hidden must be float32, bfloat16 or float16, got ", name_of(dtype));
  }
  if (weight.dim() != 2 || weight.size(1) != hidden.size(2)) {
    fail("weight must have shape [out_features, in_features] with in_features = ", hidden.size(2), ", got ",
         shape_of(weight));
  }
  check_dtype("weight", weight, dtype);
  check_device("weight", weight, hidden);
  const Sizes sizes{hidden.size(0), hidden.size(1), hidden.size(2), weight.size(0)};
  if (bias) {
    check_shape("bias", *bias, {sizes.out_features}, "[out_features]");
    check_dtype_or_float("bias", *bias, dtype);
    check_device("bias", *bias, hidden);
  }
  if (scale) {
    if (scale->dim() == 1) {
      check_shape("scale", *scale, {sizes.out_features}, "[out_features]");
    } else {
      check_shape("scale", *scale, {sizes.batch, sizes.out_features},
                  "[out_features] or [batch, out_features]");
    }
    check_dtype_or_float("scale", *scale, dtype);
    check_device("scale", *scale, hidden);
  }
  return sizes;
}

inline void check_gradient(const Sizes& sizes, const Tensor& hidden, const Tensor& gradient) {
  check_shape("gradient", gradient, {sizes.batch, sizes.tokens, sizes.out_features},
              "[batch, tokens, out_features]");
  check_dtype("gradient", gradient, hidden.scalar_type());
  check_device("gradient", gradient, hidden);
}

// The activation is a mean over tokens, so it needs at least one. This check reads shapes only; a mask that
// excludes every token is found by the kernels, because it depends on data.
inline void check_some_tokens(const Sizes& sizes, const std::optional<Tensor>& token_mask) {
  if (sizes.batch > 0 && sizes.tokens == 0) {
    fail(token_mask ? "token_mask" : "hidden",
         " must leave at least one token of every prompt, got none for prompt 0");
  }
}

inline void check_statistics(const Sizes& sizes, const Tensor& hidden,
                             const std::optional<Tensor>& token_mask, const Tensor& count, const Tensor& mean,
                             const Tensor& m2) {
  if (token_mask) {
    check_shape("token_mask", *token_mask, {sizes.batch, sizes.tokens}, "[batch, tokens]");
    check_dtype("token_mask", *token_mask, ScalarType::Bool);
    check_device("token_mask", *token_mask, hidden);
  }
  check_shape("count", count, {}, "[]");
  check_shape("mean", mean, {sizes.out_features}, "[out_features]");
  check_shape("m2", m2, {sizes.out_features}, "[out_features]");
  const struct {
    const char* name;
    const Tensor& tensor;
  } buffers[] = {{"count", count}, {"mean", mean}, {"m2", m2}};
  for (const auto& buffer : buffers) {
    check_dtype(buffer.name, buffer.tensor, ScalarType::Double);
    check_device(buffer.name, buffer.tensor, hidden);
    if (!buffer.tensor.is_contiguous()) {
      fail(buffer.name, " must be contiguous because it is updated in place, got stride ",
           buffer.tensor.stride(0));
    }
  }
  check_some_tokens(sizes, token_mask);
  const auto* first = static_cast<const double*>(mean.const_data_ptr());
  const auto* second = static_cast<const double*>(m2.const_data_ptr());
  if (first < second + sizes.out_features && second < first + sizes.out_features) {
    fail("mean and m2 must not share memory: both are updated in place");
  }
}

}  // namespace nemo_ext
