// The CPU's variants, executed on any CPU: their instructions are those of cpu_instructions.h.
#pragma once

#include <string>

#include "csrc/projection.h"

namespace nemo_ext::emulation {

// Computes `projection` by a variant: avx2, avx512, avx512_bf16, amx, or amx_fp16 for a CPU whose tiles take
// float16, too. On one thread.
void project_on_cpu(const Projection& projection, const std::string& variant);

}  // namespace nemo_ext::emulation
