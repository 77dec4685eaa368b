// bfloat16 runs on AMX tiles, and float16 too if the CPU has TDPFP16PS. All else runs on vectors. The tile
// instructions are inline assembly, so the target need not name AMX.
#if defined(__x86_64__) || defined(NEMO_EXT_EMULATED)
#define NEMO_EXT_VARIANT amx
#define NEMO_EXT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define NEMO_EXT_LANES 16
#define NEMO_EXT_ROWS 11  // the 77 tokens of a CLIP text encoder are seven register blocks
#define NEMO_EXT_F16C
#define NEMO_EXT_BF16_DOT
#define NEMO_EXT_TILES
#include "csrc/cpu/kernels.h"

nemo_ext::cpu::Variant nemo_ext::cpu::amx_variant() {
  return amx::kVariant;
}
#endif
