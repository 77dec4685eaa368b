// Which variant of the CPU kernels runs here. Free of torch: the pybind11 module reports what this says.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nemo_ext::cpu {

enum class Capability { Default, Avx2, Avx512, Avx512Bf16 };

inline constexpr Capability kCapabilities[] = {Capability::Default, Capability::Avx2, Capability::Avx512,
                                               Capability::Avx512Bf16};

inline const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::Avx2:
      return "avx2";
    case Capability::Avx512:
      return "avx512";
    case Capability::Avx512Bf16:
      return "avx512_bf16";
    default:
      return "default";
  }
}

inline bool is_supported(Capability capability) {
#if defined(__x86_64__)
  switch (capability) {
    case Capability::Avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Capability::Avx512:
      return is_supported(Capability::Avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Capability::Avx512Bf16:
      return is_supported(Capability::Avx512) && __builtin_cpu_supports("avx512bf16");
    default:
      return true;
  }
#else
  return capability == Capability::Default;
#endif
}

// The best one, unless NEMO_EXT_CPU_CAPABILITY names another; read once, when the first operator runs.
inline Capability capability() {
  static const Capability chosen = [] {
    const char* wanted = std::getenv("NEMO_EXT_CPU_CAPABILITY");
    Capability best = Capability::Default;
    for (Capability candidate : kCapabilities) {
      if (!is_supported(candidate)) continue;
      if (wanted && std::strcmp(wanted, name_of(candidate)) == 0) return candidate;
      best = candidate;
    }
    if (wanted && *wanted) {
      std::string supported;
      for (Capability candidate : kCapabilities) {
        if (is_supported(candidate))
          supported += std::string(supported.empty() ? "" : ", ") + name_of(candidate);
      }
      throw std::runtime_error("NEMO_EXT_CPU_CAPABILITY must be one that this CPU supports (" + supported +
                               "), got " + wanted);
    }
    return best;
  }();
  return chosen;
}

}  // namespace nemo_ext::cpu
