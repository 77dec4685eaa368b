// Launches the kernels. This file includes no torch header, so that nvcc has little else to compile.

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "csrc/cuda/finish.cuh"
#include "csrc/cuda/launch.h"

namespace nemo_ext::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call would report again
  std::string message = std::string("nemo_ext could not ") + what + ": " + cudaGetErrorString(status);
  if (status == cudaErrorInsufficientDriver) {
    message += " (built with CUDA " + std::to_string(CUDART_VERSION / 1000) +
               "; `nemo-ext info` says which driver that needs)";
  }
  throw std::runtime_error(message);
}

// cudaLaunchKernel takes an array of pointers to the kernel's arguments.
template <typename Argument>
void launch_kernel(void (*kernel)(Argument), dim3 grid, int threads, int shared_bytes, void* stream,
                   Argument argument) {
  void* arguments[] = {&argument};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), arguments, shared_bytes,
                         static_cast<cudaStream_t>(stream)),
        "launch a kernel");
}

}  // namespace

Gpu select_device(int device) {
  check(cudaSetDevice(device), "select the GPU");
  Gpu gpu{};
  check(cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "ask for the GPU's number of multiprocessors");
  check(cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "ask for the shared memory of a multiprocessor");
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "ask for the GPU's architecture");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "ask for the GPU's architecture");
  gpu.architecture = 10 * major + minor;
  return gpu;
}

void launch(const Projection& projection, const Plan& plan, void* stream) {
  with_block_tile(projection.element, plan.shape, [&](auto tile) {
    using T = decltype(tile);
    // A kernel must ask for more than 48 KiB of shared memory, on every device anew.
    constexpr auto* kKernel = kernel_of<T>();
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes),
          "reserve shared memory");
    const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
    launch_kernel(kKernel, grid, T::kThreads, T::kSharedBytes, stream, projection);
  });
}

void launch(const Merge& m, void* stream) {
  const int64_t blocks = m.out_features > 0 ? ceil_divide(m.out_features, kMergeNeurons) : 1;
  launch_kernel(merge, dim3(static_cast<unsigned>(blocks)), kMergeThreads, kMergeSharedBytes, stream, m);
}

}  // namespace nemo_ext::cuda
