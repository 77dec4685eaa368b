// Launches the CUDA kernels in the emulation, as csrc/cuda/value_projection.cpp does on a GPU.
#pragma once

#include <cstdint>
#include <optional>

#include "csrc/cuda/plan.h"
#include "csrc/emulation/emulator.h"

namespace nemo_ext::emulation {

// The running statistics that a call updates. All are null if it updates none.
struct Running {
  double* count;
  double* mean;
  double* m2;
};

// What a library has computed on its path: hidden weightᵀ, [batch, tokens, out_features], of which one
// launch may take so many bytes.
struct Products {
  const float* data;
  int64_t bytes;
};

// Computes as on this GPU, with `shape` or else the tile that `plan` chooses, or on the library's path if
// there are products.
void project(const nemo_ext::Projection& projection, const std::optional<Products>& products,
             const Running& running, const cuda::Gpu& gpu, std::optional<cuda::Shape> shape,
             const Execution& execution);

}  // namespace nemo_ext::emulation
