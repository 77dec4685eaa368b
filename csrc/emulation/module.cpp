// A Python module for the tests, without torch: the emulated CUDA kernels and CPU variants on NumPy arrays.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/emulation/cpu.h"
#include "csrc/emulation/projection.h"
#include "csrc/emulation/self_tests.h"

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

emulation::Execution execution_of(const std::string& order, uint64_t seed, int adder_terms,
                                  int adder_extra_bits) {
  return {order_of(order), seed, {adder_terms, adder_extra_bits}};
}

void run_self_test(const std::string& name, const Words& input, Words& output, int64_t blocks,
                   const std::string& order, uint64_t seed, int adder_terms, int adder_extra_bits) {
  emulation::run_self_test(name, input.data(), input.size(), output.mutable_data(), output.size(), blocks,
                           execution_of(order, seed, adder_terms, adder_extra_bits));
}

std::optional<nemo_ext::cuda::Shape> shape_of(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  if (name == "wide") return nemo_ext::cuda::Shape::Wide;
  if (name == "medium") return nemo_ext::cuda::Shape::Medium;
  if (name == "narrow") return nemo_ext::cuda::Shape::Narrow;
  if (name == "strided") return nemo_ext::cuda::Shape::Strided;
  if (name == "loaded") return nemo_ext::cuda::Shape::Loaded;
  if (name == "small") return nemo_ext::cuda::Shape::Small;
  throw std::runtime_error("shape must be wide, medium, narrow, strided, loaded, small or None, got " +
                           *name);
}

// Returns null for None.
void* data_of(const py::object& object, const char* name, int64_t size, int element_bytes) {
  if (object.is_none()) return nullptr;
  const auto array = py::cast<py::array>(object);
  if (array.size() != size || array.itemsize() != element_bytes || !(array.flags() & py::array::c_style)) {
    throw std::runtime_error(std::string(name) + " must be " + std::to_string(size) +
                             " contiguous elements of " + std::to_string(element_bytes) + " bytes, got " +
                             std::to_string(array.size()) + " of " + std::to_string(array.itemsize()));
  }
  return const_cast<void*>(array.data());
}

// Makes a Projection of the operands and results of one call, each None if the call has none. The kernels
// write results into the arrays that are passed.
nemo_ext::Projection projection_of(const std::string& element, const py::array& hidden,
                                   const py::array& weight, const py::object& bias, const py::object& scale,
                                   const py::object& token_mask, const py::object& gradient,
                                   const py::object& values, const py::object& activation,
                                   const py::object& scale_gradient) {
  if (hidden.ndim() != 3 || weight.ndim() != 2 || hidden.shape(2) != weight.shape(1)) {
    throw std::runtime_error(
        "hidden must be [batch, tokens, in_features] and weight [out_features, in_features]");
  }
  nemo_ext::Projection p{};
  p.element = nemo_ext::element_named(element);
  const int element_bytes = p.element == nemo_ext::Element::Float32 ? 4 : 2;
  if (hidden.itemsize() != element_bytes || weight.itemsize() != element_bytes) {
    throw std::runtime_error("hidden and weight must have elements as large as " + element);
  }
  p.batch = hidden.shape(0);
  p.tokens = hidden.shape(1);
  p.in_features = hidden.shape(2);
  p.out_features = weight.shape(0);
  p.hidden = hidden.data();
  p.weight = weight.data();
  for (int axis = 0; axis < 3; ++axis) p.hidden_strides[axis] = hidden.strides(axis) / element_bytes;
  for (int axis = 0; axis < 2; ++axis) p.weight_strides[axis] = weight.strides(axis) / element_bytes;
  const int64_t per_prompt = p.batch * p.out_features, per_value = per_prompt * p.tokens;
  if (!scale.is_none() && py::cast<py::array>(scale).ndim() == 2) p.scale_batch_stride = p.out_features;
  p.bias = static_cast<const float*>(data_of(bias, "bias", p.out_features, 4));
  p.scale = static_cast<const float*>(
      data_of(scale, "scale", p.scale_batch_stride ? per_prompt : p.out_features, 4));
  p.token_mask = static_cast<const bool*>(data_of(token_mask, "token_mask", p.batch * p.tokens, 1));
  p.gradient = data_of(gradient, "gradient", per_value, element_bytes);
  p.values = data_of(values, "values", per_value, element_bytes);
  p.activation = static_cast<float*>(data_of(activation, "activation", per_prompt, 4));
  p.scale_gradient = static_cast<float*>(data_of(scale_gradient, "scale_gradient", per_prompt, 4));
  return p;
}

