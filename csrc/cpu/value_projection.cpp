// The operators on the CPU: they check the arguments, run the chosen variant and update the running
// statistics.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "csrc/cpu/driver.h"
#include "csrc/cpu/variant.h"
#include "csrc/math.h"
#include "csrc/operands.h"

namespace nemo_ext::cpu {
namespace {

const Variant& variant() {
  static const Variant chosen = [] {
    switch (choice().capability) {
#if defined(__x86_64__)
      case Capability::Avx2:
        return avx2_variant();
      case Capability::Avx512:
        return avx512_variant();
      case Capability::Avx512Bf16:
        return avx512_bf16_variant();
      case Capability::Amx:
        return amx_variant();
#endif
      default:
        return default_variant();
    }
  }();
  return chosen;
}

void run(const Projection& p) {
  cpu::run(variant(), p, torch::stable::get_num_threads(),
           [](int64_t count, const auto& work) { torch::stable::parallel_for(0, count, 1, work); });
}

Tensor value_projection(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& scale) {
  Call call = describe(check_projection(hidden, weight, bias, scale), hidden, weight, bias, scale);
  want_values(call, hidden);
  run(call.projection);
  return *call.values;
}

Tensor value_projection_scale_gradient(const Tensor& gradient, const Tensor& hidden, const Tensor& weight,
                                       const std::optional<Tensor>& bias) {
  const Sizes sizes = check_projection(hidden, weight, bias, std::nullopt);
  check_gradient(sizes, hidden, gradient);
  Call call = describe(sizes, hidden, weight, bias, std::nullopt);
  want_scale_gradient(call, hidden, gradient);
  run(call.projection);
  return *call.scale_gradient;
}

void check_mask(const Sizes& sizes, const bool* mask) {
  for (int64_t prompt = 0; prompt < sizes.batch; ++prompt) {
    bool any = false;
    for (int64_t token = 0; token < sizes.tokens && !any; ++token) any = mask[prompt * sizes.tokens + token];
    if (!any) fail("token_mask must leave at least one token of every prompt, got none for prompt ", prompt);
  }
}

void check_activation(const Sizes& sizes, const float* activation) {
  for (int64_t index = 0; index < sizes.batch * sizes.out_features; ++index) {
    if (!enters_statistics(activation[index])) {
      fail("activation must be finite and less than 2**50 to enter the running statistics, got ",
           activation[index], " for prompt ", index / sizes.out_features, ", neuron ",
           index % sizes.out_features, ": count, mean and m2 are unchanged");
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
  Call call = describe(sizes, hidden, weight, bias, scale);
  want_activation(call, hidden, token_mask);
  if (return_values) want_values(call, hidden);
  const Projection& p = call.projection;
  if (p.token_mask) check_mask(sizes, p.token_mask);
  run(p);

  // This check precedes every write to the running buffers, so that an error leaves them unchanged.
  check_activation(sizes, p.activation);
  double* running_count = count.mutable_data_ptr<double>();
  double* running_mean = mean.mutable_data_ptr<double>();
  double* running_m2 = m2.mutable_data_ptr<double>();
  torch::stable::parallel_for(0, sizes.out_features, 256, [&](int64_t begin, int64_t end) {
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
  return {return_values ? *call.values : no_values(hidden), *call.activation};
}

}  // namespace
}  // namespace nemo_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(nemo_ext, CPU, library) {
  library.impl("value_projection", TORCH_BOX(&nemo_ext::cpu::value_projection));
  library.impl("value_projection_stats", TORCH_BOX(&nemo_ext::cpu::value_projection_stats));
  library.impl("value_projection_scale_gradient", TORCH_BOX(&nemo_ext::cpu::value_projection_scale_gradient));
}
