// Splits a call into tasks for any number of threads. This header does not use torch.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <new>

#include "csrc/cpu/variant.h"
#include "csrc/math.h"

namespace nemo_ext::cpu {

// A buffer that a thread keeps from call to call, because page faults of newly allocated memory would cost
// more than a small projection. It is aligned to a cache line and uninitialized.
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

// Number of floats of packed weight that stay in a core's L2 cache while a task loops over its prompts. It is
// half of the cache; the rest is left to hidden and the accumulators.
inline int64_t packed_floats_in_cache() {
  static const int64_t floats = [] {
    int64_t bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (bytes <= 0) bytes = 1024 * 1024;  // the system does not report the size
    return bytes / 2 / static_cast<int64_t>(sizeof(float));
  }();
  return floats;
}

// From this number of prompts on, the time to pack the weight is small beside the time to multiply with it.
inline constexpr int64_t kMinPromptsPerRange = 32;

// Computes `p` on `threads` threads. `parallel_for(count, work)` must call work(begin, end) for disjoint
// ranges that cover [0, count), on any thread and in any order.
template <typename ParallelFor>
void run(const Variant& kernels, const Projection& p, int64_t threads, const ParallelFor& parallel_for) {
  if (p.batch == 0 || p.tokens == 0 || p.out_features == 0) return;
  const int64_t panels = ceil_divide(p.out_features, kernels.panel_width);
  const int64_t panel_size = kernels.panel_size(p);

  // One task packs one group of panels and multiplies one range of prompts with it. If there are many
  // prompts, each thread gets its own range, so that no two threads write to the same pages of memory. If
  // there are few, the groups get smaller; if even one panel per group gives too few tasks, the ranges get
  // smaller too. The split never changes a result.
  const int64_t wanted_tasks = threads == 1 ? 1 : 4 * threads;
  const int64_t panels_in_cache =
      std::max<int64_t>(1, packed_floats_in_cache() / std::max<int64_t>(1, panel_size));
  const int64_t ranges_for_threads = std::clamp<int64_t>(p.batch / kMinPromptsPerRange, 1, threads);
  const int64_t groups = std::min(
      panels, std::max(ceil_divide(wanted_tasks, ranges_for_threads), ceil_divide(panels, panels_in_cache)));
  const int64_t ranges = std::min(p.batch, std::max(ranges_for_threads, ceil_divide(wanted_tasks, groups)));
  const int64_t largest_group = ceil_divide(panels, groups);
  const int64_t tasks = groups * ranges;
  // PyTorch's matrix product starts no threads inside a parallel region, but a loop of one step is no
  // parallel region. So such a loop gets a second, empty step.
  const int64_t steps = kernels.calls_library ? std::max<int64_t>(tasks, 2) : tasks;
  parallel_for(steps, [&](int64_t first_task, int64_t last_task) {
    float* packed = workspace.at_least(largest_group * panel_size + kernels.scratch_size(p));
    float* scratch = packed + largest_group * panel_size;
    for (int64_t task = first_task; task < std::min(last_task, tasks); ++task) {
      const int64_t group = task % groups, range = task / groups;
      const int64_t begin = group * panels / groups, end = (group + 1) * panels / groups;
      for (int64_t panel = begin; panel < end; ++panel) {
        kernels.pack(p, panel, packed + (panel - begin) * panel_size);
      }
      for (int64_t prompt = range * p.batch / ranges; prompt < (range + 1) * p.batch / ranges; ++prompt) {
        kernels.project(p, packed, prompt, begin, end, scratch);
      }
    }
  });
}

}  // namespace nemo_ext::cpu
