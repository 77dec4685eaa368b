// The second kernel: merges the blocks' partial statistics into the running ones, in a fixed order.
#pragma once

#include <cstdint>

#include "csrc/cuda/plan.h"
#include "csrc/cuda/primitives.h"
#include "csrc/math.h"

namespace nemo_ext::cuda {

// A block merges the partials of 32 neurons. Eight threads per neuron take every eighth partial each, then
// one of them merges the eight results, in order, into the float64 statistics.
constexpr int kMergeNeurons = 32;
constexpr int kMergeParts = 8;
constexpr int kMergeThreads = kMergeParts * kMergeNeurons;
constexpr int kMergeFlags = kMergeThreads * int(sizeof(Moments<float>));  // one for each warp follows
constexpr int kMergeSharedBytes = kMergeFlags + kMergeParts * int(sizeof(int));

// How many prompts are in a partial: prompts `partial`, `partial + partials`, …
NEMO_EXT_DEVICE int64_t prompts_of_partial(const Merge& m, int64_t partial) {
  return partial < m.batch ? (m.batch - 1 - partial) / m.partials + 1 : 0;
}

NEMO_EXT_KERNEL(kMergeThreads, 4)
merge(const Merge m) {
  const int64_t neuron = int64_t(block_index_x()) * kMergeNeurons + thread_index() % kMergeNeurons;
  if (neuron < m.out_features) {
    Moments<float> moments;
    for (int64_t partial = thread_index() / kMergeNeurons; partial < m.partials; partial += kMergeParts) {
      const int64_t prompts = prompts_of_partial(m, partial);
      if (prompts == 0) break;
      const int64_t source = partial * m.out_features + neuron;
      chan_merge(moments, Moments<float>{static_cast<float>(prompts), load_global(m.partial_mean + source),
                                         load_global(m.partial_m2 + source)});
    }
    store_shared(thread_index() * int(sizeof(Moments<float>)), moments);
  }
  int refused = 0;
  for (int64_t warp = thread_index(); warp < m.warps; warp += kMergeThreads) {
    refused |= load_global(m.refused + warp);
  }
  static_assert(kMergeNeurons == kWarpSize);
  refused = or_over_lanes(refused);
  if (thread_index() % kWarpSize == 0) {
    store_shared(kMergeFlags + thread_index() / kWarpSize * int(sizeof(int)), refused);
  }
  sync_threads();
  // A prompt without a token, or an activation that is not finite or too large, leaves all running statistics
  // as they were.
  for (int part = 0; part < kMergeParts; ++part) {
    if (load_shared<int>(kMergeFlags + part * int(sizeof(int)))) return;
  }
  const double count_before = load_global(m.count_before);
  if (thread_index() < kMergeNeurons && neuron < m.out_features) {
    Moments<double> running{count_before, load_global(m.mean + neuron), load_global(m.m2 + neuron)};
    for (int part = 0; part < kMergeParts; ++part) {
      chan_merge(running, load_shared<Moments<float>>((part * kMergeNeurons + thread_index()) *
                                                      int(sizeof(Moments<float>))));
    }
    store_global(m.mean + neuron, running.mean);
    store_global(m.m2 + neuron, running.m2);
  }
  if (thread_index() == 0 && block_index_x() == 0) {
    store_global(m.count, count_before + static_cast<double>(m.batch));
  }
}

}  // namespace nemo_ext::cuda
