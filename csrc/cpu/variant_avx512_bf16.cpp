#if defined(__x86_64__) || defined(NEMO_EXT_EMULATED)
#define NEMO_EXT_VARIANT avx512_bf16
#define NEMO_EXT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define NEMO_EXT_LANES 16
#define NEMO_EXT_ROWS 11  // the 77 tokens of a CLIP text encoder are seven register blocks
#define NEMO_EXT_F16C
#define NEMO_EXT_BF16_DOT
#include "csrc/cpu/kernels.h"

nemo_ext::cpu::Variant nemo_ext::cpu::avx512_bf16_variant() {
  return avx512_bf16::kVariant;
}
#endif
