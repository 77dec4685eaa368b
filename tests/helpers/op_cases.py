"""The table of test cases for every implementation of the operators, and the functions that make their inputs.

The tests of the operators on the CPU and on CUDA read `CASES`, and so do the tests of emulated kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (batch, tokens, in_features, out_features)
SIZES = (
    (1, 1, 1, 1),
    (3, 1, 768, 320),  # one token
    (2, 77, 768, 320),  # CLIP
    (2, 80, 320, 33),  # more tokens than a token block, one neuron more than a panel
    (3, 77, 17, 7),  # no size is a multiple of a tile's
    (4, 12, 7, 3),
    (17, 3, 16, 24),  # more prompts than a block of the CUDA kernels; sizes are multiples of a tile's
    (2, 5, 3, 17),
    (1, 160, 300, 50),  # several blocks of tokens and of in_features
    (1, 12, 1030, 33),  # several depth blocks of the CPU kernels, also in pairs, and a rest
    (0, 77, 8, 4),
    (2, 0, 8, 4),
    (2, 3, 0, 4),
    (2, 3, 8, 0),
)

# These take several blocks per multiprocessor of a large GPU. Emulation and Python loops are too slow for them.
LARGE_SIZES = (
    (200, 77, 200, 700),
    (210, 90, 72, 702),  # several blocks per prompt, rows of values that are not aligned
    (9, 77, 72, 25_602),  # the blocks of neurons alone outnumber the multiprocessors
)

# (bias, scale, token mask, layout)
OPTIONS = (
    ("none", "none", False, "contiguous"),
    ("same", "per_neuron", True, "contiguous"),
    ("float32", "per_prompt", False, "transposed"),
    ("same", "per_prompt", True, "expanded"),
    ("none", "per_neuron", True, "offset"),
)


@dataclass(frozen=True)
class Case:
    batch: int
    tokens: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    bias: str
    scale: str
    masked: bool
    layout: str

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.tokens}x{self.in_features}x{self.out_features}"
        mask = "mask" if self.masked else "nomask"
        return f"{sizes}-{str(self.dtype)[6:]}-bias_{self.bias}-scale_{self.scale}-{mask}-{self.layout}"


CASES = [Case(*sizes, dtype, *options) for sizes in SIZES for dtype in DTYPES for options in OPTIONS]
LARGE_CASES = [Case(*sizes, dtype, *options) for sizes in LARGE_SIZES for dtype in DTYPES for options in OPTIONS]


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrize a test with cases. Every seventh is among the fast tests, which gives each dtype and each option."""
    marks = [() if place % 7 == 0 else pytest.mark.slow for place in range(len(cases))]
    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=mark) for case, mark in zip(cases, marks, strict=True)], ids=str
    )


def as_laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same values with other strides; `expanded` repeats the values of the first row."""
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "offset":  # rows are aligned to one element only
        wider = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
        wider[..., 1:-2] = tensor
        return wider[..., 1:-2]
    return tensor


def projection_inputs(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return arguments of `value_projection`, the same on all devices; about a quarter of the neurons is off."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    hidden = normal(case.batch, case.tokens, case.in_features)
    weight = normal(case.out_features, case.in_features) / max(case.in_features, 1) ** 0.5
    bias = None if case.bias == "none" else normal(case.out_features)
    if bias is not None and case.bias == "same":
        bias = bias.to(case.dtype)
    scale = None
    if case.scale != "none":
        shape = (case.out_features,) if case.scale == "per_neuron" else (case.batch, case.out_features)
        scale = normal(*shape)
        scale[torch.rand(shape, generator=generator) < 0.25] = 0
    # The strides are made on the device, because a copy between devices is contiguous.
    return {
        "hidden": as_laid_out(hidden.to(device, case.dtype), case.layout),
        "weight": as_laid_out(
            weight.to(device, case.dtype), "contiguous" if case.layout == "expanded" else case.layout
        ),
        "bias": None if bias is None else bias.to(device),
        "scale": None if scale is None else scale.to(device),
    }


def output_gradient(case: Case, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a gradient of the values, [B, T, N], to start a backward pass with."""
    shape = (case.batch, case.tokens, case.out_features)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return as_laid_out(gradient.to(device, case.dtype), case.layout)


def token_mask(case: Case, device: torch.device | str = "cpu") -> torch.Tensor | None:
    """Return a mask of about two thirds of the tokens, the first one always included, or None."""
    if not case.masked:
        return None
    mask = torch.rand(case.batch, case.tokens, generator=torch.Generator().manual_seed(1)) < 0.67
    mask[:, :1] = True
    return mask.to(device)


def running_buffers(out_features: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Return `count`, `mean` and `m2` as they are before the first prompt."""
    return {
        "count": torch.zeros((), dtype=torch.float64, device=device),
        "mean": torch.zeros(out_features, dtype=torch.float64, device=device),
        "m2": torch.zeros(out_features, dtype=torch.float64, device=device),
    }
