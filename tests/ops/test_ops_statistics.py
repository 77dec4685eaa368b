"""The running mean and variance over many calls are compared with NumPy's of all activations."""

import numpy as np
import op_cases
import pytest
import torch

from nemo_ext import ops


def collect(hidden, weight, sizes):
    """Pass `hidden` in batches of `sizes`; return the running buffers and all activations as NumPy float64."""
    buffers = op_cases.running_buffers(weight.shape[0], hidden.device)
    activations = [
        ops.value_projection_stats(part, weight, None, None, None, **buffers, return_values=False)[1]
        for part in hidden.split(sizes)
    ]
    return {name: buffer.cpu() for name, buffer in buffers.items()}, torch.cat(activations).cpu().double().numpy()


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 0, 1, 32], [32, 8]], ids=str)
def test_mean_and_variance_are_those_of_numpy_for_every_batching(sizes, device):
    buffers, activations = collect(torch.randn(40, 12, 17, device=device), torch.randn(9, 17, device=device), sizes)
    assert buffers["count"] == 40
    np.testing.assert_allclose(buffers["mean"].numpy(), activations.mean(0), rtol=1e-5)
    np.testing.assert_allclose(buffers["m2"].numpy() / 39, activations.var(0, ddof=1), rtol=1e-5)


def test_a_small_variance_around_a_large_mean_is_exact(device):
    """The mean is 8,000 times the standard deviation, so a variance from a float32 sum of squares has no correct digit.

    Such sums are multiples of 128. The variance from them is a multiple of 128 / 511 = 0.25, and the exact one is 0.06.
    """
    hidden = 2000 + 0.25 * torch.randn(512, 1, 1, device=device)
    buffers, activations = collect(hidden, torch.ones(1, 1, device=device), [8] * 64)
    variance = activations.var(0, ddof=1)
    np.testing.assert_allclose(buffers["m2"].numpy() / 511, variance, rtol=1e-3)

    single = activations.astype(np.float32)
    by_squares = ((single**2).sum(0) - single.sum(0) ** 2 / np.float32(512)) / np.float32(511)
    assert abs(by_squares - variance) > 0.5 * variance


def test_m2_of_one_prompt_is_zero(device):
    buffers, activations = collect(torch.randn(1, 12, 17, device=device), torch.randn(9, 17, device=device), [1])
    np.testing.assert_array_equal(buffers["mean"].numpy(), activations[0])
    assert not buffers["m2"].any()


def test_an_empty_batch_changes_nothing(device):
    hidden, weight = torch.randn(5, 12, 17, device=device), torch.randn(9, 17, device=device)
    buffers = op_cases.running_buffers(9, device)
    ops.value_projection_stats(hidden, weight, None, None, None, **buffers)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    _, activation = ops.value_projection_stats(hidden[:0], weight, None, None, None, **buffers)
    assert activation.shape == (0, 9)
    assert all(torch.equal(buffers[name], before[name]) for name in before)


def test_buffers_may_be_slices_of_a_larger_one(device):
    """Several layers can share one buffer in this way."""
    hidden, weight = torch.randn(4, 3, 5, device=device), torch.randn(6, 5, device=device)
    count, mean, m2 = op_cases.running_buffers(12, device).values()
    ops.value_projection_stats(hidden, weight, None, None, None, count, mean[3:9], m2[3:9])
    assert mean[3:9].all()
    assert m2[3:9].all()
    assert not mean[:3].any()
    assert not mean[9:].any()
