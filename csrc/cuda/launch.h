// What value_projection.cu, which knows CUDA, offers to value_projection.cpp, which knows torch.
#pragma once

#include "csrc/cuda/plan.h"

namespace nemo_ext::cuda {

// Makes `device` the current one, and returns how many multiprocessors it has.
int select_device(int device);

// Enqueues the kernels on `stream`, a cudaStream_t, and returns without waiting. Nothing is allocated,
// nothing synchronises: the calls can be captured into a CUDA graph. All throw std::runtime_error where CUDA
// refuses.
void launch(const Projection& projection, const Plan& plan, void* stream);
void launch(const Merge& merge, void* stream);

}  // namespace nemo_ext::cuda
