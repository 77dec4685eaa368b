#if defined(__x86_64__) || defined(NEMO_EXT_EMULATED)
#define NEMO_EXT_VARIANT avx2
#define NEMO_EXT_TARGET "avx2,fma,f16c"
#define NEMO_EXT_LANES 8
#define NEMO_EXT_ROWS 6
#define NEMO_EXT_F16C
#include "csrc/cpu/kernels.h"

nemo_ext::cpu::Variant nemo_ext::cpu::avx2_variant() {
  return avx2::kVariant;
}
#endif
