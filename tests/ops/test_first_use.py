"""The check of the CUDA operators at their first use. Faults are planted in the CPU operators, which it calls too."""

import re

import op_cases
import pytest
import torch

from nemo_ext import _module, first_use, info

CPU = torch.device("cpu")
every_dtype = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)


@every_dtype
def test_sound_operators_pass(dtype):
    assert first_use.mistake(CPU, dtype, torch.ops.nemo_ext.value_projection_stats) is None


def spoilt(change):
    """Return the operator with a fault: `change(values, activation, mean, m2)` spoils its results."""

    def operator(*arguments):
        values, activation = torch.ops.nemo_ext.value_projection_stats(*arguments)
        change(values, activation, *arguments[6:8])
        return values, activation

    return operator


def one_wrong_value(values, _activation, _mean, _m2):
    values[1, 84, 71] += 1


def a_nan(_values, activation, _mean, _m2):
    activation[0, 3] = torch.nan


def a_mean_of_one_prompt_less(_values, _activation, mean, _m2):
    mean /= 2


def no_m2(_values, _activation, _mean, m2):
    m2.zero_()


@every_dtype
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (one_wrong_value, r"value \[1, 84, 71\] is .* and must be"),
        (a_nan, r"activation \[0, 3\] is nan and must be"),
        (a_mean_of_one_prompt_less, r"mean \[0\] is .* and must be"),
        (no_m2, r"m2 \[\d+\] is 0 and must be"),
    ],
)
def test_a_planted_fault_is_found_and_both_numbers_are_named(dtype, fault, message):
    found = first_use.mistake(CPU, dtype, spoilt(fault))
    assert found is not None
    assert re.match(message, found)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device that is described, but on which nothing can run."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(info, "cuda_of_driver", lambda: (12, 4))
    modes = ["error"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(first_use, "_checked", set())
    monkeypatch.delenv("NEMO_EXT_CUDA_PATH", raising=False)
    return torch.device("cuda", 0)


def test_the_error_names_device_driver_path_and_what_to_do(gpu, monkeypatch):
    mistakes = {torch.float32: None, torch.bfloat16: "value [0] is 1"}
    monkeypatch.setattr(first_use, "mistake", lambda _device, dtype, _operator: mistakes[dtype])
    expected = (
        r"wrongly on NVIDIA H100 \(sm_90, driver for CUDA 12.4, path library, bfloat16\): value \[0\] is 1. "
        r"Set NEMO_EXT_CUDA_PATH=kernel to compute on the other path"
    )
    for _ in range(2):  # a device that has failed is checked again
        with pytest.raises(RuntimeError, match=expected):
            first_use.check_device(gpu)


def test_a_device_is_checked_once_for_each_choice_of_the_path(gpu, monkeypatch):
    checked = []
    monkeypatch.setattr(first_use, "mistake", lambda _device, dtype, _: checked.append(dtype))
    for _ in range(3):
        first_use.check_device(gpu)
    assert checked == [torch.float32, torch.bfloat16, torch.float16]
    monkeypatch.setenv("NEMO_EXT_CUDA_PATH", "kernel")
    first_use.check_device(gpu)
    assert len(checked) == 6


def test_the_check_may_wait_for_the_gpu_where_that_is_an_error(gpu, monkeypatch):
    modes = []
    monkeypatch.setattr(first_use, "mistake", lambda *_: modes.append(torch.cuda.get_sync_debug_mode()))
    first_use.check_device(gpu)
    assert modes == ["default"] * 3
    assert torch.cuda.get_sync_debug_mode() == "error"


def test_nothing_is_checked_while_a_cuda_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(first_use, "mistake", lambda *_: pytest.fail("checked"))
    first_use.check_device(gpu)


def test_nothing_is_checked_on_the_cpu(monkeypatch):
    monkeypatch.setattr(first_use, "check_device", lambda _: pytest.fail("checked"))
    first_use.check_once(torch.randn(1, 2, 3))


@pytest.mark.parametrize(
    ("element", "architecture", "wanted", "path"),
    [
        ("float32", 90, None, "kernel"),
        ("bfloat16", 80, None, "kernel"),
        ("float16", 89, None, "kernel"),
        ("bfloat16", 90, None, "library"),
        ("float16", 120, None, "library"),
        ("float16", 90, "kernel", "kernel"),
        ("float32", 80, "library", "library"),
    ],
)
def test_the_path_follows_from_dtype_and_architecture_unless_it_is_set(
    element, architecture, wanted, path, monkeypatch
):
    monkeypatch.delenv("NEMO_EXT_CUDA_PATH", raising=False)
    if wanted is not None:
        monkeypatch.setenv("NEMO_EXT_CUDA_PATH", wanted)
    assert _module.cuda_path(element, architecture) == path


def test_an_unknown_element_is_refused():
    with pytest.raises(RuntimeError, match="element must be float32, bfloat16 or float16, got int8"):
        _module.cuda_path("int8", 90)


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("NEMO_EXT_CUDA_PATH", "cublas")
    with pytest.raises(RuntimeError, match="NEMO_EXT_CUDA_PATH must be kernel or library, got cublas"):
        _module.cuda_path("float16", 90)
