// CPU kernels of the value projection: checks, packing, threads, running statistics. The arithmetic is in
// tile_impl.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "csrc/checks.h"
#include "csrc/cpu/tile.h"
#include "csrc/math.h"

namespace nemo_ext::cpu {
namespace {

using torch::stable::parallel_for;

const Variant& variant() {
  static const Variant chosen = [] {
    switch (capability()) {
#if defined(__x86_64__)
      case Capability::Avx2:
        return avx2_variant();
      case Capability::Avx512:
        return avx512_variant();
      case Capability::Avx512Bf16:
        return avx512_bf16_variant();
#endif
      default:
        return default_variant();
    }
  }();
  return chosen;
}

// Memory that a thread keeps from call to call: fresh pages would cost more than a small projection does. It
// grows to the largest weight seen, and is uninitialized.
struct Workspace {
  std::unique_ptr<float[]> memory;
  int64_t size = 0;

  float* at_least(int64_t floats) {
    if (floats > size) {
      memory.reset();
      size = 0;
      memory.reset(new float[floats]);
      size = floats;
    }
    return memory.get();
  }
};

// The packed weight belongs to the calling thread, the copy of a block of hidden to each worker.
thread_local Workspace packed_weight;
thread_local Workspace hidden_block;

Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Element::BFloat16;
    case ScalarType::Half:
      return Element::Float16;
    default:
      return Element::Float32;
  }
}

// A small tensor as contiguous floats (bools for a mask).
Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

// The tensors that a Projection points into.
struct Operands {
  std::optional<Tensor> bias, scale, token_mask;
};

Projection describe(const Sizes& sizes, const Tensor& hidden, const Tensor& weight,
                    const Operands& operands) {
  Projection p{};
  p.batch = sizes.batch;
  p.tokens = sizes.tokens;
  p.in_features = sizes.in_features;
  p.out_features = sizes.out_features;
  p.element = element_of(hidden);
  p.hidden = hidden.const_data_ptr();
  for (int axis = 0; axis < 3; ++axis) p.hidden_strides[axis] = hidden.stride(axis);
  p.weight = weight.const_data_ptr();
  for (int axis = 0; axis < 2; ++axis) p.weight_strides[axis] = weight.stride(axis);
  if (operands.bias) p.bias = operands.bias->const_data_ptr<float>();
  if (operands.scale) {
    p.scale = operands.scale->const_data_ptr<float>();
    p.scale_batch_stride = operands.scale->dim() == 2 ? sizes.out_features : 0;
  }
  if (operands.token_mask) p.token_mask = operands.token_mask->const_data_ptr<bool>();
  return p;
}

void run(const Projection& p) {
  if (p.batch == 0 || p.tokens == 0 || p.out_features == 0) return;
  const Variant& kernels = variant();
  const int64_t panels = (p.out_features + kernels.panel_width - 1) / kernels.panel_width;
  const int64_t panel_size = kernels.panel_size(p);
  float* packed = packed_weight.at_least(panels * panel_size);
  parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) kernels.pack(p, panel, packed + panel * panel_size);
  });

  // Few prompts are cut into groups of panels so that every thread gets work; how they are cut changes no
  // result.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + p.batch - 1) / p.batch;
  const int64_t groups = wanted < panels ? wanted : panels;
  parallel_for(0, p.batch * groups, 1, [&](int64_t begin, int64_t end) {
    float* scratch = hidden_block.at_least(kernels.scratch_size(p));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t prompt = item / groups, group = item % groups;
      kernels.project(p, packed, prompt, group * panels / groups, (group + 1) * panels / groups, scratch);
    }
  });
}

Operands operands_of(const std::optional<Tensor>& bias, const std::optional<Tensor>& scale) {
  Operands operands;
  if (bias) operands.bias = contiguous_as(*bias, ScalarType::Float);
  if (scale) operands.scale = contiguous_as(*scale, ScalarType::Float);
  return operands;
}

