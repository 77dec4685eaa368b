"""The operators on CUDA: streams, graphs, several devices, memory, asynchronous launches, and errors in the data.

The other tests of the operators, in files test_ops_*.py, run on CUDA too.
"""

import contextlib
import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import op_cases
import pytest
import test_ops_reference
import torch
from torch.utils.cpp_extension import CUDA_HOME

from nemo_ext import ops
from nemo_ext.errors import NemoError
from nemo_ext.measure.activations import ValueStack
from nemo_ext.measure.statistics import ActivationStatistics

pytestmark = pytest.mark.leg("cuda")

TESTS = Path(__file__).resolve().parents[1]
A_WHILE = 200_000_000  # cycles, about 0.1 s: longer than any launch in these tests takes
every_dtype = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)


def make(device, dtype=torch.float32):
    """Return arguments of the statistics operator with nine prompts and N = 700, which needs several blocks."""
    mask = torch.rand(9, 77, device=device) < 0.67
    mask[:, 0] = True
    return {
        "hidden": torch.randn(9, 77, 96, device=device).to(dtype),
        "weight": torch.randn(700, 96, device=device).to(dtype),
        "bias": torch.randn(700, device=device),
        "scale": torch.randn(9, 700, device=device),
        "token_mask": mask,
        **op_cases.running_buffers(700, device),
    }


def project(arguments):
    return ops.value_projection(*(arguments[name] for name in ("hidden", "weight", "bias", "scale")))


def running(arguments):
    return [arguments[name] for name in ("count", "mean", "m2")]


def differentiate(arguments):
    """Return the values, and the gradient of half the sum of their squares with respect to the scale."""
    values = project(arguments)
    inputs = (arguments[name] for name in ("hidden", "weight", "bias"))
    return values, torch.ops.nemo_ext.value_projection_scale_gradient(values, *inputs)


def everything(arguments):
    """Return the results of all operators, and the running buffers."""
    return [*differentiate(arguments), *ops.value_projection_stats(**arguments), *running(arguments)]


def same(ours, expected):
    return all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))


