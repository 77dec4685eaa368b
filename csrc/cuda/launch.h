// The launches, implemented in value_projection.cu with the CUDA runtime and without torch, for
// value_projection.cpp, which uses torch and no CUDA header.
#pragma once

#include "csrc/cuda/plan.h"

namespace nemo_ext::cuda {

// Makes `device` the current device, and returns what the plan must know of it.
Gpu select_device(int device);

// Both enqueue a kernel on `stream`, a cudaStream_t, and return without waiting for it. They neither allocate
// nor synchronize, so that a CUDA graph can capture them. All three functions throw std::runtime_error if
// CUDA reports an error.
void launch(const Projection& projection, const Plan& plan, void* stream);
void launch(const Merge& merge, void* stream);

}  // namespace nemo_ext::cuda
