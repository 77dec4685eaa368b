// Portable: whatever the compiler's baseline has (SSE2 on x86-64, NEON on ARM).
#include <cstdint>

#include <torch/headeronly/util/Half.h>

#include "csrc/cpu/tile.h"

#define NEMO_EXT_VARIANT portable
#define NEMO_EXT_LANES 4
#define NEMO_EXT_ROWS 6
#define NEMO_EXT_PAIRS false
#include "csrc/cpu/tile_impl.h"

nemo_ext::cpu::Variant nemo_ext::cpu::default_variant() {
  return portable::kVariant;
}
