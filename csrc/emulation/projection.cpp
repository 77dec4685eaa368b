#include "csrc/emulation/projection.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "csrc/cuda/finish.cuh"

namespace nemo_ext::emulation {
namespace {

using namespace nemo_ext::cuda;

// The range from the first to the last element of a strided tensor.
Range strided(const char* name, const void* data, const int64_t* sizes, const int64_t* strides, int axes,
              size_t element_bytes) {
  int64_t first = 0, last = 0;
  for (int axis = 0; axis < axes; ++axis) {
    if (sizes[axis] == 0) return {data, 0, false, name};
    (strides[axis] < 0 ? first : last) += (sizes[axis] - 1) * strides[axis];
  }
  return {static_cast<const char*>(data) + first * int64_t(element_bytes), (last - first + 1) * element_bytes,
          false, name};
}

std::vector<Range> ranges_of(const cuda::Projection& p, const Plan& plan) {
  const size_t element_bytes = p.element == Element::Float32 ? 4 : 2;
  const int64_t hidden_sizes[] = {p.batch, p.tokens, p.in_features};
  const int64_t weight_sizes[] = {p.out_features, p.in_features};
  const size_t per_neuron = p.out_features * sizeof(float);
  const size_t per_value = p.batch * p.tokens * p.out_features * element_bytes;
  std::vector<Range> ranges;
  if (!p.products) {
    ranges.push_back(strided("hidden", p.hidden, hidden_sizes, p.hidden_strides, 3, element_bytes));
    ranges.push_back(strided("weight", p.weight, weight_sizes, p.weight_strides, 2, element_bytes));
  }
  const auto add = [&](const char* name, const void* data, size_t bytes, bool writable) {
    if (data) ranges.push_back({data, bytes, writable, name});
  };
  add("bias", p.bias, per_neuron, false);
  add("scale", p.scale, p.scale_batch_stride ? p.batch * per_neuron : per_neuron, false);
  add("token_mask", p.token_mask, p.batch * p.tokens, false);
  add("gradient", p.gradient, per_value, false);
  add("values", p.values, per_value, true);
  add("activation", p.activation, p.batch * per_neuron, true);
  add("scale_gradient", p.scale_gradient, p.batch * per_neuron, true);
  add("count", p.count, sizeof(double), false);
  add("count_before", p.count_before, sizeof(double), true);
  add("refused", p.refused, plan.partials * plan.columns * sizeof(int), true);
  add("products", p.products, p.batch * p.tokens * p.out_features * sizeof(float), false);
  add("partial_mean", p.partial_mean, plan.partials * per_neuron, true);
  add("partial_m2", p.partial_m2, plan.partials * per_neuron, true);
  return ranges;
}

std::vector<Range> ranges_of(const Merge& m) {
  const size_t neurons = m.out_features;
  return {{m.partial_mean, m.partials * neurons * sizeof(float), false, "partial_mean"},
          {m.partial_m2, m.partials * neurons * sizeof(float), false, "partial_m2"},
          {m.refused, m.warps * sizeof(int), false, "refused"},
          {m.count_before, sizeof(double), false, "count_before"},
          {m.count, sizeof(double), true, "count"},
          {m.mean, neurons * sizeof(double), true, "mean"},
          {m.m2, neurons * sizeof(double), true, "m2"}};
}

// Calls function(BlockTile<…>) with the tile of the element and shape, if its kernel is compiled. Builds with
// a planted fault have the kernels of one element only, because there are many such builds.
template <typename Function>
void with_compiled_tile(Element element, Shape shape, Function&& function) {
#ifdef NEMO_EXT_FLOAT16_ONLY
  // Not a runtime_error, which is what the emulation throws for a fault that it has caught.
  if (element != Element::Float16) throw std::invalid_argument("this build has the kernels of float16 only");
  with_block_tile_of<Float16>(shape, function);
#else
  with_block_tile(element, shape, function);
#endif
}

void launch(const cuda::Projection& projection, const Plan& plan, const Execution& execution) {
  with_compiled_tile(projection.element, plan.shape, [&](auto tile) {
    using T = decltype(tile);
    run({.grid_x = plan.grid_x,
         .grid_y = plan.grid_y,
         .threads = T::kThreads,
         .shared_bytes = T::kSharedBytes,
         .execution = execution},
        ranges_of(projection, plan), [&] { kernel_of<T>()(projection); });
  });
}

void launch(const Merge& m, const Execution& execution) {
  run({.grid_x = m.out_features > 0 ? ceil_divide(m.out_features, kMergeNeurons) : 1,
       .grid_y = 1,
       .threads = kMergeThreads,
       .shared_bytes = kMergeSharedBytes,
       .execution = execution},
      ranges_of(m), [&] { merge(m); });
}

}  // namespace

void project(const nemo_ext::Projection& projection, const std::optional<Products>& products,
             const Running& running, const Gpu& gpu, std::optional<Shape> shape, const Execution& execution) {
  cuda::Projection p{projection};
  p.count = running.count;
  const Plan layout = products ? plan_of_library(p, gpu, products->bytes)
                      : shape  ? plan_of_shape(p, *shape, gpu)
                               : plan(p, gpu);
  if (layout.grid_y == 0) return;
  const auto launch_all = [&] {
    if (!products) return launch(p, layout, execution);
    for (int64_t first = 0; first < p.batch; first += layout.prompts) {
      const int64_t count = std::min(layout.prompts, p.batch - first);
      launch(launch_of(p, layout, first, count, products->data + first * p.tokens * p.out_features), layout,
             execution);
    }
  };
  if (!running.count) {
    if (p.out_features > 0 && (p.values || p.tokens > 0)) launch_all();
    return;
  }
  std::vector<float> partials(2 * layout.partials * p.out_features, std::numeric_limits<float>::quiet_NaN());
  double count_before = std::numeric_limits<double>::quiet_NaN();
  std::vector<int> refused(layout.partials * layout.columns, -1);
  p.partial_mean = partials.data();
  p.partial_m2 = p.partial_mean + layout.partials * p.out_features;
  p.count_before = &count_before;
  p.refused = refused.data();
  launch_all();
  launch(Merge{p.batch, p.out_features, layout.partials, p.partial_mean, p.partial_m2,
               static_cast<int64_t>(refused.size()), p.refused, p.count_before, running.count, running.mean,
               running.m2},
         execution);
}

}  // namespace nemo_ext::emulation