// Only the plan depends on the shared memory of a multiprocessor, and every tile fits there.
constexpr int kSharedBytesOfAnA100 = 164 << 10;
constexpr int kArchitectureOfAnA100 = 80;

// Runs the CUDA kernels.
void project(const std::string& element, const py::array& hidden, const py::array& weight,
             const py::object& bias, const py::object& scale, const py::object& token_mask,
             const py::object& gradient, const py::object& values, const py::object& activation,
             const py::object& scale_gradient, const py::object& count, const py::object& mean,
             const py::object& m2, const py::object& products, int64_t product_bytes, int multiprocessors,
             const std::optional<std::string>& shape, const std::string& order, uint64_t seed,
             int adder_terms, int adder_extra_bits) {
  const nemo_ext::Projection p = projection_of(element, hidden, weight, bias, scale, token_mask, gradient,
                                               values, activation, scale_gradient);
  const emulation::Running running{static_cast<double*>(data_of(count, "count", 1, 8)),
                                   static_cast<double*>(data_of(mean, "mean", p.out_features, 8)),
                                   static_cast<double*>(data_of(m2, "m2", p.out_features, 8))};
  std::optional<emulation::Products> given;
  if (!products.is_none()) {
    const int64_t size = p.batch * p.tokens * p.out_features;
    given = {static_cast<const float*>(data_of(products, "products", size, 4)), product_bytes};
  }
  emulation::project(p, given, running, {multiprocessors, kSharedBytesOfAnA100, kArchitectureOfAnA100},
                     shape_of(shape), execution_of(order, seed, adder_terms, adder_extra_bits));
}

// Runs a variant of the CPU kernels, which keep no running statistics.
void project_on_cpu(const std::string& element, const py::array& hidden, const py::array& weight,
                    const py::object& bias, const py::object& scale, const py::object& token_mask,
                    const py::object& gradient, const py::object& values, const py::object& activation,
                    const py::object& scale_gradient, const std::string& variant) {
  emulation::project_on_cpu(projection_of(element, hidden, weight, bias, scale, token_mask, gradient, values,
                                          activation, scale_gradient),
                            variant);
}

py::dict tile(const std::string& element, const std::string& shape) {
  return nemo_ext::cuda::with_block_tile(nemo_ext::element_named(element), *shape_of(shape), [&](auto tile) {
    using T = decltype(tile);
    py::dict facts;
    facts["threads"] = T::kThreads;
    facts["tokens"] = T::kTokens;
    facts["neurons"] = T::kNeurons;
    facts["blocks"] = T::kBlocks;
    facts["shared_bytes"] = T::kSharedBytes;
    constexpr nemo_ext::cuda::Clocks kClocks = nemo_ext::cuda::clocks_of(T{});
    facts["clocks"] = py::make_tuple(kClocks.step, kClocks.wait, kClocks.epilogue);
    return facts;
  });
}

