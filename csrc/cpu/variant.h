// The interface between a variant of the CPU kernels and the driver (driver.h). This header does not use
// torch.
#pragma once

#include <cstdint>

#include "csrc/cpu/capability.h"
#include "csrc/projection.h"

namespace nemo_ext::cpu {

struct Variant {
  int64_t panel_width;  // number of neurons in a panel of the packed weight

  // Size of a packed panel, and size of a thread's scratch buffer, both in floats. The scratch buffer holds
  // the accumulators of one token block and, if its rows of hidden can't be read in place, a copy of them.
  int64_t (*panel_size)(const Projection&);
  int64_t (*scratch_size)(const Projection&);

  // Packs the weight rows of panel `panel` into `packed`. Missing rows of the last panel become 0.
  void (*pack)(const Projection&, int64_t panel, float* packed);

  // Computes the values and the sums over tokens of one prompt, for the neurons of the panels [begin, end).
  // `packed` points to panel `begin`.
  void (*project)(const Projection&, const float* packed, int64_t prompt, int64_t begin, int64_t end,
                  float* scratch);

  // True if PyTorch computes the matrix products. It must not start threads then, because the result could
  // depend on their number.
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
