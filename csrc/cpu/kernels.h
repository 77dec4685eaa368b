// All kernels of one variant, compiled for its target. A translation unit sets the macros that vectors.h
// names and
//   NEMO_EXT_TARGET   instruction sets, as the compiler names them; without it the compiler's baseline
//   NEMO_EXT_LIBRARY  the product is PyTorch's
// and includes this file once.
//
// Every header of others comes before the target: nothing but what follows may use its instructions.
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

// clang-format off: each of them needs those before it
#include "csrc/cpu/vectors.h"
#include "csrc/cpu/units.h"
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