@contextlib.contextmanager
def synchronising_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function):
    """Return a CUDA graph of one call and the tensors of its results, which are filled when the graph is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # the first call may load kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = function()
    return graph, results


@pytest.mark.parametrize(
    "check",
    [
        test_ops_reference.test_values_are_as_exact_as_a_sum_in_float32,
        test_ops_reference.test_statistics_call_gives_the_same_values_bit_for_bit,
        test_ops_reference.test_writing_the_values_or_not_changes_no_bit_of_the_statistics,
        test_ops_reference.test_activation_is_as_exact_as_a_sum_in_float32,
        test_ops_reference.test_running_statistics_follow_the_reference,
        test_ops_reference.test_the_gradient_of_the_scale_is_as_exact_as_a_sum_in_float32,
    ],
)
def test_calls_that_fill_the_gpu_are_as_exact(check, device):
    for case in op_cases.LARGE_CASES:
        check(case, device)


@pytest.mark.usefixtures("_path_of_the_kernel")
@every_dtype
def test_a_prompts_results_are_the_same_alone_and_in_a_call_that_fills_the_gpu(dtype, device):
    hidden, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((200, 77, 200), (700, 200)))
    values, activation = ops.value_projection_stats(
        hidden, weight, None, None, None, **op_cases.running_buffers(700, device)
    )
    for prompt in (0, 1, 100, 199):
        alone = ops.value_projection_stats(
            hidden[prompt : prompt + 1], weight, None, None, None, **op_cases.running_buffers(700, device)
        )
        assert same(alone, [values[prompt : prompt + 1], activation[prompt : prompt + 1]])


@every_dtype
def test_a_captured_projection_and_gradient_are_replayed_on_new_inputs(dtype, device):
    arguments = make(device, dtype)
    graph, results = captured(lambda: differentiate(arguments))
    for _ in range(2):
        arguments["hidden"].normal_()
        arguments["scale"].normal_()
        graph.replay()
        assert same(results, differentiate(arguments))


@every_dtype
def test_a_captured_statistics_call_updates_the_running_buffers_at_every_replay(dtype, device):
    arguments = make(device, dtype)
    uncaptured = copy.deepcopy(arguments)
    graph, results = captured(lambda: ops.value_projection_stats(**arguments))
    for buffer in running(arguments):
        buffer.zero_()
    for _ in range(3):
        arguments["hidden"].normal_()
        uncaptured["hidden"].copy_(arguments["hidden"])
        graph.replay()
        expected = ops.value_projection_stats(**uncaptured)
        assert same([*results, *running(arguments)], [*expected, *running(uncaptured)])
    assert arguments["count"] == 27


def test_calls_run_on_the_current_stream(device):
    """Earlier work of that stream writes the inputs late, so a call on another stream would read the old ones."""
    arguments, later = make(device), torch.randn(9, 77, 96, device=device)
    expected = everything({**copy.deepcopy(arguments), "hidden": later})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(copy.deepcopy(arguments))  # the first call on a stream waits for an allocation
        torch.cuda._sleep(A_WHILE)
        arguments["hidden"].copy_(later)
        results = everything(arguments)
    stream.synchronize()
    assert same(results, expected)


def test_calls_return_before_the_gpu_is_done(device):
    arguments = make(device)
    everything(arguments)  # the first call may load kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(A_WHILE)
    with synchronising_is_an_error():
        everything(arguments)
    assert not torch.cuda.current_stream().query()


def test_a_backward_pass_does_not_wait_for_the_gpu(device):
    arguments = make(device)
    inputs = [arguments[name].requires_grad_() for name in ("hidden", "weight", "bias", "scale")]
    torch.autograd.grad(project(arguments).sum(), inputs)
    with synchronising_is_an_error():
        torch.autograd.grad(project(arguments).sum(), inputs)


def test_calls_run_on_the_device_of_their_tensors(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("this test needs two GPUs")
    second = torch.device("cuda", 1)
    arguments = make(device)
    there = {name: tensor.to(second) for name, tensor in arguments.items()}
    with torch.cuda.device(device):
        results = everything(there)
        assert torch.cuda.current_device() == device.index
    # The bits may differ, because the GPUs may be of different models.
    for one, two in zip(results, everything(arguments), strict=True):
        assert one.device == second
        torch.testing.assert_close(one.to(device), two, rtol=1e-4, atol=1e-4)


def test_more_neurons_than_the_kernels_can_count_are_refused(device):
    hidden, weight = torch.empty(1, 1, 0, device=device), torch.empty(2**30 + 1, 0, device=device)
    with pytest.raises(RuntimeError, match=r"weight must have at most 2\*\*30 out_features on CUDA, got 1073741825"):
        ops.value_projection(hidden, weight)


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "token_mask", "count", "mean", "m2"])
def test_a_tensor_on_the_cpu_is_named(name, device):
    arguments = make(device)
    with pytest.raises(RuntimeError, match=f"{name} must be on cuda:0 like hidden, got cpu"):
        ops.value_projection_stats(**{**arguments, name: arguments[name].cpu()})
    assert not any(buffer.any() for buffer in running(arguments))


@pytest.mark.parametrize("operator", [project, lambda arguments: ops.value_projection_stats(**arguments)])
def test_hidden_left_on_the_cpu_is_an_error_too(operator, device):
    arguments = make(device)
    arguments["hidden"] = arguments["hidden"].cpu()
    with pytest.raises(RuntimeError, match="weight must be on cpu like hidden, got cuda:0"):
        operator(arguments)


@pytest.mark.parametrize(
    ("name", "place", "value", "prompts", "neurons"),
    [
        ("hidden", (8, 0, 5), -torch.inf, [8], slice(None)),
        ("token_mask", 3, False, [3], slice(None)),
        ("bias", 650, torch.nan, slice(None), [650]),
        ("weight", 650, 1e38, slice(None), [650]),
    ],
    ids=["infinite_input", "no_token", "nan_in_one_neuron", "overflow"],
)
def test_a_non_finite_activation_leaves_the_running_buffers_unchanged(name, place, value, prompts, neurons, device):
    arguments = make(device)
    ops.value_projection_stats(**arguments)
    before = [buffer.clone() for buffer in running(arguments)]
    arguments[name][place] = value
    with synchronising_is_an_error():
        _, activation = ops.value_projection_stats(**arguments)
    finite = torch.ones(9, 700, dtype=torch.bool, device=device)
    finite[prompts, neurons] = False
    assert torch.equal(activation.isfinite(), finite)
    assert same(running(arguments), before)


def test_a_call_after_a_non_finite_one_updates_the_running_buffers(device):
    arguments = make(device)
    expected = everything(copy.deepcopy(arguments))
    ops.value_projection_stats(**{**arguments, "bias": torch.full((700,), torch.nan, device=device)})
    assert same(everything(arguments), expected)


def test_statistics_that_lack_prompts_are_an_error_when_read(device):
    stack = ValueStack({"a": torch.nn.Linear(5, 3, device=device)})
    statistics = ActivationStatistics(stack.widths)
    hidden = torch.randn(6, 4, 5, device=device)
    statistics.update(hidden, stack)
    assert statistics.count == 6
    hidden[2, 1] = torch.nan
    with synchronising_is_an_error():
        statistics.update(hidden, stack)
    with pytest.raises(NemoError, match="the statistics lack 6 of 12 prompts"):
        _ = statistics.mean


@pytest.mark.usefixtures("_path_of_the_kernel")
def test_activations_need_no_memory_for_the_values(device):
    """All memory that a call allocates, apart from its results, is free after the call."""
    hidden, weight = torch.randn(64, 77, 320, device=device), torch.randn(1280, 320, device=device)
    buffers = op_cases.running_buffers(1280, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, activation = ops.value_projection_stats(hidden, weight, None, None, None, **buffers, return_values=False)
    size_of_values = 64 * 77 * 1280 * 4
    assert torch.cuda.max_memory_allocated() - before < size_of_values / 4
    del activation
    assert torch.cuda.memory_allocated() == before


@pytest.mark.slow
@pytest.mark.usefixtures("_path_of_the_kernel")
@pytest.mark.parametrize(
    ("batch", "in_features", "out_features"),
    [(40_000, 768, 16), (40_000, 16, 768), (2, 768, 2_900_000)],
    ids=["hidden", "values", "weight"],
)
def test_tensors_of_more_than_two_to_the_31_elements(batch, in_features, out_features, device):
    shapes = (batch, 77, in_features), (out_features, in_features), (batch, 77, out_features)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    assert max(sizes) > 2**31
    needed = 2.5 * (sum(sizes) + sizes[2])  # bytes: two per element, the values twice, and a reserve
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    hidden, weight = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes[:2])
    buffers = op_cases.running_buffers(out_features, device)
    values, activation = ops.value_projection_stats(hidden, weight, None, None, None, **buffers)
    assert buffers["count"] == batch
    # Calls with one prompt and few neurons, where every index is small, return the same bits.
    for prompt in (0, batch - 1):
        for neurons in (slice(0, 8), slice(out_features - 8, None)):
            alone, activation_alone = ops.value_projection_stats(
                hidden[prompt : prompt + 1], weight[neurons], None, None, None, **op_cases.running_buffers(8, device)
            )
            assert torch.equal(values[prompt, :, neurons], alone[0])
            assert torch.equal(activation[prompt, neurons], activation_alone[0])
            mean = activation[:, neurons].double().mean(0)
            torch.testing.assert_close(buffers["mean"][neurons], mean, rtol=1e-5, atol=0)
    # Without statistics the operator launches another grid.
    assert torch.equal(ops.value_projection(hidden, weight), values)


def _compute_sanitizer():
    beside_the_toolkit = None if CUDA_HOME is None else shutil.which("compute-sanitizer", path=f"{CUDA_HOME}/bin")
    return shutil.which("compute-sanitizer") or beside_the_toolkit


@pytest.mark.slow
@pytest.mark.parametrize(
    "tool", [["memcheck", "--report-api-errors", "no"], ["racecheck"], ["initcheck"]], ids=lambda tool: tool[0]
)
def test_compute_sanitizer_finds_nothing(tool, device, request):
    if "cuda" not in request.config.getoption("--require-device"):
        pytest.skip("this test takes minutes and runs only with --require-device cuda")
    sanitizer = _compute_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor in CUDA_HOME")
    sizes = "3x77x17x7 or 2x80x320x33 or 1x160x300x50 or 17x3x16x24"
    names = "the_same_values_bit_for_bit or running_statistics_follow"
    # The filter selects our kernels by the namespace in their mangled names, and leaves out PyTorch's.
    check = [sanitizer, "--tool", *tool, "--error-exitcode", "9", "--kernel-name", "kns=nemo_ext"]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--require-device", "cuda"]
    chosen = [str(TESTS / "ops" / "test_ops_reference.py"), "-k", f"cuda and ({sizes}) and ({names})"]
    result = subprocess.run(
        [*check, sys.executable, *tests, *chosen],
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds the sanitizer checks.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "RACECHECK SUMMARY: 0 hazards" in result.stdout
