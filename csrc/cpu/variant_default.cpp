// For any CPU: the product is PyTorch's, the rest the compiler's baseline (SSE2 on x86-64, NEON on ARM).
#define NEMO_EXT_VARIANT library
#define NEMO_EXT_LANES 4
#define NEMO_EXT_LIBRARY
#include "csrc/cpu/kernels.h"

nemo_ext::cpu::Variant nemo_ext::cpu::default_variant() {
  Variant variant = library::kVariant;
  variant.calls_library = true;
  return variant;
}
