#include "csrc/emulation/self_tests.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "csrc/cuda/primitives.h"

namespace nemo_ext::cuda {
namespace {
using Words = Vector<uint32_t, 4>;

struct SelfTest {
  const char* name;
  int threads;
  int shared_bytes;
  void (*kernel)(const uint32_t* input, uint32_t* output);
};

int64_t global_index(int threads) {
  return block_index_x() * threads + thread_index();
}

// Input: for each lane its accumulators, A fragment and B fragment. Output: for each lane its accumulators.
template <typename Multiply>
void multiply(const uint32_t* input, uint32_t* output, Multiply multiply_add) {
  input += thread_index() * 10;
  float accumulators[4];
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    accumulators[i] = as_float(load_global(input + i));
    a[i] = load_global(input + 4 + i);
  }
  multiply_add(accumulators, a, load_global(input + 8), load_global(input + 9));
  for (int i = 0; i < 4; ++i) {
    store_global(output + thread_index() * 4 + i, as_bits(accumulators[i]));
  }
}

// As large as the Moments of a neuron, which is no power of two.
struct ThreeWords {
  uint32_t data[3];
};

// Every thread stores its index in shared memory and, after `synchronize`, reads that of its neighbour.
template <typename T, typename Synchronize>
void pass_to_neighbour(uint32_t* output, int threads, Synchronize synchronize) {
  T number = {};
  number.data[0] = static_cast<decltype(+number.data[0])>(thread_index());
  store_shared(thread_index() * 16, number);
  synchronize();
  number = load_shared<T>((thread_index() + 1) % threads * 16);
  store_global(output + thread_index(), uint32_t(number.data[0]));
}

constexpr SelfTest kSelfTests[] = {
    {"multiply_add_bfloat16", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       multiply(input, output,
                [](float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
                  multiply_add(accumulators, a, b0, b1, BFloat16());
                });
     }},
    {"multiply_add_float16", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       multiply(input, output,
                [](float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
                  multiply_add(accumulators, a, b0, b1, Float16());
                });
     }},
    {"multiply_add_tf32", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       multiply(input, output,
                [](float (&accumulators)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
                  multiply_add_tf32(accumulators, a, b0, b1);
                });
     }},
    // Input: 128 words of shared memory, then for each lane the offset of its row. Output: for each lane 4
    // words.
    {"load_matrices", 32, 512,
     [](const uint32_t* input, uint32_t* output) {
       store_shared(thread_index() * 16, load_global(reinterpret_cast<const Words*>(input) + thread_index()));
       sync_warp();
       Words words;
       load_matrices(words.data, load_global(input + 128 + thread_index()));
       store_global(reinterpret_cast<Words*>(output) + thread_index(), words);
     }},
    // Input: for each lane a mask. Output: the lane whose index it has received.
    {"shuffle_xor", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       const int mask = load_global(input + thread_index());
       store_global(output + thread_index(), static_cast<uint32_t>(shuffle_xor(thread_index(), mask)));
     }},

    // Conversions of each word of the input to a word of the output.
    {"from_float_bfloat16", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       BFloat16 rounded;
       from_float(rounded, as_float(load_global(input + global_index(32))));
       store_global(output + global_index(32), uint32_t(rounded.bits));
     }},
    {"from_float_float16", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       Float16 rounded;
       from_float(rounded, as_float(load_global(input + global_index(32))));
       store_global(output + global_index(32), uint32_t(rounded.bits));
     }},
    {"to_float_bfloat16", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       const BFloat16 value{static_cast<uint16_t>(load_global(input + global_index(32)))};
       store_global(output + global_index(32), as_bits(to_float(value)));
     }},
    {"to_float_float16", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       const Float16 value{static_cast<uint16_t>(load_global(input + global_index(32)))};
       store_global(output + global_index(32), as_bits(to_float(value)));
     }},

    // Output: the number of entries, then the threads in the order in which they ran.
    {"order_of_threads", 64, 0,
     [](const uint32_t*, uint32_t* output) {
       for (int turn = 0; turn < 2; ++turn) {
         const uint32_t entries = load_global(output);
         store_global(output + 1 + entries, uint32_t(global_index(64)));
         store_global(output, entries + 1);
         sync_threads();
       }
     }},
    {"shared_memory_at_the_start", 32, 128,
     [](const uint32_t*, uint32_t* output) {
       store_global(output + global_index(32), load_shared<uint32_t>(thread_index() * 4));
       store_shared(thread_index() * 4, 1u);
     }},
    {"or_over_lanes", 64, 0,
     [](const uint32_t*, uint32_t* output) {
       const int bit = thread_index() < 32 ? 1 << thread_index() : 0;
       store_global(output + thread_index(), static_cast<uint32_t>(or_over_lanes(bit)));
     }},

    // Three groups: a copy, a copy of a source that does not exist, and an empty group. A fourth copy is
    // never committed. Output: 8 words of shared memory before any wait, after a wait for all but 2 groups,
    // and after a wait for all but 1, then the target of the fourth copy after a wait for all groups.
    {"copy_async", 32, 48,
     [](const uint32_t* input, uint32_t* output) {
       if (thread_index() != 0) return;
       const auto show = [&](int step) {
         for (int i = 0; i < 8; ++i) store_global(output + step * 8 + i, load_shared<uint32_t>(i * 4));
       };
       for (int i = 0; i < 8; ++i) store_shared(i * 4, 0u);
       copy_async_16(0, input, true);
       copy_async_commit();
       copy_async_16(16, input + 4, false);
       copy_async_commit();
       copy_async_commit();
       copy_async_16(32, input, true);
       show(0);
       copy_async_wait<2>();
       show(1);
       copy_async_wait<1>();
       show(2);
       copy_async_wait<0>();
       store_global(output + 24, load_shared<uint32_t>(32));
     }},

    // Accesses to the same memory by several threads, with and without a barrier between them.
    {"neighbours_with_barrier", 64, 1024,
     [](const uint32_t*, uint32_t* output) { pass_to_neighbour<Words>(output, 64, [] { sync_threads(); }); }},
    {"neighbours_without_barrier", 64, 1024,
     [](const uint32_t*, uint32_t* output) { pass_to_neighbour<Words>(output, 64, [] {}); }},
    {"neighbours_without_barrier_12_bytes", 64, 1024,
     [](const uint32_t*, uint32_t* output) { pass_to_neighbour<ThreeWords>(output, 64, [] {}); }},
    {"neighbours_without_barrier_8_bytes", 64, 1024,
     [](const uint32_t*, uint32_t* output) { pass_to_neighbour<Vector<uint16_t, 4>>(output, 64, [] {}); }},
    {"neighbours_without_barrier_2_bytes", 64, 1024,
     [](const uint32_t*, uint32_t* output) { pass_to_neighbour<Vector<uint16_t, 1>>(output, 64, [] {}); }},
    {"neighbours_with_warp_barrier", 32, 512,
     [](const uint32_t*, uint32_t* output) { pass_to_neighbour<Words>(output, 32, [] { sync_warp(); }); }},
    {"neighbours_across_warps_with_warp_barrier", 64, 1024,
     [](const uint32_t*, uint32_t* output) { pass_to_neighbour<Words>(output, 64, [] { sync_warp(); }); }},
    {"neighbours_with_shuffle", 32, 512,
     [](const uint32_t*, uint32_t* output) {
       pass_to_neighbour<Words>(output, 32, [] { shuffle_xor(0, 1); });
     }},
    {"copy_lands_for_neighbour", 32, 512,
     [](const uint32_t* input, uint32_t* output) {
       copy_async_16(thread_index() * 16, input, true);
       copy_async_commit();
       copy_async_wait<0>();
       store_global(output + thread_index(), load_shared<uint32_t>((thread_index() + 1) % 32 * 16));
     }},
    {"copy_begins_while_neighbour_reads", 32, 512,
     [](const uint32_t* input, uint32_t* output) {
       store_global(output + thread_index(), load_shared<uint32_t>((thread_index() + 1) % 32 * 16));
       copy_async_16(thread_index() * 16, input, true);
       sync_threads();
       copy_async_commit();
       copy_async_wait<0>();
     }},
    {"blocks_store_to_one_place", 32, 0,
     [](const uint32_t*, uint32_t* output) {
       if (thread_index() == 0) store_global(output, 1u);
     }},

    // Errors, one per self-test. Each has a block of 64 threads, 64 words of input and of output, and 256
    // bytes of shared memory.
    {"load_beyond_input", 64, 256,
     [](const uint32_t* input, uint32_t*) { load_global(input + 27 + thread_index()); }},
    {"load_before_input", 64, 256,
     [](const uint32_t* input, uint32_t*) { load_global(input - 1 + thread_index()); }},
    {"load_of_the_16th_words", 64, 256,
     [](const uint32_t* input, uint32_t*) { load_global(reinterpret_cast<const Words*>(input) + 15); }},
    {"load_far_from_everything", 64, 256,
     [](const uint32_t* input, uint32_t*) { load_global(input + (1 << 24)); }},
    {"load_misaligned", 64, 256,
     [](const uint32_t* input, uint32_t*) {
       load_global(reinterpret_cast<const Words*>(input + thread_index()));
     }},
    {"store_beyond_output", 64, 256,
     [](const uint32_t*, uint32_t* output) { store_global(output + 64 + thread_index(), 1u); }},
    {"store_to_input", 64, 256,
     [](const uint32_t* input, uint32_t*) { store_global(const_cast<uint32_t*>(input), 1u); }},
    {"load_shared_beyond_the_end", 64, 256,
     [](const uint32_t*, uint32_t*) { load_shared<uint32_t>(4 + thread_index() * 4); }},
    {"load_shared_misaligned", 64, 256,
     [](const uint32_t*, uint32_t*) { load_shared<Words>(thread_index() * 4); }},
    {"store_shared_beyond_the_end", 64, 256,
     [](const uint32_t*, uint32_t*) { store_shared(uint32_t(-4), 1u); }},
    {"load_matrices_misaligned", 64, 256,
     [](const uint32_t*, uint32_t*) {
       uint32_t words[4];
       load_matrices(words, thread_index() % 2 * 8);
     }},
    {"copy_to_misaligned", 64, 256, [](const uint32_t* input, uint32_t*) { copy_async_16(8, input, true); }},
    {"copy_from_misaligned", 64, 256,
     [](const uint32_t* input, uint32_t*) { copy_async_16(0, input + 2, true); }},
    {"copy_beyond_input", 64, 256,
     [](const uint32_t* input, uint32_t*) { copy_async_16(0, input + 64, true); }},
    {"barrier_that_one_thread_leaves_out", 64, 256,
     [](const uint32_t*, uint32_t*) {
       if (thread_index() != 37) sync_threads();
     }},
    {"barrier_after_the_first_thread_returned", 64, 256,
     [](const uint32_t*, uint32_t*) {
       if (thread_index() != 0) sync_threads();
     }},
    {"warp_barrier_that_one_lane_leaves_out", 64, 256,
     [](const uint32_t*, uint32_t*) {
       if (thread_index() != 37) sync_warp();
     }},
    {"barrier_and_shuffle_in_one_warp", 64, 256,
     [](const uint32_t*, uint32_t*) {
       if (thread_index() == 37) {
         shuffle_xor(1, 1);
       } else {
         sync_threads();
       }
     }},
    {"shuffle_with_mask_32", 64, 256, [](const uint32_t*, uint32_t*) { shuffle_xor(1, 32); }},

    // Errors that only AddressSanitizer and UndefinedBehaviorSanitizer see.
    {"own_array_overrun", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       uint32_t own[4] = {};
       uint32_t* element = own + load_global(input);
       *element = 1;
       store_global(output, own[0] + own[3]);
     }},
    {"access_behind_the_primitives", 32, 0,
     [](const uint32_t* input, uint32_t* output) { store_global(output, input[load_global(input)]); }},
    {"signed_overflow", 32, 0,
     [](const uint32_t* input, uint32_t* output) {
       const int large = 0x7fffffff;
       store_global(output, static_cast<uint32_t>(large + static_cast<int>(load_global(input))));
     }},
};

}  // namespace
}  // namespace nemo_ext::cuda

namespace nemo_ext::emulation {

void run_self_test(const std::string& name, const uint32_t* input, size_t input_size, uint32_t* output,
                   size_t output_size, int64_t blocks, const Execution& execution) {
  const auto* test = std::find_if(std::begin(cuda::kSelfTests), std::end(cuda::kSelfTests),
                                  [&](const cuda::SelfTest& each) { return name == each.name; });
  if (test == std::end(cuda::kSelfTests)) throw std::runtime_error("there is no self-test " + name);
  run({.grid_x = blocks,
       .grid_y = 1,
       .threads = test->threads,
       .shared_bytes = test->shared_bytes,
       .execution = execution},
      {{input, input_size * sizeof(uint32_t), false, "input"},
       {output, output_size * sizeof(uint32_t), true, "output"}},
      [&] { test->kernel(input, output); });
}

}  // namespace nemo_ext::emulation
