// The variants of the CPU kernels, executed on any CPU with the emulated instructions of cpu_instructions.h.
#pragma once

#include <string>

#include "csrc/projection.h"

namespace nemo_ext::emulation {

// Computes `projection` on one thread by a variant: avx2, avx512, avx512_bf16, amx, or amx_fp16, which is amx
// on a CPU whose tiles support float16.
void project_on_cpu(const Projection& projection, const std::string& variant);

}  // namespace nemo_ext::emulation
