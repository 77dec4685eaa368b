// bfloat16 on AMX tiles, float16 too where the CPU has TDPFP16PS; float32, and float16 elsewhere, on vectors.
// The tiles' instructions are written as assembly: the target needs nothing more for them.
#if defined(__x86_64__) || defined(NEMO_EXT_EMULATED)
#define NEMO_EXT_VARIANT amx
#define NEMO_EXT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define NEMO_EXT_LANES 16
#define NEMO_EXT_ROWS 11  // 77 tokens of a CLIP text encoder are seven tiles
#define NEMO_EXT_F16C
#define NEMO_EXT_BF16_DOT
#define NEMO_EXT_TILES
#include "csrc/cpu/kernels.h"

nemo_ext::cpu::Variant nemo_ext::cpu::amx_variant() {
  return amx::kVariant;
}
#endif
