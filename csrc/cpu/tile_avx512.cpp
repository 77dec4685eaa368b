#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "csrc/cpu/tile.h"

// Only what follows may use the target: every header is included before it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define NEMO_EXT_VARIANT avx512
#define NEMO_EXT_LANES 16
#define NEMO_EXT_ROWS 11  // 77 tokens of a CLIP text encoder are seven tiles
#define NEMO_EXT_PAIRS false
#define NEMO_EXT_F16C
#include "csrc/cpu/tile_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

nemo_ext::cpu::Variant nemo_ext::cpu::avx512_variant() {
  return avx512::kVariant;
}
#endif
