"""Other forwards for modules, for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

#: A module's forward, or what stands in its place.
Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(
    modules: Mapping[str, nn.Module], replacement: Callable[[str, Forward], Forward]
) -> Iterator[None]:
    """Put another forward in the place of each module's own, and put the own ones back after the block.

    Unlike a hook this can leave the module's own forward out. An exception in the block changes nothing about that.

    Args:
        modules: the modules, under names of the caller's choice.
        replacement: called with each module's name and its forward; returns the forward that takes its place.
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
