"""The compiled operators against float64, over the whole table of cases.

Judged by PyTorch's own error: at most twice what the same computation in PyTorch, in the same precision, is off by,
and a floor of one rounding of the result.
"""

import op_cases
import pytest
import torch
from torch.nn.functional import linear

from nemo_ext import ops, reference

every_case = pytest.mark.parametrize("case", op_cases.CASES, ids=str)
every_case_with_tokens = pytest.mark.parametrize(
    "case", [case for case in op_cases.CASES if case.tokens or not case.batch], ids=str
)


def largest(errors):
    return errors.abs().max()


def typical(errors):
    return errors.square().mean().sqrt()


def assert_as_good_as_torch(ours, torchs, exact, size=largest):
    if exact.numel() == 0:
        return
    rounding = torch.finfo(ours.dtype).eps * size(exact)
    assert size(ours.double() - exact) <= 2 * size(torchs.double() - exact) + rounding


def torch_values(hidden, weight, bias, scale):
    """What a PyTorch user would write, in the precision of `hidden`."""
    values = linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    if scale is not None:
        values = values * (scale.unsqueeze(1) if scale.dim() == 2 else scale).to(hidden.dtype)
    return values


@every_case
def test_values_are_as_exact_as_pytorchs(case, device):
    inputs = op_cases.projection_inputs(case, device)
    values = ops.value_projection(**inputs)
    assert values.shape == (case.batch, case.tokens, case.out_features)
    assert values.dtype == case.dtype
    assert values.is_contiguous()
    assert_as_good_as_torch(values, torch_values(**inputs), reference.value_projection(**inputs))


@every_case_with_tokens
def test_statistics_call_gives_the_same_values_bit_for_bit(case, device):
    inputs = op_cases.projection_inputs(case, device)
    buffers = op_cases.running_buffers(case.out_features, device)
    values, _ = ops.value_projection_stats(**inputs, token_mask=op_cases.token_mask(case, device), **buffers)
    assert torch.equal(values, ops.value_projection(**inputs))


@every_case_with_tokens
def test_writing_the_values_or_not_changes_no_bit_of_the_statistics(case, device):
    inputs, mask = op_cases.projection_inputs(case, device), op_cases.token_mask(case, device)
    results = []
    for return_values in (True, False):
        buffers = op_cases.running_buffers(case.out_features, device)
        _, activation = ops.value_projection_stats(**inputs, token_mask=mask, **buffers, return_values=return_values)
        results.append([activation, *buffers.values()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@every_case_with_tokens
def test_activation_is_as_exact_as_pytorchs(case, device):
    inputs, mask = op_cases.projection_inputs(case, device), op_cases.token_mask(case, device)
    _, activation = ops.value_projection_stats(
        **inputs, token_mask=mask, **op_cases.running_buffers(case.out_features, device), return_values=False
    )
    _, exact = reference.value_projection_stats(
        **inputs, token_mask=mask, **op_cases.running_buffers(case.out_features, device)
    )
    weights = torch.ones(case.batch, case.tokens, device=device) if mask is None else mask.float()
    size = torch_values(inputs["hidden"], inputs["weight"], inputs["bias"], None).abs().float()
    torchs = (size * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)
    assert activation.dtype == torch.float32
    assert_as_good_as_torch(activation, torchs, exact)


@every_case_with_tokens
def test_running_statistics_follow_the_reference(case, device):
    inputs, mask = op_cases.projection_inputs(case, device), op_cases.token_mask(case, device)
    ours, exact = (op_cases.running_buffers(case.out_features, device) for _ in range(2))
    for _ in range(2):
        ops.value_projection_stats(**inputs, token_mask=mask, **ours, return_values=False)
        reference.value_projection_stats(**inputs, token_mask=mask, **exact)
    assert ours["count"] == exact["count"] == 2 * case.batch
    torch.testing.assert_close(ours["mean"], exact["mean"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["m2"], exact["m2"], rtol=1e-4, atol=1e-6)


@every_case
def test_the_scales_gradient_is_as_exact_as_pytorchs(case, device):
    """By the root mean square: in products of two random numbers the largest error is a matter of luck."""
    inputs, gradient = op_cases.projection_inputs(case, device), op_cases.output_gradient(case, device)
    inputs.pop("scale")
    by_prompt = torch.ops.nemo_ext.value_projection_scale_gradient(gradient, **inputs)
    exact = reference.value_projection_scale_gradient(gradient, **inputs)
    torchs = (gradient.float() * torch_values(**inputs, scale=None).float()).sum(1)
    assert by_prompt.dtype == torch.float32
    assert_as_good_as_torch(by_prompt, torchs, exact, size=typical)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4), (2, 0, 4)], ids=str)
