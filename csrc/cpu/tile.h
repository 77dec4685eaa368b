// What a variant of the CPU kernels offers to the driver in value_projection.cpp. Plain pointers, no torch.
#pragma once

#include <cstdint>

#include "csrc/cpu/capability.h"
#include "csrc/projection.h"

namespace nemo_ext::cpu {

struct Variant {
  int64_t panel_width;  // neurons side by side in one panel of the packed weight

  // Floats that a panel takes, and that one thread's copy of a block of hidden takes (0: hidden is read in
  // place).
  int64_t (*panel_size)(const Projection&);
  int64_t (*scratch_size)(const Projection&);

  // Copies weight rows [panel · panel_width, + panel_width) into `packed`, zeros where there is no row.
  void (*pack)(const Projection&, int64_t panel, float* packed);

  // Values and activation of one prompt for the neurons of panels [begin, end); `packed` is of `begin`.
  void (*project)(const Projection&, const float* packed, int64_t prompt, int64_t begin, int64_t end,
                  float* scratch);
};

Variant default_variant();
#if defined(__x86_64__)
Variant avx2_variant();
Variant avx512_variant();
Variant avx512_bf16_variant();
#endif

}  // namespace nemo_ext::cpu
