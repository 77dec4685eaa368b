// CPU kernels of the value projection: checks, packing, threads, running statistics. The arithmetic is in
// tile_impl.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "csrc/cpu/tile.h"
#include "csrc/math.h"
#include "csrc/operands.h"

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
// starts at a cache line, and is uninitialized.
struct Workspace {
  static constexpr std::align_val_t kAlignment{64};

  float* memory = nullptr;
  int64_t size = 0;

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { ::operator delete[](memory, kAlignment); }

  float* at_least(int64_t floats) {
    if (floats > size) {
      ::operator delete[](memory, kAlignment);
      memory = nullptr;
      size = 0;
      memory = static_cast<float*>(::operator new[](floats * sizeof(float), kAlignment));
      size = floats;
    }
    return memory;
  }
};

thread_local Workspace workspace;

// Floats of packed weight that stay in a core's L2 cache while all prompts pass by.
constexpr int64_t kPackedSize = 512 * 1024 / sizeof(float);

// Prompts next to whose product the time to pack a weight for them is small.
constexpr int64_t kPromptsWorthPacking = 32;

void run(const Projection& p) {
  if (p.batch == 0 || p.tokens == 0 || p.out_features == 0) return;
  const Variant& kernels = variant();
  const int64_t panels = ceil_divide(p.out_features, kernels.panel_width);
  const int64_t panel_size = kernels.panel_size(p);

  // Every piece of work packs a group of panels and multiplies a part of the prompts with it. Several threads
  // get prompts of their own where these are many, for then no two of them write to the same pages of memory;
  // and else smaller groups, and parts where these do not suffice. How the work is cut changes no result.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  const int64_t fitting = std::max<int64_t>(1, kPackedSize / std::max<int64_t>(1, panel_size));
  const int64_t own = std::clamp<int64_t>(p.batch / kPromptsWorthPacking, 1, threads);
  const int64_t groups = std::min(panels, std::max(ceil_divide(wanted, own), ceil_divide(panels, fitting)));
  const int64_t parts = std::min(p.batch, std::max(own, ceil_divide(wanted, groups)));
  const int64_t largest_group = ceil_divide(panels, groups);
  parallel_for(0, groups * parts, 1, [&](int64_t first_piece, int64_t last_piece) {
    float* packed = workspace.at_least(largest_group * panel_size + kernels.scratch_size(p));
    float* scratch = packed + largest_group * panel_size;
    for (int64_t piece = first_piece; piece < last_piece; ++piece) {
      const int64_t group = piece % groups, part = piece / groups;
      const int64_t begin = group * panels / groups, end = (group + 1) * panels / groups;
      for (int64_t panel = begin; panel < end; ++panel) {
        kernels.pack(p, panel, packed + (panel - begin) * panel_size);
      }
      for (int64_t prompt = part * p.batch / parts; prompt < (part + 1) * p.batch / parts; ++prompt) {
        kernels.project(p, packed, prompt, begin, end, scratch);
      }
    }
  });
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
  Call call = describe(sizes, hidden, weight, bias, scale);
  want_activation(call, hidden, token_mask);
  if (return_values) want_values(call, hidden);
  const Projection& p = call.projection;
  if (p.token_mask) check_mask(sizes, p.token_mask);
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
  return {return_values ? *call.values : no_values(hidden), *call.activation};
}

}  // namespace
}  // namespace nemo_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(nemo_ext, CPU, library) {
  library.impl("value_projection", TORCH_BOX(&nemo_ext::cpu::value_projection));
  library.impl("value_projection_stats", TORCH_BOX(&nemo_ext::cpu::value_projection_stats));
  library.impl("value_projection_scale_gradient", TORCH_BOX(&nemo_ext::cpu::value_projection_scale_gradient));
}
