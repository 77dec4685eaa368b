"""The state of a model: whether it is compiled, whether it is in training mode, and which weights it has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import denoiser_of, family_of
from nemo_ext.torch_state import plain_torch


def is_compiled(denoiser: nn.Module) -> bool:
    """Whether torch.compile has wrapped a denoiser or any module in it."""
    return hasattr(denoiser, "_orig_mod") or any(
        module._compiled_call_impl is not None for module in denoiser.modules()
    )


@contextmanager
def evaluating(pipe: Any) -> Iterator[None]:
    """Run a block in evaluation mode and under `plain_torch`. Afterwards every module has the mode that it had before.

    Args:
        pipe: a pipeline; its denoiser and its text encoders are switched.
    """
    parts = (denoiser_of(pipe), *family_of(pipe).text_encoders(pipe).values())
    modules = [module for part in parts for module in part.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with plain_torch():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def model_fingerprint(pipe: Any, layers: str | Sequence[str] | None = None) -> str:
    """SHA-256 of all weights that an activation depends on: those of value layers and of the text encoders.

    The dtype changes the fingerprint; the device and patching do not.

    Args:
        pipe: a pipeline.
        layers: as for `value_layers`.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    parts: list[tuple[str, nn.Module]] = [*value_layers(pipe, layers).items()]
    parts += family_of(pipe).text_encoders(pipe).items()
    for part, module in parts:
        for name, tensor in module.state_dict().items():
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def name_of_model(pipe: Any) -> str:
    """The folder or name that the pipeline was loaded from, for messages; an empty text if it was not loaded."""
    return str(getattr(pipe.config, "_name_or_path", None) or "")
