"""Running a U-Net from a value layer on, with what comes before it from an earlier run (docs/method.md, section 9).

While a search changes neurons of one layer, everything before that layer computes the same again and again. Here its
modules give back what they gave before instead, and the rest runs: exact, because nothing of the U-Net is restated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nemo_ext.memory import evaluate_zeros

#: What a module returned: a tensor, or tensors in tuples. Rows of the batch come first in each.
Output = Any
#: In the place of a value layer's number: before all of them, where nothing is taken from an earlier run.
WHOLE = -1
#: One row of a batch after a run: module name -> its part of that module's output.
Row = Mapping[str, Output]


def is_compiled(unet: nn.Module) -> bool:
    """Whether torch.compile has wrapped a U-Net or any module in it."""
    return hasattr(unet, "_orig_mod") or any(module._compiled_call_impl is not None for module in unet.modules())


class Stages:
    """The places where one U-Net can be entered: just before each of its searched value layers.

    A call of the U-Net within `replaying` runs its own forward, in which the outermost modules that were through before
    the place give what they gave in an earlier run. So it has the bits of a whole call, and any U-Net will do that
    calls each value layer once, in an order of its own; attention processors stay what they are.

    Attributes:
        unet: the U-Net.
        layers: the value layers in the order in which the U-Net calls them.
        shares: for each of them the share of a whole call's FLOPs that a call from there on takes. Matrix products,
            convolutions and attention count.
        row_bytes: the memory that a `Row` holds at most.
    """

    def __init__(self, unet: nn.Module, calls: Sequence[_Call], layers: Sequence[str], flops: int) -> None:
        self.unet = unet
        entered = {call.name: call.entered for call in calls}
        self.layers = tuple(sorted(layers, key=lambda layer: entered[layer]))
        modules = dict(unet.named_modules())
        self._replayed = [_outermost(call for call in calls if call.left < entered[layer]) for layer in self.layers]
        self._recorded = {call.name: modules[call.name] for replayed in self._replayed for call in replayed}
        self.shares = tuple(1 - sum(call.flops for call in replayed) / flops for replayed in self._replayed)
        self.row_bytes = sum(call.row_bytes for call in calls if call.name in self._recorded)

    @classmethod
    def of(cls, unet: nn.Module, layers: Sequence[str], hidden: Tensor) -> Stages | None:
        """Watch one call of a U-Net, on two rows of zeros, and tell where it can be entered.

        Args:
            unet: a U-Net in evaluation mode.
            layers: names of its value layers.
            hidden: any text embedding, [1, T, K].

        Returns:
            None where it can't be: torch.compile would compile every change of a module anew, a value layer that is not
            called exactly once has no "before", and what is changed in place later is not what a module returned.
        """
        if is_compiled(unet):
            return None
        around = {""}
        for layer in layers:
            parts = layer.split(".")
            around |= {".".join(parts[:end]) for end in range(1, len(parts))}
        watched = {}
        for name, module in unet.named_modules():
            if name and name.rpartition(".")[0] in around:
                watched[name] = module
                if isinstance(module, nn.ModuleList):  # is never called itself
                    around.add(name)
        calls: list[_Call] = []
        counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        clock = 0

        def watch(name: str, forward: Any) -> Any:
            def watched_forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal clock
                clock += 1
                entered, flops = clock, counter.get_total_flops()
                output = forward(*args, **kwargs)
                clock += 1
                calls.append(_Call(name, entered, clock, counter.get_total_flops() - flops, output, _versions(output)))
                return output

            return watched_forward

        with _forwards(watched, watch), counter:
            evaluate_zeros(unet, hidden, rows=2)
        once = [call for call in calls if sum(other.name == call.name for other in calls) == 1]
        changed = any(_versions(call.output) != call.versions for call in calls)
        if changed or not set(layers) <= {call.name for call in once}:
            return None
        usable = [call for call in once if call.name in layers or call.can_be_replayed()]
        return cls(unet, usable, layers, counter.get_total_flops())

    @contextmanager
    def replaying(self, start: int, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """For one call of the U-Net: run it from a value layer on, and note what it gives.

        Args:
            start: which of `layers`; `WHOLE`: run all of it.
            rows: for each row of the batch what an earlier run noted, with the same latent, timestep and text, and
                with the same neurons off in the layers before; for a whole run an empty mapping for each.

        Yields:
            A list that has, after the block, such a row for each row of this batch.
        """
        given: dict[str, Output] = {}
        if start != WHOLE:
            given = {call.name: _concatenated([row[call.name] for row in rows]) for call in self._replayed[start]}
        computed: dict[str, Output] = {}

        def replay(name: str, forward: Any) -> Any:
            def replaying_forward(*args: Any, **kwargs: Any) -> Any:
                if name in given:
                    return given[name]
                computed[name] = forward(*args, **kwargs)
                return computed[name]

            return replaying_forward

        noted: list[Row] = []
        with _forwards(self._recorded, replay):
            yield noted
        noted += [
            {**row, **{name: _row(output, index) for name, output in computed.items()}}
            for index, row in enumerate(rows)
        ]


@dataclass(frozen=True)
class _Call:
    """One call of a module: when it was entered and left, its FLOPs, what it returned."""

    name: str
    entered: int
    left: int
    flops: int
    output: Output
    versions: tuple[int, ...]

    def can_be_replayed(self) -> bool:
        """Whether it saves anything, and has the two rows of the batch in all that it returned."""
        tensors = _tensors(self.output)
        return (
            self.flops > 0
            and tensors is not None
            and all(tensor.dim() > 0 and tensor.shape[0] == 2 for tensor in tensors)
        )

    @property
    def row_bytes(self) -> int:
        return sum(tensor[0].nbytes for tensor in _tensors(self.output) or ())


def _outermost(calls: Iterator[_Call]) -> list[_Call]:
    """Of modules within one another the one around the others."""
    found: list[_Call] = []
    for call in sorted(calls, key=lambda call: len(call.name)):
        if not any(call.name.startswith(f"{other.name}.") for other in found):
            found.append(call)
    return found


@contextmanager
def _forwards(modules: Mapping[str, nn.Module], around: Any) -> Iterator[None]:
    """Put `around(name, forward)` in the place of each module's forward for the length of a block."""
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = around(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            if before[name] is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = before[name]


def _tensors(output: Output) -> list[Tensor] | None:
    """The tensors of an output; None if there is anything else in it."""
    if isinstance(output, Tensor):
        return [output]
    if type(output) is not tuple:
        return None
    parts = [_tensors(part) for part in output]
    return None if any(part is None for part in parts) else [tensor for part in parts for tensor in part or ()]


def _versions(output: Output) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in _tensors(output) or ())


def _row(output: Output, index: int) -> Output:
    return output[index : index + 1] if isinstance(output, Tensor) else tuple(_row(part, index) for part in output)


def _concatenated(outputs: Sequence[Output]) -> Output:
    if isinstance(outputs[0], Tensor):
        return torch.cat(list(outputs))
    return tuple(_concatenated(parts) for parts in zip(*outputs, strict=True))


def _projection_flops(hidden: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(hidden) * weight[0]


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(query) * key[-2] + 2 * prod(query[:-1]) * key[-2] * value[-1]


# What PyTorch's counter has no formula for.
_FLOPS = {
    torch.ops.nemo_ext.value_projection: _projection_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
