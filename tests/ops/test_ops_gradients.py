"""The gradients of `value_projection` are compared with PyTorch's autograd through the float64 reference."""

import op_cases
import pytest
import torch

from nemo_ext import ops, reference

NAMES = ("hidden", "weight", "bias", "scale")


def make(device, scale_shape, dtype=torch.float32, batch=3, tokens=5, in_features=17, out_features=7):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    shape = (out_features,) if scale_shape == "per_neuron" else (batch, out_features)
    inputs = {
        "hidden": normal(batch, tokens, in_features).to(dtype),
        "weight": normal(out_features, in_features).to(dtype),
        "bias": normal(out_features).to(dtype),
        "scale": normal(*shape),
    }
    inputs["scale"][..., 2:4] = 0
    return inputs, normal(batch, tokens, out_features)


def gradients(operator, inputs, weighting, wanted=NAMES):
    leaves = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    values = operator(**leaves)
    return torch.autograd.grad(values, [leaves[name] for name in wanted], weighting.to(values.dtype))


both_scales = pytest.mark.parametrize("scale_shape", ["per_neuron", "per_prompt"])


@both_scales
def test_all_four_gradients_are_those_of_the_reference(scale_shape, device):
    inputs, weighting = make(device, scale_shape)
    ours = gradients(ops.value_projection, inputs, weighting)
    exact = gradients(reference.value_projection, inputs, weighting)
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@both_scales
def test_a_switched_off_neuron_still_has_a_gradient_to_be_switched_on(scale_shape, device):
    inputs, weighting = make(device, scale_shape)
    (of_scale,) = gradients(ops.value_projection, inputs, weighting, wanted=("scale",))
    assert (of_scale[inputs["scale"] == 0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@both_scales
def test_half_precision_gradients_keep_dtype_and_value(scale_shape, dtype, device):
    inputs, weighting = make(device, scale_shape, dtype)
    ours = gradients(ops.value_projection, inputs, weighting.to(dtype))
    exact = gradients(reference.value_projection, inputs, weighting.to(dtype))
    for name, one, two in zip(NAMES, ours, exact, strict=True):
        assert one.dtype == inputs[name].dtype
        rounding = 4 * torch.finfo(dtype).eps * two.abs().max().item()
        torch.testing.assert_close(one.double(), two.double(), rtol=0, atol=rounding)


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_can_be_asked_for_alone(wanted, device):
    inputs, weighting = make(device, "per_prompt")
    (ours,) = gradients(ops.value_projection, inputs, weighting, wanted=(wanted,))
    (exact,) = gradients(reference.value_projection, inputs, weighting, wanted=(wanted,))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_gradients_without_bias_and_scale_are_those_of_the_reference(device):
    inputs, weighting = make(device, "per_neuron")
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    ours = torch.autograd.grad(ops.value_projection(hidden, weight), (hidden, weight), weighting)
    exact = torch.autograd.grad(reference.value_projection(hidden, weight), (hidden, weight), weighting.double())
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_gradients_of_strided_inputs_are_those_of_the_reference(device):
    inputs, weighting = make(device, "per_neuron")
    inputs["hidden"] = inputs["hidden"][:1].expand(3, -1, -1)
    inputs["weight"] = inputs["weight"].T.contiguous().T
    ours = gradients(ops.value_projection, inputs, weighting.transpose(0, 1).contiguous().transpose(0, 1))
    exact = gradients(reference.value_projection, inputs, weighting)
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@both_scales
def test_second_derivatives_are_those_of_the_reference(scale_shape, device):
    inputs, weighting = make(device, scale_shape)

    def penalty(operator):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        values = operator(**leaves)
        first = torch.autograd.grad(values, list(leaves.values()), weighting.to(values.dtype), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), list(leaves.values()), allow_unused=True)

    for one, two in zip(penalty(ops.value_projection), penalty(reference.value_projection), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


def test_the_statistics_operator_gives_no_gradient(device):
    inputs, _ = make(device, "per_neuron")
    inputs["hidden"].requires_grad_()
    buffers = op_cases.running_buffers(7, device)
    values, activation = ops.value_projection_stats(**inputs, token_mask=None, **buffers)
    assert not values.requires_grad
    assert not activation.requires_grad
