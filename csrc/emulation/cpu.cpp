#include "csrc/emulation/cpu.h"

#include <stdexcept>

#include "csrc/cpu/driver.h"

namespace nemo_ext::emulation {

thread_local bool has_float16_tiles = false;

namespace {

cpu::Variant variant_of(const std::string& name) {
  if (name == "avx2") return cpu::avx2_variant();
  if (name == "avx512") return cpu::avx512_variant();
  if (name == "avx512_bf16") return cpu::avx512_bf16_variant();
  if (name == "amx" || name == "amx_fp16") return cpu::amx_variant();
  throw std::runtime_error("variant must be avx2, avx512, avx512_bf16, amx or amx_fp16, got " + name);
}

}  // namespace

void project_on_cpu(const Projection& projection, const std::string& variant) {
  has_float16_tiles = variant == "amx_fp16";
  cpu::run(variant_of(variant), projection, 1, [](int64_t count, const auto& work) { work(0, count); });
}

}  // namespace nemo_ext::emulation
