// Main loop for CPUs without a variant of their own: PyTorch multiplies one token block with one panel, in
// float32 for every dtype.
//
// A BLAS library may add in another order if the shape, the alignment or the number of threads changes. For a
// given prompt these are the same in every call, whatever the batch is, so that the results do not depend on
// the other prompts.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

// Neurons of a panel. The library is fast at this width, and the layers of Stable Diffusion are multiples of
// it.
constexpr int kWidth = 320;
constexpr int kTokenBlock = 77;
constexpr int kAlignment = 64;

inline bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kAlignment == 0;
}

int64_t panel_size(const Projection& p) {
  return (kWidth * p.in_features + 15) / 16 * 16;
}

// Copies the rows of weight one after another, without gaps, as the library expects them.
void pack(const Projection& p, int64_t panel, float* packed) {
  for (int64_t lane = 0; lane < kWidth; ++lane) {
    const int64_t neuron = panel * kWidth + lane;
    const int64_t count = neuron < p.out_features ? p.in_features : 0;
    copy_words(p, offset(p, p.weight, count ? neuron * p.weight_strides[0] : 0), p.weight_strides[1], count,
               packed + lane * p.in_features, p.in_features);
  }
}

inline torch::stable::Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t row_stride,
                                    int64_t column_stride) {
  return torch::stable::from_blob(const_cast<float*>(data), {rows, columns}, {row_stride, column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch::headeronly::ScalarType::Float);
}

inline void multiply_by_library(const float* hidden, int64_t row_stride, int64_t tokens, const float* panel,
                                int64_t depth, int64_t neurons, float (*accumulators)[kWidth]) {
  torch::stable::Tensor sums = matrix(accumulators[0], tokens, neurons, kWidth, 1);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(sums.get(), matrix(hidden, tokens, depth, row_stride, 1).get(),
                                               matrix(panel, depth, neurons, 1, depth).get()));
}

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
