"""Replacing the forward methods of modules for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

#: A module's forward method, or a function that replaces it.
Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(
    modules: Mapping[str, nn.Module], replacement: Callable[[str, Forward], Forward]
) -> Iterator[None]:
    """Replace the forward method of each module, and restore the original ones after the block.

    Unlike a hook, a replacement can skip the original forward. The originals are restored after an exception too.

    Args:
        modules: name -> module; the caller chooses the names.
        replacement: a function that receives a module's name and its forward, and returns the replacement.
    """
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            vars(module)["forward"] = replacement(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            own = before[name]
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own
