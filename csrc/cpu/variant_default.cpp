// This variant runs on any CPU: PyTorch computes the products, and the rest is compiled for the baseline
// (SSE2 on x86-64, NEON on ARM).
#define NEMO_EXT_VARIANT library
#define NEMO_EXT_LANES 4
#define NEMO_EXT_LIBRARY
#include "csrc/cpu/kernels.h"

nemo_ext::cpu::Variant nemo_ext::cpu::default_variant() {
  Variant variant = library::kVariant;
  variant.calls_library = true;
  return variant;
}
