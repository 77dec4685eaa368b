// All kernels of one variant, compiled for its target. A translation unit includes this file once, after it
// has defined the macros that vectors.h lists and these:
//   NEMO_EXT_TARGET   instruction sets in the compiler's notation; if undefined, the compiler's baseline
//   NEMO_EXT_LIBRARY  if defined, PyTorch computes the matrix products
//
// Headers of other libraries are included before the target is set. Otherwise their inline functions could be
// compiled with instructions that the CPU lacks.
#pragma once

#include <cstdint>

#if defined(NEMO_EXT_LIBRARY)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>
#elif defined(NEMO_EXT_EMULATED)
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <stdexcept>
#include <string>
#else
#include <immintrin.h>
#endif

#include "csrc/cpu/variant.h"

#define NEMO_EXT_PRAGMA(text) _Pragma(#text)
#define NEMO_EXT_EXPANDED_PRAGMA(text) NEMO_EXT_PRAGMA(text)
#if defined(NEMO_EXT_TARGET) && !defined(NEMO_EXT_EMULATED)
#if defined(__clang__)
NEMO_EXT_EXPANDED_PRAGMA(clang attribute push(__attribute__((target(NEMO_EXT_TARGET))), apply_to = function))
#else
NEMO_EXT_PRAGMA(GCC push_options)
NEMO_EXT_EXPANDED_PRAGMA(GCC target(NEMO_EXT_TARGET))
#endif
#endif

// clang-format off: each header uses the ones before it.
#include "csrc/cpu/vectors.h"
#include "csrc/cpu/words.h"
#if defined(NEMO_EXT_LIBRARY)
#include "csrc/cpu/main_loop_library.h"
#include "csrc/cpu/lookahead.h"
#else
#include "csrc/cpu/panels.h"
#include "csrc/cpu/lookahead.h"
#include "csrc/cpu/main_loop_vectors.h"
#if defined(NEMO_EXT_TILES)
#include "csrc/cpu/main_loop_tiles.h"
#endif
#endif
#include "csrc/cpu/epilogue.h"
#include "csrc/cpu/project.h"
// clang-format on

#if defined(NEMO_EXT_TARGET) && !defined(NEMO_EXT_EMULATED)
#if defined(__clang__)
NEMO_EXT_PRAGMA(clang attribute pop)
#else
NEMO_EXT_PRAGMA(GCC pop_options)
#endif
#endif
