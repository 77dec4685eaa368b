// The schemas of all operators. The kernels in csrc/cpu and csrc/cuda register themselves for their dispatch
// keys; fakes, autograd and autocast are in nemo_ext/ops.py.

#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(nemo_ext, library) {
  library.def("value_projection(Tensor hidden, Tensor weight, Tensor? bias, Tensor? scale) -> Tensor");
  library.def(
      "value_projection_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor? scale, Tensor? token_mask, "
      "Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2, bool return_values) -> (Tensor values, Tensor "
      "activation)");
  library.def(
      "value_projection_scale_gradient(Tensor gradient, Tensor hidden, Tensor weight, Tensor? bias) -> "
      "Tensor");
}

// Python imports this empty module to load the library, which registers the operators.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
