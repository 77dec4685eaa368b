// The operators on CUDA: they check the arguments, allocate results and workspace, and launch the kernels on
// the current stream. Nothing here waits for the GPU, so that errors in the data (a prompt without a token,
// an activation that is not finite or too large) raise no exception: the activation shows them, and the
// running statistics stay unchanged.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/path.h"
#include "csrc/operands.h"

// From torch 2.13 on. It is weak, so that one binary loads with earlier ones too.
extern "C" __attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream,
                                                                           void** handle);

namespace nemo_ext::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// The current cudaStream_t of a device. Before 2.13, only a function in a library of torch's CUDA builds
// tells it, with which this binary cannot be linked, because it also serves the CPU builds.
void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (torch_stream_native_handle) {
    StreamHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
    const torch::stable::accelerator::Stream owner(handle);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_stream_native_handle(handle, &stream));
    return stream;
  }
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const auto function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(found);
  }();
  if (!function)
    fail("this build of torch does not tell the current CUDA stream: install torch 2.13 or later");
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// The GPU of the tensors, which is the current device as long as the object lives, and its current stream.
class Device {
 public:
  explicit Device(const Tensor& hidden)
      : index_(hidden.device().index()), guard_(index_), gpu_(select_device(index_)) {}

  const Gpu& gpu() const { return gpu_; }
  void* stream() const { return current_stream(index_); }

 private:
  int32_t index_;
  DeviceGuard guard_;
  Gpu gpu_;
};

// The kernels count prompts, tokens, features, neurons and token tiles in 32 bits.
void check_size(const Sizes& sizes) {
  constexpr int64_t kMost = int64_t(1) << 30;
  const int64_t tiles = ceil_divide(sizes.tokens, kLeastTileTokens);
  if (sizes.tokens > kMost || sizes.in_features > kMost || sizes.batch > kMost ||
      (tiles > 0 && sizes.batch > kMost / tiles)) {
    fail("hidden must have at most 2**30 tokens, features, and tiles of ", kLeastTileTokens,
         " tokens on CUDA, got [", sizes.batch, ", ", sizes.tokens, ", ", sizes.in_features, "]");
  }
  if (sizes.out_features > kMost) {
    fail("weight must have at most 2**30 out_features on CUDA, got ", sizes.out_features);
  }
}

// The operand, or a copy of it that the fast kernels can load.
Tensor loadable(const Tensor& operand) {
  const int axes = static_cast<int>(operand.dim());
  int64_t sizes[3], strides[3];
  for (int axis = 0; axis < axes; ++axis) {
    sizes[axis] = operand.size(axis);
    strides[axis] = operand.stride(axis);
  }
  if (!is_better_copied(operand.const_data_ptr(), sizes, strides, axes,
                        static_cast<int>(operand.element_size()))) {
    return operand;
  }
  Tensor copy = torch::stable::new_empty(operand, operand.sizes());
  torch::stable::copy_(copy, operand);
  return copy;
}

// The path that a call takes, with its operands as that path can load them.
struct Route {
  Path path;
  Tensor hidden, weight;
};

Route route_of(const Device& device, const Tensor& hidden, const Tensor& weight) {
  const Path path = path_of(element_of(hidden), device.gpu().architecture);
  if (path == Path::Library) return {path, hidden, weight};
  return {path, loadable(hidden), loadable(weight)};
}

Plan plan_of(const Route& route, const Projection& p, const Device& device) {
  return route.path == Path::Library ? plan_of_library(p, device.gpu()) : plan(p, device.gpu());
}

// hidden weightᵀ of prompts [first, first + count) in float32, by PyTorch's library.
Tensor products_of(Tensor hidden, const Tensor& weight, int64_t first, int64_t count) {
  hidden = torch::stable::narrow(hidden, 0, first, count);
  const Tensor rows = torch::stable::reshape(hidden, {count * hidden.size(1), hidden.size(2)});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(rows),
                                    torch::stable::detail::from(torch::stable::transpose(weight, 0, 1)),
                                    torch::stable::detail::from(ScalarType::Float)};
  const char* overload = hidden.scalar_type() == ScalarType::Float ? "" : "dtype";
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Launches what the plan says. A kernel may still read products when this has returned: torch's allocator
// reuses their memory in stream order.
void compute(const Projection& p, const Plan& layout, const Route& route, void* stream) {
  if (route.path == Path::Kernel) {
    launch(p, layout, stream);
    return;
  }
  for (int64_t first = 0; first < p.batch; first += layout.prompts) {
    const int64_t count = std::min(layout.prompts, p.batch - first);
    const Tensor products = products_of(route.hidden, route.weight, first, count);
    launch(launch_of(p, layout, first, count, products.const_data_ptr<float>()), layout, stream);
  }
}

