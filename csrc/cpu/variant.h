// What a variant of the CPU kernels offers to the driver (driver.h). Plain pointers, no torch.
#pragma once

#include <cstdint>

#include "csrc/cpu/capability.h"
#include "csrc/projection.h"

namespace nemo_ext::cpu {

struct Variant {
  int64_t panel_width;  // neurons of one panel of the packed weight

  // Floats that a panel takes, and that a thread needs besides: sums of one block of tokens, and a copy of
  // its rows of hidden where they can't be read in place.
  int64_t (*panel_size)(const Projection&);
  int64_t (*scratch_size)(const Projection&);

  // Copies weight rows [panel · panel_width, + panel_width) into `packed`, zeros where there is no row.
  void (*pack)(const Projection&, int64_t panel, float* packed);

  // Values and sums over tokens of one prompt for the neurons of panels [begin, end); `packed` is of `begin`.
  void (*project)(const Projection&, const float* packed, int64_t prompt, int64_t begin, int64_t end,
                  float* scratch);

  // Its product is PyTorch's, which must not start threads of its own: their number would enter the result.
  bool calls_library = false;
};

Variant default_variant();
#if defined(__x86_64__) || defined(NEMO_EXT_EMULATED)
Variant avx2_variant();
Variant avx512_variant();
Variant avx512_bf16_variant();
Variant amx_variant();
#endif

}  // namespace nemo_ext::cpu
