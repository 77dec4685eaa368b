// nemo_ext._module: build facts and CPU capabilities. This module does not use torch, so that it works even
// if the operators do not load with the installed torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <set>
#include <string>

#include "csrc/cpu/capability.h"
#include "csrc/cuda/path.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
  py::dict facts;
  facts["version"] = NEMO_EXT_VERSION;
  facts["platform"] = NEMO_EXT_PLATFORM;
  facts["compiler"] = NEMO_EXT_COMPILER;
  facts["flags"] = NEMO_EXT_FLAGS;
  facts["torch"] = NEMO_EXT_TORCH;
  facts["cuda"] = NEMO_EXT_CUDA;
  facts["cuda_architectures"] = py::str(NEMO_EXT_CUDA_ARCHITECTURES).attr("split")();
  return facts;
}

py::dict cpu_capabilities() {
  py::dict capabilities;
  for (auto capability : nemo_ext::cpu::kCapabilities) {
    capabilities[nemo_ext::cpu::name_of(capability)] = nemo_ext::cpu::is_supported(capability);
  }
  return capabilities;
}

py::tuple as_tuple(const nemo_ext::cpu::Choice& choice) {
  return py::make_tuple(nemo_ext::cpu::name_of(choice.capability), choice.reason);
}

py::tuple cpu_choice() {
  return as_tuple(nemo_ext::cpu::choice());
}

py::tuple best_cpu_choice(const std::set<std::string>& supported, const std::string& vendor, int family) {
  const auto supports = [&](nemo_ext::cpu::Capability capability) {
    return supported.count(nemo_ext::cpu::name_of(capability)) > 0;
  };
  return as_tuple(nemo_ext::cpu::best_choice(supports, {vendor, family}));
}

std::string cuda_path(const std::string& element, int architecture) {
  const auto of = element == "float32"    ? nemo_ext::Element::Float32
                  : element == "bfloat16" ? nemo_ext::Element::BFloat16
                                          : nemo_ext::Element::Float16;
  return nemo_ext::cuda::path_of(of, architecture) == nemo_ext::cuda::Path::Kernel ? "kernel" : "library";
}

}  // namespace

PYBIND11_MODULE(_module, module) {
  module.doc() = "Build facts and CPU capabilities of nemo_ext.";
  module.def("build_facts", &build_facts, "Returns how the compiled modules were built.");
  module.def("cpu_capabilities", &cpu_capabilities,
             "Returns a dict: variant of the CPU kernels -> whether this CPU can run it.");
  module.def(
      "cpu_choice", &cpu_choice,
      "Returns the variant that the operators run and the reason for it. It is the best one, or the one "
      "that NEMO_EXT_CPU_CAPABILITY names.");
  module.def(
      "best_cpu_choice", &best_cpu_choice, py::arg("supported"), py::arg("vendor"), py::arg("family"),
      "Returns the best variant and the reason for it, for a CPU with the supported variants, vendor and "
      "family given. Vendor and family are those that CPUID returns.");
  module.def(
      "cuda_path", &cuda_path, py::arg("element"), py::arg("architecture"),
      "Returns how the operators compute on a GPU, \"kernel\" or \"library\", for float32, bfloat16 or "
      "float16 and an architecture, 90 for sm_90.");
}
