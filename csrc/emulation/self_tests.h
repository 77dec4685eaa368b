// Self-tests of the emulator: small kernels that use one primitive each, correctly or not.
#pragma once

#include <cstddef>
#include <string>

#include "csrc/emulation/emulator.h"

namespace nemo_ext::emulation {

// Runs the self-test `name` on two arrays in global memory: `input`, which is read-only, and `output`.
void run_self_test(const std::string& name, const uint32_t* input, size_t input_size, uint32_t* output,
                   size_t output_size, int64_t blocks, const Execution& execution);

}  // namespace nemo_ext::emulation
