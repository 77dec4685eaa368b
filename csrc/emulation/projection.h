// What csrc/cuda/value_projection.cpp has a GPU do, done by the emulation.
#pragma once

#include <cstdint>
#include <optional>

#include "csrc/cuda/plan.h"
#include "csrc/emulation/emulator.h"

namespace nemo_ext::emulation {

// The running statistics that a call updates; null where it has none.
struct Running {
  double* count;
  double* mean;
  double* m2;
};

// As on a device with so many multiprocessors, with the tile that `plan` chooses or with `shape`.
void project(const nemo_ext::Projection& projection, const Running& running, int multiprocessors,
             std::optional<cuda::Shape> shape, Order order, uint64_t seed);

}  // namespace nemo_ext::emulation
