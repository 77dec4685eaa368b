"""A check of the CUDA operators at their first use on a device, because the tests of this project ran on one GPU only.

Whatever is wrong with a driver, a GPU or a kernel shows here as one error, and not as neurons that are not there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor

from nemo_ext import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Two prompts of two token tiles, and more neurons than a tile has; rows are whole chunks of 16 bytes.
_PROMPTS, _TOKENS, _FEATURES, _NEURONS = 2, 85, 64, 72

_checked: set[tuple[int | None, str]] = set()


def check_once(hidden: Tensor) -> None:
    """Compare the operators with `nemo_ext.reference` on a small case, before their first use on a CUDA device.

    Nothing happens on other devices, while a CUDA graph is captured, while torch.compile traces, and for tensors that
    are not plain ones. The comparison waits for the GPU.

    Args:
        hidden: the operator's argument, of which only the device matters.

    Raises:
        RuntimeError: the operators compute something else. The message names device, driver, path and both numbers, and
            says how to take the other path.
    """
    if not hidden.is_cuda or torch.compiler.is_compiling() or type(hidden) not in (Tensor, torch.nn.Parameter):
        return
    check_device(hidden.device)


def check_device(device: torch.device) -> None:
    """Do for a CUDA device what `check_once` does for a tensor there."""
    key = device.index, os.environ.get("NEMO_EXT_CUDA_PATH", "")
    if key in _checked or torch.cuda.is_current_stream_capturing():
        return
    # The comparison has to wait for the GPU, even where that is forbidden for everything else.
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        for dtype in _DTYPES:
            found = mistake(device, dtype, torch.ops.nemo_ext.value_projection_stats)
            if found is not None:
                raise RuntimeError(_message(device, dtype, found))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    _checked.add(key)


def mistake(device: torch.device, dtype: torch.dtype, operator: Callable[..., tuple[Tensor, Tensor]]) -> str | None:
    """Return what `operator`, which is called like `value_projection_stats`, computes wrongly on a small case, or None.

    Args:
        device: where the operator computes.
        dtype: of its operands.
        operator: the operator.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight, scale = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((_PROMPTS, _TOKENS, _FEATURES), (_NEURONS, _FEATURES), (_PROMPTS, _NEURONS))
    )
    mask = torch.rand(_PROMPTS, _TOKENS, generator=generator) > 0.3

    def running(where: torch.device) -> list[Tensor]:
        return [torch.zeros(size, dtype=torch.float64, device=where) for size in ((), _NEURONS, _NEURONS)]

    ours, exact = running(device), running(torch.device("cpu"))
    there = [tensor.to(device) for tensor in (hidden, weight, scale, mask)]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        values, activation = operator(there[0], there[1], None, there[2], there[3], *ours, True)
    expected = reference.value_projection_stats(hidden, weight, None, scale, mask, exact[0], exact[1], exact[2])
    rounding = torch.finfo(dtype).eps
    for name, got, wanted, tolerance in (
        ("value", values, expected[0], max(2 * rounding, 1e-5)),
        ("activation", activation, expected[1], 1e-5),
        ("mean", ours[1], exact[1], 1e-5),
        ("m2", ours[2], exact[2], 1e-4),
    ):
        assert wanted is not None
        off = (got.cpu().double() - wanted.double()).abs()
        wrong = ~(off <= tolerance * wanted.double().abs().clamp_min(1))  # true for NaN too
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            return f"{name} {list(at)} is {float(got.cpu()[at]):.6g} and must be {float(wanted[at]):.6g}"
    return None


def _message(device: torch.device, dtype: torch.dtype, found: str) -> str:
    module = importlib.import_module("nemo_ext._module")
    major, minor = torch.cuda.get_device_capability(device)
    driver = "{}.{}".format(*importlib.import_module("nemo_ext.info").cuda_of_driver())
    path = module.cuda_path(str(dtype)[6:], 10 * major + minor)
    other = "library" if path == "kernel" else "kernel"
    return (
        f"nemo_ext computes wrongly on {torch.cuda.get_device_name(device)} (sm_{major}{minor}, driver for CUDA "
        f"{driver}, path {path}, {str(dtype)[6:]}): {found}. Set "
        f"NEMO_EXT_CUDA_PATH={other} to compute on the other path, and please report this with the output of "
        "nemo-ext info"
    )
