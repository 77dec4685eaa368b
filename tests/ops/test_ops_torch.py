"""The operators work with opcheck, torch.compile, autocast, meta tensors and inference mode."""

import op_cases
import pytest
import torch

from nemo_ext import ops

both_scales = pytest.mark.parametrize("scale_shape", [(7,), (3, 7)], ids=["per_neuron", "per_prompt"])
every_dtype = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)


def make(device, scale_shape=(3, 7), dtype=torch.float32, requires_grad=False):
    inputs = (
        torch.randn(3, 5, 17, dtype=dtype, device=device),
        torch.randn(7, 17, dtype=dtype, device=device),
        torch.randn(7, dtype=dtype, device=device),
        torch.randn(scale_shape, device=device),
    )
    return tuple(tensor.requires_grad_(requires_grad) for tensor in inputs)


def fresh_buffers(device):
    return tuple(op_cases.running_buffers(7, device).values())


@both_scales
@every_dtype
def test_value_projection_passes_opcheck(scale_shape, dtype, device):
    inputs = make(device, scale_shape, dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.nemo_ext.value_projection.default, inputs)


@pytest.mark.parametrize("return_values", [True, False])
def test_value_projection_stats_passes_opcheck(return_values, device):
    mask = torch.ones(3, 5, dtype=torch.bool, device=device)
    arguments = (*make(device), mask, *fresh_buffers(device), return_values)
    torch.library.opcheck(torch.ops.nemo_ext.value_projection_stats.default, arguments)


@every_dtype
def test_the_gradient_of_the_scale_passes_opcheck(dtype, device):
    hidden, weight, bias, _ = make(device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(3, 5, 7, dtype=dtype, device=device, requires_grad=True)
    operator = torch.ops.nemo_ext.value_projection_scale_gradient.default
    torch.library.opcheck(operator, (gradient, hidden, weight, bias))


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_projection_compiles_into_one_graph(backend, device):
    compiled = torch.compile(ops.value_projection, fullgraph=True, backend=backend)
    inputs = make(device, requires_grad=True)
    ours, expected = compiled(*inputs), ops.value_projection(*inputs)
    assert torch.equal(ours, expected)
    for one, two in zip(
        torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_graph_updates_the_running_statistics(backend, device):
    compiled = torch.compile(ops.value_projection_stats, fullgraph=True, backend=backend)
    inputs, ours, expected = make(device), fresh_buffers(device), fresh_buffers(device)
    for _ in range(2):
        values, activation = compiled(*inputs, None, *ours)
        plain_values, plain_activation = ops.value_projection_stats(*inputs, None, *expected)
    assert torch.equal(values, plain_values)
    assert torch.equal(activation, plain_activation)
    assert all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))


def test_switching_neurons_off_needs_no_new_graph(device):
    graphs = []

    def count_graphs(graph, _):
        graphs.append(graph)
        return graph.forward

    hidden, weight, bias, scale = make(device)
    compiled = torch.compile(ops.value_projection, fullgraph=True, backend=count_graphs)
    for _ in range(3):
        scale[:, torch.randint(7, ())] = 0
        torch.testing.assert_close(
            compiled(hidden, weight, bias, scale), ops.value_projection(hidden, weight, bias, scale)
        )
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_linear(dtype, device):
    inputs = make(device)
    with torch.autocast(device.type, dtype):
        values = ops.value_projection(*inputs)
        assert values.dtype == torch.nn.functional.linear(*inputs[:3]).dtype == dtype
    cast = [tensor.to(dtype) for tensor in inputs[:3]]
    assert torch.equal(values, ops.value_projection(*cast, inputs[3]))


def test_autocast_leaves_the_running_buffers_in_float64(device):
    inputs, buffers = make(device), fresh_buffers(device)
    with torch.autocast(device.type, torch.bfloat16):
        values, activation = ops.value_projection_stats(*inputs, None, *buffers)
    assert values.dtype == torch.bfloat16
    assert activation.dtype == torch.float32
    assert buffers[0] == 3


def test_autocast_gradients_come_back_in_the_callers_precision(device):
    inputs = make(device, requires_grad=True)
    with torch.autocast(device.type):
        values = ops.value_projection(*inputs)
    values.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs)


def test_autocast_works_inside_a_compiled_graph(device):
    inputs = make(device)
    with torch.autocast(device.type):
        compiled = torch.compile(ops.value_projection, fullgraph=True, backend="aot_eager")(*inputs)
        assert torch.equal(compiled, ops.value_projection(*inputs))


def test_meta_tensors_give_shapes_without_computing():
    values, activation = ops.value_projection_stats(*make("meta"), None, *fresh_buffers("meta"))
    assert values.shape == (3, 5, 7)
    assert activation.shape == (3, 7)
    assert activation.dtype == torch.float32


def test_inference_mode_changes_no_value(device):
    inputs = make(device)
    with torch.inference_mode():
        assert torch.equal(ops.value_projection(*inputs), ops.value_projection(*(tensor.clone() for tensor in inputs)))
