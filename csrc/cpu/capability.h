// Chooses the variant of the CPU kernels that runs on this machine, and states the reason. This header does
// not use torch, because `_module`, which reports the choice, is built without it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace nemo_ext::cpu {

enum class Capability { Default, Avx2, Avx512, Avx512Bf16, Amx };

inline constexpr Capability kCapabilities[] = {Capability::Default, Capability::Avx2, Capability::Avx512,
                                               Capability::Avx512Bf16, Capability::Amx};

inline const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::Avx2:
      return "avx2";
    case Capability::Avx512:
      return "avx512";
    case Capability::Avx512Bf16:
      return "avx512_bf16";
    case Capability::Amx:
      return "amx";
    default:
      return "default";
  }
}

// Vendor and family of the CPU, as CPUID returns them. The vendor is empty if the CPU is not x86-64.
struct CpuModel {
  std::string vendor;
  int family = 0;
};

#if defined(__x86_64__)
struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

inline Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  // If the CPU lacks this leaf, the call fails and the registers stay 0.
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// True if the CPU has AMX tiles with bfloat16 products, the operating system saves the tile state at a
// context switch, and this process has permission to use tiles. On Linux a process must request that
// permission; one request covers all of its threads (Documentation/arch/x86/xstate.rst).
inline bool may_use_tiles() {
#if defined(__linux__)
  static const bool allowed = [] {
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kSystemSaves = 1u << 27;
    const unsigned features = cpuid(7).edx;
    if (!(features & kBf16) || !(features & kTiles) || !(cpuid(1).ecx & kSystemSaves)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTileState = 3u << 17;
    if ((low & kTileState) != kTileState) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

inline bool has_amx_fp16() {
  static const bool present = may_use_tiles() && (cpuid(7, 1).eax & (1u << 21));
  return present;
}
#endif

inline CpuModel cpu_model() {
  CpuModel model;
#if defined(__x86_64__)
  const Registers names = cpuid(0), version = cpuid(1);
  for (unsigned part : {names.ebx, names.edx, names.ecx})
    model.vendor.append(reinterpret_cast<const char*>(&part), sizeof part);
  model.family = version.eax >> 8 & 15;
  if (model.family == 15) model.family += version.eax >> 20 & 255;
#endif
  return model;
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
    case Capability::Amx:
      return is_supported(Capability::Avx512Bf16) && may_use_tiles();
    default:
      return true;
  }
#else
  return capability == Capability::Default;
#endif
}

// A variant, and the reason for the choice in one sentence.
struct Choice {
  Capability capability;
  std::string reason;
};

// True if the dot-product instruction for bfloat16 pairs runs at the rate of a float32 multiply-add, and so
// does twice the work. Measurements: it does on AMD Zen 5 (440 GFLOP/s, against 240 in float32). On an Intel
// Xeon it runs at half the rate and is slower than converting to float32 (100 GFLOP/s against 136). A CPU
// that was not measured counts as slow, because float32 arithmetic is a safe choice everywhere. The decision
// uses the CPU's model and not a measurement at run time, so that every run on one machine makes the same
// choice and returns the same bits.
inline bool has_fast_bf16_dot(const CpuModel& model) {
  return model.vendor == "AuthenticAMD" && model.family >= 0x1a;
}

// The best variant for which `supports` returns true. A main loop for bfloat16 is chosen only if it is not
// slower than the one for float32.
template <typename Supports>
Choice best_choice(const Supports& supports, const CpuModel& model) {
  if (supports(Capability::Amx)) {
    return {Capability::Amx, "this CPU multiplies bfloat16 on AMX tiles"};
  }
  if (supports(Capability::Avx512Bf16) && has_fast_bf16_dot(model)) {
    return {Capability::Avx512Bf16,
            "the bfloat16 dot product of this CPU is twice as fast as its float32 arithmetic"};
  }
  if (supports(Capability::Avx512Bf16)) {
    return {Capability::Avx512,
            "this CPU has a bfloat16 dot product, but it is not known to be faster than float32 arithmetic"};
  }
  if (supports(Capability::Avx512)) return {Capability::Avx512, "it uses the widest vectors of this CPU"};
  if (supports(Capability::Avx2)) return {Capability::Avx2, "it uses the widest vectors of this CPU"};
  return {Capability::Default, "no other variant supports this CPU, so PyTorch computes the products"};
}

// The variant that runs: the best one, or the one that NEMO_EXT_CPU_CAPABILITY names. The environment is read
// once per process, when the first operator runs.
inline const Choice& choice() {
  static const Choice chosen = [] {
    const char* wanted = std::getenv("NEMO_EXT_CPU_CAPABILITY");
    if (!wanted || !*wanted) return best_choice(is_supported, cpu_model());
    std::string supported;
    for (Capability candidate : kCapabilities) {
      if (!is_supported(candidate)) continue;
      if (std::strcmp(wanted, name_of(candidate)) == 0)
        return Choice{candidate, "NEMO_EXT_CPU_CAPABILITY selects it"};
      supported += std::string(supported.empty() ? "" : ", ") + name_of(candidate);
    }
    throw std::runtime_error("NEMO_EXT_CPU_CAPABILITY must be one that this CPU supports (" + supported +
                             "), got " + wanted);
  }();
  return chosen;
}

}  // namespace nemo_ext::cpu