// The plan of a call with contiguous operands.
py::dict plan(const std::string& element, int64_t batch, int64_t tokens, int64_t in_features,
              int64_t out_features, bool statistics, int multiprocessors, int shared_bytes) {
  alignas(16) static char memory[16];
  nemo_ext::cuda::Projection p{};
  p.element = nemo_ext::element_named(element);
  p.batch = batch;
  p.tokens = tokens;
  p.in_features = in_features;
  p.out_features = out_features;
  p.hidden = p.weight = memory;
  p.hidden_strides[0] = tokens * in_features;
  p.hidden_strides[1] = p.weight_strides[0] = in_features;
  p.hidden_strides[2] = p.weight_strides[1] = 1;
  if (statistics) p.activation = reinterpret_cast<float*>(memory);
  const nemo_ext::cuda::Gpu gpu{multiprocessors, shared_bytes, kArchitectureOfAnA100};
  const nemo_ext::cuda::Plan found = nemo_ext::cuda::plan(p, gpu);
  return nemo_ext::cuda::with_block_tile(p.element, found.shape, [&](auto tile) {
    using T = decltype(tile);
    py::dict facts;
    constexpr const char* kNames[] = {"wide", "medium", "narrow", "strided", "loaded", "small"};
    facts["shape"] = kNames[static_cast<int>(found.shape)];
    facts["blocks"] = found.grid_x * found.grid_y;
    facts["warps"] = T::kThreads / nemo_ext::cuda::kWarpSize;
    facts["resident"] = nemo_ext::cuda::resident_blocks<T>(gpu);
    return facts;
  });
}

bool is_better_copied(size_t address, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                      int element_size) {
  return nemo_ext::cuda::is_better_copied(reinterpret_cast<const void*>(address), sizes.data(),
                                          strides.data(), static_cast<int>(sizes.size()), element_size);
}

}  // namespace

PYBIND11_MODULE(_emulation, module) {
  module.doc() = "nemo_ext's CUDA kernels and all variants of its CPU kernels, executed on this CPU.";
  module.def("run_self_test", &run_self_test, py::arg("name"), py::arg("input").noconvert(),
             py::arg("output").noconvert(), py::arg("blocks") = 1, py::arg("order") = "forward",
             py::arg("seed") = 0, py::arg("adder_terms") = 0, py::arg("adder_extra_bits") = 0);
  module.def("tile", &tile, py::arg("element"), py::arg("shape"));
  module.def("plan", &plan, py::kw_only(), py::arg("element"), py::arg("batch"), py::arg("tokens"),
             py::arg("in_features"), py::arg("out_features"), py::arg("statistics"),
             py::arg("multiprocessors"), py::arg("shared_bytes"));
  module.def("is_better_copied", &is_better_copied, py::arg("address"), py::arg("sizes"), py::arg("strides"),
             py::arg("element_size"));
  module.def("bank_conflicts", &emulation::bank_conflicts);
  module.def("project", &project, py::kw_only(), py::arg("element"), py::arg("hidden"), py::arg("weight"),
             py::arg("bias") = py::none(), py::arg("scale") = py::none(), py::arg("token_mask") = py::none(),
             py::arg("gradient") = py::none(), py::arg("values") = py::none(),
             py::arg("activation") = py::none(), py::arg("scale_gradient") = py::none(),
             py::arg("count") = py::none(), py::arg("mean") = py::none(), py::arg("m2") = py::none(),
             py::arg("products") = py::none(), py::arg("product_bytes") = nemo_ext::cuda::kProductBytes,
             py::arg("multiprocessors"), py::arg("shape") = py::none(), py::arg("order"), py::arg("seed"),
             py::arg("adder_terms") = 0, py::arg("adder_extra_bits") = 0);
  module.def("project_on_cpu", &project_on_cpu, py::kw_only(), py::arg("element"), py::arg("hidden"),
             py::arg("weight"), py::arg("bias") = py::none(), py::arg("scale") = py::none(),
             py::arg("token_mask") = py::none(), py::arg("gradient") = py::none(),
             py::arg("values") = py::none(), py::arg("activation") = py::none(),
             py::arg("scale_gradient") = py::none(), py::arg("variant"));
}
