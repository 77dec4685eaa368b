"""The float64 reference is compared with loops over plain numbers, because all other tests rely on it."""

import math

import numpy as np
import op_cases
import pytest
import torch

from nemo_ext import reference

pytestmark = pytest.mark.leg("reference")

SMALL = 50_000  # products in one call; Python loops over more would take seconds
small_cases = [
    case for case in op_cases.CASES if case.batch * case.tokens * case.in_features * case.out_features < SMALL
]
every_small_case = pytest.mark.parametrize("case", small_cases, ids=str)
every_small_case_with_tokens = pytest.mark.parametrize(
    "case", [case for case in small_cases if case.tokens or not case.batch], ids=str
)


def numbers(tensor):
    return None if tensor is None else tensor.double().numpy()


def projected(hidden, weight, bias):
    """Return e Wᵀ + bias, computed element by element; each sum is rounded once."""
    result = np.empty((*hidden.shape[:2], weight.shape[0]))
    for prompt, token, neuron in np.ndindex(*result.shape):
        products = [float(e * w) for e, w in zip(hidden[prompt, token], weight[neuron], strict=True)]
        result[prompt, token, neuron] = math.fsum([*products, 0.0 if bias is None else bias[neuron]])
    return result


def scaled(values, scale):
    """Return each value times the scale of its neuron, or of its prompt and neuron."""
    result = values.copy()
    for prompt, token, neuron in np.ndindex(*result.shape):
        result[prompt, token, neuron] *= scale[neuron] if scale.ndim == 1 else scale[prompt, neuron]
    return result


def activations(values, mask):
    """Return the mean absolute value over the tokens of each prompt that the mask includes."""
    batch, tokens, neurons = values.shape
    result = np.empty((batch, neurons))
    for prompt, neuron in np.ndindex(batch, neurons):
        kept = [abs(values[prompt, token, neuron]) for token in range(tokens) if mask is None or mask[prompt, token]]
        result[prompt, neuron] = math.fsum(kept) / len(kept)
    return result


@every_small_case
def test_values_are_sums_of_products_times_the_scale(case):
    inputs = op_cases.projection_inputs(case)
    hidden, weight, bias, scale = map(numbers, inputs.values())
    expected = projected(hidden, weight, bias)
    values = reference.value_projection(**inputs)
    assert values.dtype == torch.float64
    np.testing.assert_allclose(
        values.numpy(), expected if scale is None else scaled(expected, scale), rtol=1e-12, atol=1e-13
    )


@every_small_case
def test_the_gradient_of_the_scale_is_a_sum_over_tokens_of_products(case):
    """A scale is multiplied with e Wᵀ + bias of its neuron at every token, so the gradient is a sum over tokens."""
    inputs, gradient = op_cases.projection_inputs(case), op_cases.output_gradient(case)
    del inputs["scale"]
    by_token = projected(*map(numbers, inputs.values())) * numbers(gradient)
    expected = np.empty((case.batch, case.out_features))
    for prompt, neuron in np.ndindex(*expected.shape):
        expected[prompt, neuron] = math.fsum(by_token[prompt, :, neuron])
    by_prompt = reference.value_projection_scale_gradient(gradient, **inputs)
    np.testing.assert_allclose(by_prompt.numpy(), expected, rtol=1e-12, atol=1e-12)


@every_small_case_with_tokens
def test_activation_is_the_mean_absolute_value_before_the_scale(case):
    inputs, mask = op_cases.projection_inputs(case), op_cases.token_mask(case)
    hidden, weight, bias, _ = map(numbers, inputs.values())
    _, activation = reference.value_projection_stats(
        **inputs, token_mask=mask, **op_cases.running_buffers(case.out_features)
    )
    expected = activations(projected(hidden, weight, bias), numbers(mask))
    np.testing.assert_allclose(activation.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 0, 5]], ids=str)
def test_running_statistics_are_those_of_all_prompts_at_once(sizes):
    hidden, weight, bias = torch.randn(9, 4, 5), torch.randn(3, 5), torch.randn(3)
    buffers = op_cases.running_buffers(3)
    for part in hidden.split(sizes):
        reference.value_projection_stats(part, weight, bias, None, None, **buffers)
    every = activations(projected(*map(numbers, (hidden, weight, bias))), None)
    assert buffers["count"] == 9
    for neuron in range(3):
        mean = math.fsum(every[:, neuron]) / 9
        deviations = math.fsum((a - mean) ** 2 for a in every[:, neuron])
        np.testing.assert_allclose(buffers["mean"][neuron], mean, rtol=1e-13)
        np.testing.assert_allclose(buffers["m2"][neuron], deviations, rtol=1e-12)


def test_a_masked_token_does_not_affect_the_activation():
    hidden, weight = torch.randn(2, 4, 5), torch.randn(3, 5)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])
    padded = hidden.masked_fill(~mask.unsqueeze(-1), torch.nan)
    results = [
        reference.value_projection_stats(one, weight, None, None, mask, **op_cases.running_buffers(3))[1]
        for one in (hidden, padded)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("size", [torch.inf, torch.nan, 2.0**50])
def test_an_activation_that_is_not_finite_or_too_large_leaves_the_running_statistics_unchanged(size):
    buffers = op_cases.running_buffers(3)
    with pytest.raises(RuntimeError, match="activation must be finite and less than"):
        reference.value_projection_stats(torch.full((2, 4, 5), size), torch.ones(3, 5), None, None, None, **buffers)
    assert not any(buffer.any() for buffer in buffers.values())
