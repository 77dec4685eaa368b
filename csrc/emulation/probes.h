// Small kernels that show what the emulated primitives do, and what misuse of them gives; tests only.
#pragma once

#include <cstddef>
#include <string>

#include "csrc/emulation/emulator.h"

namespace nemo_ext::emulation {

// Runs one over global memory of two arrays: `input`, read-only, and `output`.
void run_probe(const std::string& name, const uint32_t* input, size_t input_size, uint32_t* output,
               size_t output_size, int64_t blocks, Order order, uint64_t seed);

}  // namespace nemo_ext::emulation
