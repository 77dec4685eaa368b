"""The operators among PyTorch's own machinery: opcheck, torch.compile, autocast, meta tensors, inference mode."""

import op_cases
import pytest
import torch

from nemo_ext import ops

both_scales = pytest.mark.parametrize("scale_shape", [(7,), (3, 7)], ids=["per_neuron", "per_prompt"])
every_dtype = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)


def make(scale_shape=(3, 7), dtype=torch.float32, requires_grad=False):
    inputs = (
        torch.randn(3, 5, 17, dtype=dtype),
        torch.randn(7, 17, dtype=dtype),
        torch.randn(7, dtype=dtype),
        torch.randn(scale_shape),
    )
    return tuple(tensor.requires_grad_(requires_grad) for tensor in inputs)


def fresh_buffers():
    return tuple(op_cases.running_buffers(7).values())


@both_scales
@every_dtype
def test_value_projection_passes_opcheck(scale_shape, dtype):
    torch.library.opcheck(torch.ops.nemo_ext.value_projection.default, make(scale_shape, dtype, requires_grad=True))


@pytest.mark.parametrize("return_values", [True, False])
def test_value_projection_stats_passes_opcheck(return_values):
    mask = torch.ones(3, 5, dtype=torch.bool)
    arguments = (*make(), mask, *fresh_buffers(), return_values)
    torch.library.opcheck(torch.ops.nemo_ext.value_projection_stats.default, arguments)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_projection_compiles_into_one_graph(backend):
    compiled = torch.compile(ops.value_projection, fullgraph=True, backend=backend)
    inputs = make(requires_grad=True)
    ours, expected = compiled(*inputs), ops.value_projection(*inputs)
    assert torch.equal(ours, expected)
    for one, two in zip(
        torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_graph_updates_the_running_statistics(backend):
    compiled = torch.compile(ops.value_projection_stats, fullgraph=True, backend=backend)
    inputs, ours, expected = make(), fresh_buffers(), fresh_buffers()
    for _ in range(2):
        values, activation = compiled(*inputs, None, *ours)
        plain_values, plain_activation = ops.value_projection_stats(*inputs, None, *expected)
    assert torch.equal(values, plain_values)
    assert torch.equal(activation, plain_activation)
    assert all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))


def test_switching_neurons_off_needs_no_new_graph():
    graphs = []

    def count_graphs(graph, _):
        graphs.append(graph)
        return graph.forward

    hidden, weight, bias, scale = make()
    compiled = torch.compile(ops.value_projection, fullgraph=True, backend=count_graphs)
    for _ in range(3):
        scale[:, torch.randint(7, ())] = 0
        torch.testing.assert_close(
            compiled(hidden, weight, bias, scale), ops.value_projection(hidden, weight, bias, scale)
        )
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_linear(dtype):
    inputs = make()
    with torch.autocast("cpu", dtype):
        values = ops.value_projection(*inputs)
        assert values.dtype == torch.nn.functional.linear(*inputs[:3]).dtype == dtype
    cast = [tensor.to(dtype) for tensor in inputs[:3]]
    assert torch.equal(values, ops.value_projection(*cast, inputs[3]))


def test_autocast_leaves_the_running_buffers_in_float64():
    inputs, buffers = make(), fresh_buffers()
    with torch.autocast("cpu"):
        values, activation = ops.value_projection_stats(*inputs, None, *buffers)
    assert values.dtype == torch.bfloat16
    assert activation.dtype == torch.float32
    assert buffers[0] == 3


def test_autocast_gradients_come_back_in_the_callers_precision():
    inputs = make(requires_grad=True)
    with torch.autocast("cpu"):
        values = ops.value_projection(*inputs)
    values.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs)


def test_autocast_works_inside_a_compiled_graph():
    inputs = make()
    with torch.autocast("cpu"):
        compiled = torch.compile(ops.value_projection, fullgraph=True, backend="aot_eager")(*inputs)
        assert torch.equal(compiled, ops.value_projection(*inputs))


def test_meta_tensors_give_shapes_without_computing():
    inputs = tuple(tensor.to("meta") for tensor in make())
    values, activation = ops.value_projection_stats(*inputs, None, *(buffer.to("meta") for buffer in fresh_buffers()))
    assert values.shape == (3, 5, 7)
    assert activation.shape == (3, 7)
    assert activation.dtype == torch.float32


def test_inference_mode():
    inputs = make()
    with torch.inference_mode():
        assert torch.equal(ops.value_projection(*inputs), ops.value_projection(*(tensor.clone() for tensor in inputs)))