def test_value_projection_takes_any_leading_shape(leading, device):
    hidden, weight, scale = (torch.randn(*shape, device=device) for shape in ((*leading, 17), (7, 17), (7,)))
    values = ops.value_projection(hidden, weight, scale=scale)
    torch.testing.assert_close(values, reference.value_projection(hidden, weight, scale=scale).float())


def test_activation_is_taken_before_the_scale(device):
    hidden, weight = torch.randn(2, 77, 17, device=device), torch.randn(7, 17, device=device)
    activations = [
        ops.value_projection_stats(hidden, weight, None, scale, None, **op_cases.running_buffers(7, device))[1]
        for scale in (None, torch.zeros(7, device=device))
    ]
    assert torch.equal(*activations)


def test_values_are_none_when_not_asked_for(device):
    hidden, weight = torch.randn(2, 77, 17, device=device), torch.randn(7, 17, device=device)
    values, activation = ops.value_projection_stats(
        hidden, weight, None, None, None, **op_cases.running_buffers(7, device), return_values=False
    )
    assert values is None
    assert activation.shape == (2, 7)


def test_a_masked_token_may_hold_anything(device):
    hidden, weight = torch.randn(2, 5, 17, device=device), torch.randn(7, 17, device=device)
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[:, 3:] = False
    _, clean = ops.value_projection_stats(hidden, weight, None, None, mask, **op_cases.running_buffers(7, device))
    hidden[:, 3:] = torch.nan
    _, padded = ops.value_projection_stats(hidden, weight, None, None, mask, **op_cases.running_buffers(7, device))
    assert torch.equal(clean, padded)


@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
def test_a_non_finite_input_shows_in_its_own_values_only(dtype, device):
    hidden, weight = (torch.randn(shape, dtype=dtype, device=device) for shape in ((2, 5, 18), (7, 18)))
    hidden[1, 2, 3] = torch.inf
    values = ops.value_projection(hidden, weight)
    assert not values[1, 2].isfinite().any()
    assert values[0].isfinite().all()
    assert values[1, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
@pytest.mark.parametrize("spoilt", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_switching_neurons_off_hides_no_infinity(value, spoilt, dtype, device):
    """One neuron alone, and so many that nothing else would have to be multiplied."""
    inputs = {"hidden": torch.randn(2, 5, 17), "weight": torch.randn(70, 17), "bias": torch.randn(70)}
    finite = torch.ones(2, 5, 70, dtype=torch.bool)
    finite[{"hidden": (1, 4), "weight": (..., 40), "bias": (..., 40)}[spoilt]] = False
    inputs[spoilt][{"hidden": (1, 4, 16), "weight": (40, 16), "bias": (40,)}[spoilt]] = value
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    for off in ([40], slice(None)):
        scale = torch.ones(70, device=device)
        scale[off] = 0
        values = ops.value_projection(**inputs, scale=scale).cpu()
        assert torch.equal(values.isfinite(), finite)
        assert not values[..., off][finite[..., off]].any()


@pytest.mark.leg("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neurons_that_are_off_together_are_not_multiplied(dtype, device):
    """Seen by what is too large for float32: multiplied it would be infinite, and times 0 no number."""
    hidden = torch.full((2, 3, 17), 1e30, device=device).to(dtype)
    weight = torch.full((70, 17), 1e30, device=device).to(dtype)
    scale = torch.zeros(2, 70, device=device)
    scale[1, 0] = 1
    values = ops.value_projection(hidden, weight, scale=scale)
    assert not values[0].any()
    assert values[1, :, 0].isposinf().all()
    assert not values[1, :, 32:].any()


@pytest.mark.leg("cpu")
@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
def test_a_value_switched_off_has_no_sign(dtype, device):
    """Multiplied or not, the bits are the same."""
    hidden, weight = (torch.randn(shape, dtype=dtype, device=device) for shape in ((2, 5, 17), (70, 17)))
    scale = torch.zeros(70, device=device)
    scale[0] = 1
    assert not ops.value_projection(hidden, weight, scale=scale)[..., 1:].signbit().any()


def test_values_too_large_for_half_precision_become_infinite(device):
    hidden, weight = (torch.full(shape, 200, dtype=torch.float16, device=device) for shape in ((1, 1, 4), (1, 4)))
    assert ops.value_projection(hidden, weight).isposinf().all()
