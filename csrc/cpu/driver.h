// Cuts a call into pieces of work, for any number of threads. Free of torch.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <new>

#include "csrc/cpu/variant.h"
#include "csrc/math.h"

namespace nemo_ext::cpu {

// Memory that a thread keeps from call to call: fresh pages would cost more than a small projection does. It
// starts at a cache line, and is uninitialized.
struct Workspace {
  static constexpr std::align_val_t kAlignment{64};

  float* memory = nullptr;
  int64_t size = 0;

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { ::operator delete[](memory, kAlignment); }

  float* at_least(int64_t floats) {
    if (floats > size) {
      ::operator delete[](memory, kAlignment);
      memory = nullptr;
      size = 0;
      memory = static_cast<float*>(::operator new[](floats * sizeof(float), kAlignment));
      size = floats;
    }
    return memory;
  }
};

inline thread_local Workspace workspace;

// Floats of packed weight that stay in a core's L2 cache while all prompts pass by: half of it.
inline int64_t floats_in_cache() {
  static const int64_t floats = [] {
    int64_t bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (bytes <= 0) bytes = 1024 * 1024;  // not every system tells
    return bytes / 2 / static_cast<int64_t>(sizeof(float));
  }();
  return floats;
}

// Prompts next to whose product the time to pack a weight for them is small.
inline constexpr int64_t kPromptsWorthPacking = 32;

// Computes `p` on `threads` threads. `parallel_for(count, work)` calls work(begin, end) for parts of [0,
// count).
template <typename ParallelFor>
void run(const Variant& kernels, const Projection& p, int64_t threads, const ParallelFor& parallel_for) {
  if (p.batch == 0 || p.tokens == 0 || p.out_features == 0) return;
  const int64_t panels = ceil_divide(p.out_features, kernels.panel_width);
  const int64_t panel_size = kernels.panel_size(p);

  // Every piece of work packs a group of panels and multiplies a part of the prompts with it. Several threads
  // get prompts of their own where these are many, for then no two of them write to the same pages of memory;
  // and else smaller groups, and parts where these do not suffice. How the work is cut changes no result.
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  const int64_t fitting = std::max<int64_t>(1, floats_in_cache() / std::max<int64_t>(1, panel_size));
  const int64_t own = std::clamp<int64_t>(p.batch / kPromptsWorthPacking, 1, threads);
  const int64_t groups = std::min(panels, std::max(ceil_divide(wanted, own), ceil_divide(panels, fitting)));
  const int64_t parts = std::min(p.batch, std::max(own, ceil_divide(wanted, groups)));
  const int64_t largest_group = ceil_divide(panels, groups);
  const int64_t pieces = groups * parts;
  // Inside a parallel loop the library does not start threads. A loop of one step would not be a parallel
  // one.
  const int64_t steps = kernels.calls_library ? std::max<int64_t>(pieces, 2) : pieces;
  parallel_for(steps, [&](int64_t first_piece, int64_t last_piece) {
    float* packed = workspace.at_least(largest_group * panel_size + kernels.scratch_size(p));
    float* scratch = packed + largest_group * panel_size;
    for (int64_t piece = first_piece; piece < std::min(last_piece, pieces); ++piece) {
      const int64_t group = piece % groups, part = piece / groups;
      const int64_t begin = group * panels / groups, end = (group + 1) * panels / groups;
      for (int64_t panel = begin; panel < end; ++panel) {
        kernels.pack(p, panel, packed + (panel - begin) * panel_size);
      }
      for (int64_t prompt = part * p.batch / parts; prompt < (part + 1) * p.batch / parts; ++prompt) {
        kernels.project(p, packed, prompt, begin, end, scratch);
      }
    }
  });
}

}  // namespace nemo_ext::cpu
