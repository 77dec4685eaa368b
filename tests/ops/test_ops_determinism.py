"""The operators return the same bits for every batch, number of threads and memory layout."""

import op_cases
import pytest
import torch

from nemo_ext import _module, ops

pytestmark = pytest.mark.usefixtures("_path_of_the_kernel")
every_dtype = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)


@pytest.fixture
def threads():
    """Return `torch.set_num_threads`. The number of threads is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(*shapes, device, dtype):
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def everything(hidden, weight, scale=None):
    """Return the results of all operators. The values serve as the gradient."""
    buffers = op_cases.running_buffers(weight.shape[0], hidden.device)
    values, activation = ops.value_projection_stats(hidden, weight, None, scale, None, **buffers)
    by_prompt = torch.ops.nemo_ext.value_projection_scale_gradient(values, hidden, weight, None)
    return [values, activation, by_prompt, *buffers.values()]


@every_dtype
def test_a_repeated_call_returns_the_same_bits(dtype, device):
    inputs = make((130, 77, 96), (700, 96), device=device, dtype=dtype)
    first = everything(*inputs)
    for _ in range(5):
        assert all(torch.equal(one, two) for one, two in zip(first, everything(*inputs), strict=True))


@pytest.mark.leg("cpu")
@every_dtype
@pytest.mark.parametrize(("prompts", "tokens"), [(3, 77), (97, 5)], ids=["few prompts", "some for each thread"])
def test_the_number_of_threads_changes_no_bit(prompts, tokens, dtype, threads):
    inputs = torch.randn(prompts, tokens, 300, dtype=dtype), torch.randn(330, 300, dtype=dtype), torch.randn(330)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(everything(*inputs))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@every_dtype
def test_a_prompts_results_do_not_depend_on_the_batch(dtype, device):
    hidden, weight = make((8, 77, 300), (70, 300), device=device, dtype=dtype)
    scale = torch.randn(8, 70, device=device)
    values, activation, by_prompt, *_ = everything(hidden, weight, scale)
    for prompt in range(8):
        alone = everything(hidden[prompt : prompt + 1], weight, scale[prompt : prompt + 1])
        assert torch.equal(alone[0][0], values[prompt])
        assert torch.equal(alone[1][0], activation[prompt])
        assert torch.equal(alone[2][0], by_prompt[prompt])


@every_dtype
def test_a_neurons_results_do_not_depend_on_its_neighbours(dtype, device):
    if device.type == "cpu" and _module.cpu_choice()[0] == "default":
        pytest.skip("PyTorch may add in another order for another number of neurons")
    hidden, weight = make((2, 77, 300), (70, 300), device=device, dtype=dtype)
    together = ops.value_projection(hidden, weight)
    apart = torch.cat([ops.value_projection(hidden, rows) for rows in weight.split([1, 40, 29])], dim=-1)
    assert torch.equal(together, apart)


@every_dtype
def test_strides_change_no_bit(dtype, device):
    hidden, weight = make((2, 77, 300), (70, 300), device=device, dtype=dtype)
    plain = ops.value_projection(hidden, weight)
    for layout in ("transposed", "offset"):
        laid_out = op_cases.as_laid_out(hidden, layout), op_cases.as_laid_out(weight, layout)
        assert torch.equal(ops.value_projection(*laid_out), plain)


def test_a_small_call_does_not_depend_on_a_larger_one_before_it(device):
    small = make((1, 3, 5), (2, 5), device=device, dtype=torch.float32)
    before = everything(*small)
    ops.value_projection(*(torch.full(shape, torch.nan, device=device) for shape in ((2, 77, 300), (330, 300))))
    assert all(torch.equal(one, two) for one, two in zip(before, everything(*small), strict=True))
