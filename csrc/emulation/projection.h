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

// Computes as on a GPU with this number of multiprocessors, with `shape` or else the tile that `plan`
// chooses.
void project(const nemo_ext::Projection& projection, const Running& running, int multiprocessors,
             std::optional<cuda::Shape> shape, const Execution& execution);

}  // namespace nemo_ext::emulation
