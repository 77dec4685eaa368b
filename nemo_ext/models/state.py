"""The state of a model: whether it is compiled, whether it is in training mode, and which weights it has."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nemo_ext.errors import NemoError
from nemo_ext.models.family import unwrapped
from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import denoiser_of, family_of
from nemo_ext.torch_state import plain_torch


def is_compiled(denoiser: nn.Module) -> bool:
    """Whether torch.compile has wrapped a denoiser or any module in it."""
    return hasattr(denoiser, "_orig_mod") or any(
        module._compiled_call_impl is not None for module in denoiser.modules()
    )


class _Claim:
    """Who uses a module, and how many blocks of this user are open."""

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.depth = 0


_claims: weakref.WeakKeyDictionary[nn.Module, _Claim] = weakref.WeakKeyDictionary()
_claims_lock = threading.Lock()


def _owner() -> object:
    """The running thread, and its asyncio task if it runs one: two of them can be in the middle of the same block."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop
        task = None
    return threading.get_ident(), id(task)


def check_unclaimed(module: nn.Module) -> None:
    """Check that no other thread or asyncio task uses a module.

    Raises:
        NemoError: another one does.
    """
    claim = _claims.get(module)
    if claim is not None and claim.owner != _owner():
        raise NemoError(
            f"another thread uses this {type(module).__name__}, and would see other neurons than its own: wait until "
            "it has finished, or give each thread a pipeline of its own"
        )


@contextmanager
def claimed(*modules: nn.Module) -> Iterator[None]:
    """Keep modules for the running thread or asyncio task during a block. The same one may open more blocks inside.

    Raises:
        NemoError: another thread or task uses one of them.
    """
    with _claims_lock:
        for module in modules:
            check_unclaimed(module)
        claims = [_claims.setdefault(module, _Claim(_owner())) for module in modules]
        for claim in claims:
            claim.depth += 1
    try:
        yield
    finally:
        with _claims_lock:
            for module, claim in zip(modules, claims, strict=True):
                claim.depth -= 1
                if claim.depth == 0:
                    _claims.pop(module, None)


@contextmanager
def evaluating(pipe: Any) -> Iterator[None]:
    """Run a block in evaluation mode and under `plain_torch`. Afterwards every module has the mode that it had before.

    Args:
        pipe: a pipeline; its denoiser and its text encoders are switched.

    Raises:
        NemoError: another thread or asyncio task uses them.
    """
    parts = (denoiser_of(pipe), *map(unwrapped, family_of(pipe).text_encoders(pipe).values()))
    with claimed(*parts):
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


def model_fingerprint(pipe: Any) -> str:
    """SHA-256 of a whole model: all weights of its components, the noise levels, and the size of its latents.

    The dtype changes the fingerprint; the device, patching, compilation and the kind of the scheduler do not. It reads
    all weights, which takes seconds for a model of Stable Diffusion's size.

    Args:
        pipe: a pipeline.

    Returns:
        64 hexadecimal digits.
    """
    family = family_of(pipe)
    digest = hashlib.sha256()
    for name in family.components:
        _add_weights(digest, name, getattr(pipe, name))
    scheduler = family.sampling_scheduler(pipe)
    settings = {name: scheduler.config.get(name) for name in inspect.signature(type(scheduler).__init__).parameters}
    digest.update(f"{sorted(settings.items())} {family.latent_shape(pipe)}".encode())
    return digest.hexdigest()


def activation_fingerprint(pipe: Any, layers: str | Sequence[str] | None = None) -> str:
    """SHA-256 of all weights that an activation depends on: those of value layers and of the text encoders.

    So statistics stay valid for a model that differs in other weights, such as a fine-tune of the remaining U-Net.

    Args:
        pipe: a pipeline.
        layers: as for `value_layers`.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    parts: list[tuple[str, nn.Module]] = [*value_layers(pipe, layers).items()]
    parts += family_of(pipe).text_encoders(pipe).items()
    for name, module in parts:
        _add_weights(digest, name, module)
    return digest.hexdigest()


def _add_weights(digest: hashlib._Hash, part: str, module: nn.Module) -> None:
    for name, weight in unwrapped(module).named_parameters():
        # A module that was compiled by itself is a wrapper, which is part of the name.
        plain = f"{part}.{name}".replace("_orig_mod.", "")
        digest.update(f"{plain} {weight.dtype} {tuple(weight.shape)}\n".encode())
        values: Any = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(values)


def name_of_model(pipe: Any) -> str:
    """The folder or name that the pipeline was loaded from, for messages; an empty text if it was not loaded."""
    return str(getattr(pipe.config, "_name_or_path", None) or "")
