// The two ways to compute a call on a GPU, and which one is taken.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "csrc/projection.h"

namespace nemo_ext::cuda {

enum class Path {
  Kernel,   // one kernel of ours computes the products with mma.sync and finishes them in registers
  Library,  // PyTorch's library computes the products, and a second kernel finishes them from memory
};

// `architecture` is the compute capability times ten, 90 for sm_90. In 16 bits mma.sync reaches .63 of the
// tensor cores' rate from sm_90 on, where a library uses newer instructions. In float32 the library does not
// use the tensor cores. Measured on sm_90 (docs/kernels.md, "On an H200"), and not elsewhere.
//
// The environment variable NEMO_EXT_CUDA_PATH decides instead, if it is set.
inline Path path_of(Element element, int architecture) {
  const char* value = std::getenv("NEMO_EXT_CUDA_PATH");
  const std::string wanted = value ? value : "";
  if (wanted == "kernel") return Path::Kernel;
  if (wanted == "library") return Path::Library;
  if (!wanted.empty()) {
    throw std::runtime_error("NEMO_EXT_CUDA_PATH must be kernel or library, got " + wanted);
  }
  return element != Element::Float32 && architecture >= 90 ? Path::Library : Path::Kernel;
}

}  // namespace nemo_ext::cuda
