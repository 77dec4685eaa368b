// nemo_ext._module: build facts, CPU capabilities and paths on CUDA. This module does not use torch, so that
// it works even if the operators do not load with the installed torch. It keeps to Python's stable ABI, so
// that one binary serves every Python from 3.10 on.

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "csrc/cpu/capability.h"
#include "csrc/cuda/path.h"

namespace {

namespace cpu = nemo_ext::cpu;

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

// Thrown if Python has already set an exception.
struct PythonError {};

Object owned(PyObject* object) {
  if (!object) throw PythonError();
  return Object(object);
}

void require(bool holds) {
  if (!holds) throw PythonError();
}

Object text(const std::string& characters) {
  return owned(PyUnicode_FromStringAndSize(characters.data(), static_cast<Py_ssize_t>(characters.size())));
}

// Calls function(), which returns an Object, and turns a C++ exception into a RuntimeError.
template <typename Function>
PyObject* returned(const Function& function) {
  try {
    return function().release();
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

Object pair_of(const cpu::Choice& choice) {
  return owned(PyTuple_Pack(2, text(cpu::name_of(choice.capability)).get(), text(choice.reason).get()));
}

PyObject* build_facts(PyObject*, PyObject*) {
  return returned([] {
    Object facts = owned(PyDict_New());
    const auto set = [&](const char* name, const Object& value) {
      require(PyDict_SetItemString(facts.get(), name, value.get()) == 0);
    };
    set("version", text(NEMO_EXT_VERSION));
    set("platform", text(NEMO_EXT_PLATFORM));
    set("compiler", text(NEMO_EXT_COMPILER));
    set("flags", text(NEMO_EXT_FLAGS));
    set("torch", text(NEMO_EXT_TORCH));
    set("cuda", text(NEMO_EXT_CUDA));
    set("cuda_architectures", owned(PyUnicode_Split(text(NEMO_EXT_CUDA_ARCHITECTURES).get(), nullptr, -1)));
    return facts;
  });
}

PyObject* cpu_capabilities(PyObject*, PyObject*) {
  return returned([] {
    Object capabilities = owned(PyDict_New());
    for (const auto capability : cpu::kCapabilities) {
      PyObject* supported = cpu::is_supported(capability) ? Py_True : Py_False;
      require(PyDict_SetItemString(capabilities.get(), cpu::name_of(capability), supported) == 0);
    }
    return capabilities;
  });
}

PyObject* cpu_choice(PyObject*, PyObject*) {
  return returned([] { return pair_of(cpu::choice()); });
}

PyObject* best_cpu_choice(PyObject*, PyObject* arguments, PyObject* named) {
  return returned([&] {
    static const char* names[] = {"supported", "vendor", "family", nullptr};
    PyObject* supported = nullptr;
    const char* vendor = nullptr;
    int family = 0;
    require(PyArg_ParseTupleAndKeywords(arguments, named, "Osi", const_cast<char**>(names), &supported,
                                        &vendor, &family));
    const auto supports = [&](cpu::Capability capability) {
      const int found = PySequence_Contains(supported, text(cpu::name_of(capability)).get());
      require(found >= 0);
      return found == 1;
    };
    return pair_of(cpu::best_choice(supports, {vendor, family}));
  });
}

PyObject* cuda_path(PyObject*, PyObject* arguments, PyObject* named) {
  return returned([&] {
    static const char* names[] = {"element", "architecture", nullptr};
    const char* element = nullptr;
    int architecture = 0;
    require(PyArg_ParseTupleAndKeywords(arguments, named, "si", const_cast<char**>(names), &element,
                                        &architecture));
    const bool is_kernel = nemo_ext::cuda::path_of(nemo_ext::element_named(element), architecture) ==
                           nemo_ext::cuda::Path::Kernel;
    return text(is_kernel ? "kernel" : "library");
  });
}

PyCFunction with_names(PyCFunctionWithKeywords function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef kFunctions[] = {
    {"build_facts", build_facts, METH_NOARGS, "Returns how the compiled modules were built."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS,
     "Returns a dict: variant of the CPU kernels -> whether this CPU can run it."},
    {"cpu_choice", cpu_choice, METH_NOARGS,
     "Returns the variant that the operators run and the reason for it. It is the best one, or the one that "
     "NEMO_EXT_CPU_CAPABILITY names."},
    {"best_cpu_choice", with_names(best_cpu_choice), METH_VARARGS | METH_KEYWORDS,
     "Returns the best variant and the reason for it, for a CPU with the supported variants, vendor and "
     "family given. Vendor and family are those that CPUID returns."},
    {"cuda_path", with_names(cuda_path), METH_VARARGS | METH_KEYWORDS,
     "Returns how the operators compute on a GPU, \"kernel\" or \"library\", for float32, bfloat16 or "
     "float16 and an architecture, 90 for sm_90."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "_module",
                       "Build facts, CPU capabilities and paths on CUDA of nemo_ext.",
                       -1,
                       kFunctions,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__module() {
  return PyModule_Create(&kModule);
}