Tensor value_projection(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& scale) {
  const Sizes sizes = check_projection(hidden, weight, bias, scale);
  check_size(sizes);
  const Device device(hidden);
  const Route route = route_of(device, hidden, weight);
  Call call = describe(sizes, route.hidden, route.weight, bias, scale);
  want_values(call, hidden);
  const Projection p{call.projection};
  const Plan layout = plan_of(route, p, device);
  if (layout.grid_y > 0 && sizes.out_features > 0) compute(p, layout, route, device.stream());
  return *call.values;
}

Tensor value_projection_scale_gradient(const Tensor& gradient, const Tensor& hidden, const Tensor& weight,
                                       const std::optional<Tensor>& bias) {
  const Sizes sizes = check_projection(hidden, weight, bias, std::nullopt);
  check_gradient(sizes, hidden, gradient);
  check_size(sizes);
  const Device device(hidden);
  const Route route = route_of(device, hidden, weight);
  Call call = describe(sizes, route.hidden, route.weight, bias, std::nullopt);
  want_scale_gradient(call, hidden, gradient);
  const Projection p{call.projection};
  const Plan layout = plan_of(route, p, device);
  if (layout.grid_y > 0 && sizes.out_features > 0 && sizes.tokens > 0) {
    compute(p, layout, route, device.stream());
  }
  return *call.scale_gradient;
}

std::tuple<Tensor, Tensor> value_projection_stats(const Tensor& hidden, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& scale,
                                                  const std::optional<Tensor>& token_mask,
                                                  const Tensor& count, const Tensor& mean, const Tensor& m2,
                                                  bool return_values) {
  const Sizes sizes = check_projection(hidden, weight, bias, scale);
  check_statistics(sizes, hidden, token_mask, count, mean, m2);
  check_size(sizes);
  const Device device(hidden);
  const Route route = route_of(device, hidden, weight);
  Call call = describe(sizes, route.hidden, route.weight, bias, scale);
  want_activation(call, hidden, token_mask);
  if (return_values) want_values(call, hidden);

  Projection p{call.projection};
  p.count = count.const_data_ptr<double>();
  Plan layout = plan_of(route, p, device);
  if (layout.grid_y > 0) {
    // torch's allocator reuses memory in stream order, so that these tensors may be freed before the kernels
    // run.
    const Tensor partials =
        torch::stable::new_empty(hidden, {2, layout.partials, sizes.out_features}, ScalarType::Float);
    const Tensor count_before = torch::stable::new_empty(hidden, {1}, ScalarType::Double);
    const int64_t warps = layout.partials * layout.columns;
    const Tensor refused = torch::stable::new_empty(hidden, {warps}, ScalarType::Int);
    p.partial_mean = partials.mutable_data_ptr<float>();
    p.partial_m2 = p.partial_mean + layout.partials * sizes.out_features;
    p.count_before = count_before.mutable_data_ptr<double>();
    p.refused = refused.mutable_data_ptr<int>();
    compute(p, layout, route, device.stream());
    launch(Merge{sizes.batch, sizes.out_features, layout.partials, p.partial_mean, p.partial_m2, warps,
                 p.refused, p.count_before, count.mutable_data_ptr<double>(), mean.mutable_data_ptr<double>(),
                 m2.mutable_data_ptr<double>()},
           device.stream());
  }
  return {return_values ? *call.values : no_values(hidden), *call.activation};
}

}  // namespace
}  // namespace nemo_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(nemo_ext, CUDA, library) {
  library.impl("value_projection", TORCH_BOX(&nemo_ext::cuda::value_projection));
  library.impl("value_projection_stats", TORCH_BOX(&nemo_ext::cuda::value_projection_stats));
  library.impl("value_projection_scale_gradient",
               TORCH_BOX(&nemo_ext::cuda::value_projection_scale_gradient));
}
