// The emulated kernels over NumPy arrays, for the tests. Free of torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "csrc/emulation/probes.h"

namespace py = pybind11;

namespace {

namespace emulation = nemo_ext::emulation;

emulation::Order order_of(const std::string& name) {
  if (name == "forward") return emulation::Order::Forward;
  if (name == "reverse") return emulation::Order::Reverse;
  if (name == "random") return emulation::Order::Random;
  throw std::runtime_error("order must be forward, reverse or random, got " + name);
}

using Words = py::array_t<uint32_t, py::array::c_style>;

void run_probe(const std::string& name, const Words& input, Words& output, int64_t blocks,
               const std::string& order, uint64_t seed) {
  emulation::run_probe(name, input.data(), input.size(), output.mutable_data(), output.size(), blocks,
                       order_of(order), seed);
}

}  // namespace

PYBIND11_MODULE(_emulation, module) {
  module.doc() = "nemo_ext's CUDA kernels, executed on the CPU.";
  module.def("run_probe", &run_probe, py::arg("name"), py::arg("input").noconvert(),
             py::arg("output").noconvert(), py::arg("blocks"), py::arg("order"), py::arg("seed"));
}