Tensor value_projection(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& scale) {
  const Sizes sizes = check_projection(hidden, weight, bias, scale);
  const Operands operands = operands_of(bias, scale);
  Tensor values = torch::stable::new_empty(hidden, {sizes.batch, sizes.tokens, sizes.out_features});
  Projection p = describe(sizes, hidden, weight, operands);
  p.values = values.mutable_data_ptr();
  run(p);
  return values;
}

// Tokens that count, prompt by prompt: there must be one, or the mean over them is undefined.
void check_tokens(const Sizes& sizes, const bool* mask) {
  for (int64_t prompt = 0; prompt < sizes.batch; ++prompt) {
    bool any = !mask && sizes.tokens > 0;
    for (int64_t token = 0; mask && token < sizes.tokens && !any; ++token)
      any = mask[prompt * sizes.tokens + token];
    if (!any) {
      fail(mask ? "token_mask" : "hidden",
           " must leave at least one token of every prompt, got none for prompt ", prompt);
    }
  }
}

void check_finite(const Sizes& sizes, const float* activation) {
  for (int64_t index = 0; index < sizes.batch * sizes.out_features; ++index) {
    if (!std::isfinite(activation[index])) {
      fail("activation must be finite to enter the running statistics, got ", activation[index],
           " for prompt ", index / sizes.out_features, ", neuron ", index % sizes.out_features,
           ": count, mean and m2 are unchanged");
    }
  }
}

std::tuple<Tensor, Tensor> value_projection_stats(const Tensor& hidden, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& scale,
                                                  const std::optional<Tensor>& token_mask,
                                                  const Tensor& count, const Tensor& mean, const Tensor& m2,
                                                  bool return_values) {
  const Sizes sizes = check_projection(hidden, weight, bias, scale);
  check_statistics(sizes, hidden, token_mask, count, mean, m2);
  Operands operands = operands_of(bias, scale);
  if (token_mask) operands.token_mask = torch::stable::contiguous(*token_mask);
  Projection p = describe(sizes, hidden, weight, operands);
  check_tokens(sizes, p.token_mask);

  Tensor activation = torch::stable::new_empty(hidden, {sizes.batch, sizes.out_features}, ScalarType::Float);
  p.activation = activation.mutable_data_ptr<float>();
  // The schema returns a tensor either way: an optional one cannot be functionalized by torch.compile.
  Tensor values = return_values
                      ? torch::stable::new_empty(hidden, {sizes.batch, sizes.tokens, sizes.out_features})
                      : torch::stable::new_empty(hidden, {0});
  if (return_values) p.values = values.mutable_data_ptr();
  run(p);

  // Nothing is written to the running buffers before this has passed.
  check_finite(sizes, p.activation);
  double* running_count = count.mutable_data_ptr<double>();
  double* running_mean = mean.mutable_data_ptr<double>();
  double* running_m2 = m2.mutable_data_ptr<double>();
  parallel_for(0, sizes.out_features, 256, [&](int64_t begin, int64_t end) {
    for (int64_t neuron = begin; neuron < end; ++neuron) {
      Moments<float> part;
      for (int64_t prompt = 0; prompt < sizes.batch; ++prompt) {
        welford_update(part, p.activation[prompt * sizes.out_features + neuron]);
      }
      Moments<double> running{*running_count, running_mean[neuron], running_m2[neuron]};
      chan_merge(running, part);
      running_mean[neuron] = running.mean;
      running_m2[neuron] = running.m2;
    }
  });
  *running_count += static_cast<double>(sizes.batch);
  return {values, activation};
}

}  // namespace
}  // namespace nemo_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(nemo_ext, CPU, library) {
  library.impl("value_projection", TORCH_BOX(&nemo_ext::cpu::value_projection));
  library.impl("value_projection_stats", TORCH_BOX(&nemo_ext::cpu::value_projection_stats));
}
