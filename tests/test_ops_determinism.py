"""Bit for bit the same results, whatever runs beside them."""

import op_cases
import pytest
import torch

from nemo_ext import ops

every_dtype = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(hidden, weight, scale):
    """All that one call computes."""
    buffers = op_cases.running_buffers(weight.shape[0])
    values, activation = ops.value_projection_stats(hidden, weight, None, scale, None, **buffers)
    return [values, activation, *buffers.values()]


@every_dtype
def test_the_number_of_threads_changes_no_bit(dtype, threads):
    inputs = torch.randn(3, 77, 300, dtype=dtype), torch.randn(330, 300, dtype=dtype), torch.randn(330)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(everything(*inputs))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@every_dtype
def test_a_prompts_results_do_not_depend_on_the_batch(dtype):
    hidden, weight, scale = torch.randn(8, 77, 300, dtype=dtype), torch.randn(70, 300, dtype=dtype), torch.randn(8, 70)
    values, activation, *_ = everything(hidden, weight, scale)
    for prompt in range(8):
        alone = everything(hidden[prompt : prompt + 1], weight, scale[prompt : prompt + 1])
        assert torch.equal(alone[0][0], values[prompt])
        assert torch.equal(alone[1][0], activation[prompt])


@every_dtype
def test_a_neurons_results_do_not_depend_on_its_neighbours(dtype):
    hidden, weight = torch.randn(2, 77, 300, dtype=dtype), torch.randn(70, 300, dtype=dtype)
    together = ops.value_projection(hidden, weight)
    apart = torch.cat([ops.value_projection(hidden, rows) for rows in weight.split([1, 40, 29])], dim=-1)
    assert torch.equal(together, apart)


@every_dtype
def test_strides_change_no_bit(dtype):
    hidden, weight = torch.randn(2, 77, 300, dtype=dtype), torch.randn(70, 300, dtype=dtype)
    plain = ops.value_projection(hidden, weight)
    for layout in ("transposed", "offset"):
        laid_out = op_cases.as_laid_out(hidden, layout), op_cases.as_laid_out(weight, layout)
        assert torch.equal(ops.value_projection(*laid_out), plain)


def test_a_smaller_call_after_a_larger_one_sees_nothing_of_it():
    small = torch.randn(1, 3, 5), torch.randn(2, 5)
    before = ops.value_projection(*small)
    ops.value_projection(torch.full((2, 77, 300), torch.nan), torch.full((330, 300), torch.nan))
    assert torch.equal(ops.value_projection(*small), before)
