"""The compiled operators are compared with float64 over the whole table of cases; yardstick.py limits the error."""

import op_cases
import pytest
import torch
import yardstick

from nemo_ext import _module, ops, reference

every_case = op_cases.each(op_cases.CASES)
every_case_with_tokens = op_cases.each([case for case in op_cases.CASES if case.tokens or not case.batch])


@every_case
def test_values_are_as_exact_as_a_sum_in_float32(case, device):
    inputs = op_cases.projection_inputs(case, device)
    values = ops.value_projection(**inputs)
    assert values.shape == (case.batch, case.tokens, case.out_features)
    assert values.dtype == case.dtype
    assert values.is_contiguous()
    yardstick.assert_as_exact(values, yardstick.values(**inputs), reference.value_projection(**inputs))


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
def test_activation_is_as_exact_as_a_sum_in_float32(case, device):
    inputs, mask = op_cases.projection_inputs(case, device), op_cases.token_mask(case, device)
    _, activation = ops.value_projection_stats(
        **inputs, token_mask=mask, **op_cases.running_buffers(case.out_features, device), return_values=False
    )
    _, exact = reference.value_projection_stats(
        **inputs, token_mask=mask, **op_cases.running_buffers(case.out_features, device)
    )
    assert activation.dtype == torch.float32
    inputs.pop("scale")
    yardstick.assert_as_exact(activation, yardstick.activation(**inputs, mask=mask), exact)


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
def test_the_gradient_of_the_scale_is_as_exact_as_a_sum_in_float32(case, device):
    inputs, gradient = op_cases.projection_inputs(case, device), op_cases.output_gradient(case, device)
    inputs.pop("scale")
    by_prompt = torch.ops.nemo_ext.value_projection_scale_gradient(gradient, **inputs)
    exact = reference.value_projection_scale_gradient(gradient, **inputs)
    assert by_prompt.dtype == torch.float32
    sequential = yardstick.scale_gradient(gradient, **inputs)
    yardstick.assert_as_exact(by_prompt, sequential, exact, size=yardstick.root_mean_square)


def sums_of_many_terms():
    """Return hidden and weight with sizes of Stable Diffusion, the exact values and the error of sequential sums."""
    hidden, weight = torch.randn(2, 77, 768), torch.randn(320, 768)
    exact = reference.value_projection(hidden, weight)
    return hidden, weight, exact, yardstick.root_mean_square(yardstick.sum_of_products(hidden, weight).double() - exact)


@pytest.mark.leg("cpu")
def test_float32_is_summed_in_blocks_which_halves_the_error():
    if _module.cpu_choice()[0] == "default":
        pytest.skip("PyTorch decides the order of the sums")
    hidden, weight, exact, sequential_error = sums_of_many_terms()
    values = ops.value_projection(hidden, weight)
    assert yardstick.root_mean_square(values.double() - exact) < 0.5 * sequential_error


@pytest.mark.leg("cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activation_of_half_precision_is_summed_in_float32(dtype):
    """The activation is not the mean of rounded values, whose error would be a thousand times as large."""
    hidden, weight = torch.randn(2, 77, 768).to(dtype), torch.randn(320, 768).to(dtype)
    buffers = op_cases.running_buffers(320)
    _, activation = ops.value_projection_stats(hidden, weight, None, None, None, **buffers, return_values=False)
    _, exact = reference.value_projection_stats(hidden, weight, None, None, None, **op_cases.running_buffers(320))
    sequential = yardstick.sum_over_tokens(yardstick.sum_of_products(hidden, weight).abs()) / 77
    yardstick.assert_as_exact(activation, sequential, exact)


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


def test_values_are_none_if_return_values_is_false(device):
    hidden, weight = torch.randn(2, 77, 17, device=device), torch.randn(7, 17, device=device)
    values, activation = ops.value_projection_stats(
        hidden, weight, None, None, None, **op_cases.running_buffers(7, device), return_values=False
    )
    assert values is None
    assert activation.shape == (2, 7)


def test_a_masked_token_does_not_affect_the_activation(device):
    hidden, weight = torch.randn(2, 5, 17, device=device), torch.randn(7, 17, device=device)
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[:, 3:] = False
    _, clean = ops.value_projection_stats(hidden, weight, None, None, mask, **op_cases.running_buffers(7, device))
    hidden[:, 3:] = torch.nan
    _, padded = ops.value_projection_stats(hidden, weight, None, None, mask, **op_cases.running_buffers(7, device))
    assert torch.equal(clean, padded)


@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
def test_a_non_finite_input_affects_only_its_own_values(dtype, device):
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
    """This holds for one neuron alone, and for whole panels, whose products could be left out."""
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
def test_products_of_a_panel_of_switched_off_neurons_are_not_computed(dtype, device):
    """The products here overflow in float32. If they were computed, ∞ · 0 would give NaN."""
    hidden = torch.full((2, 3, 17), 1e30, device=device).to(dtype)
    weight = torch.full((700, 17), 1e30, device=device).to(dtype)
    scale = torch.zeros(2, 700, device=device)
    scale[1, 0] = 1
    values = ops.value_projection(hidden, weight, scale=scale)
    assert not values[0].any()
    assert values[1, :, 0].isposinf().all()
    # 320 neurons are the widest panel of any variant.
    assert not values[1, :, 320:].any()


@pytest.mark.leg("cpu")
@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
def test_a_switched_off_value_is_positive_zero(dtype, device):
    """So the bits do not tell whether the products of the neuron were computed."""
    hidden, weight = (torch.randn(shape, dtype=dtype, device=device) for shape in ((2, 5, 17), (70, 17)))
    scale = torch.zeros(70, device=device)
    scale[0] = 1
    assert not ops.value_projection(hidden, weight, scale=scale)[..., 1:].signbit().any()


def test_values_too_large_for_half_precision_become_infinite(device):
    hidden, weight = (torch.full(shape, 200, dtype=torch.float16, device=device) for shape in ((1, 1, 4), (1, 4)))
    assert ops.value_projection(hidden, weight).isposinf().all()
