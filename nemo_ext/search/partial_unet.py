"""Running a denoiser from one of its value layers on, with cached outputs before it (docs/method.md, section 9).

While a search changes the neurons of one layer, all modules before that layer would compute the same outputs in each
run. Here they return the cached outputs of an earlier run, and only the rest of the denoiser is computed. The result is
exact, because the denoiser's own forward method runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nemo_ext.ops  # noqa: F401  registers the operator whose FLOPs are counted
from nemo_ext.forwards import Forward, replaced_forwards
from nemo_ext.models.state import is_compiled

#: The output of a module: a tensor, or tensors in nested tuples. The first axis of each is the batch.
Output = Any
#: Used instead of an entry point's index: the whole denoiser runs, without cached outputs.
FULL_RUN = -1
#: The module outputs of one row of a batch: module name -> the output, with a batch axis of length 1.
Row = Mapping[str, Output]


class EntryPoints:
    """The places where one denoiser can be entered: just before each of its searched value layers.

    A call of the denoiser within `entering` runs its own forward method, in which every module that finished before the
    entry point returns its cached output of an earlier run. So the result is bit-identical to that of a full run. This
    works with any denoiser that calls each value layer exactly once, in a fixed order, and with any attention
    processor.

    Attributes:
        layers: the value layers, in the order in which the denoiser calls them.
        shares: for each of these layers, the FLOPs of a run from there on, as a share of a full run's. Matrix products,
            convolutions and attention are counted.
        row_bytes: the largest size of a `Row`, in bytes.
    """

    def __init__(self, denoiser: nn.Module, calls: Sequence[_Call], layers: Sequence[str], flops: int) -> None:
        entered = {call.name: call.entered for call in calls}
        self.layers = tuple(sorted(layers, key=lambda layer: entered[layer]))
        modules = dict(denoiser.named_modules())
        self._replayed = [_outermost(call for call in calls if call.left < entered[layer]) for layer in self.layers]
        self._recorded = {call.name: modules[call.name] for replayed in self._replayed for call in replayed}
        self.shares = tuple(1 - sum(call.flops for call in replayed) / flops for replayed in self._replayed)
        self.row_bytes = sum(call.row_bytes for call in calls if call.name in self._recorded)

    @classmethod
    def of(cls, denoiser: nn.Module, layers: Sequence[str], evaluate: Callable[[int], object]) -> EntryPoints | None:
        """Find where a denoiser can be entered, by observing one call with a batch of two rows.

        Args:
            denoiser: the denoiser, in evaluation mode.
            layers: the names of its value layers that are searched.
            evaluate: a function that calls the denoiser with a given number of rows, without gradients.

        Returns:
            The entry points, or None if the denoiser cannot be entered. There are three reasons for that: it is
            compiled, and replaced modules would recompile it; a value layer is not called exactly once; or a module's
            output is changed in place later, so that a cached output would differ from what the module returned.
        """
        if is_compiled(denoiser):
            return None
        around = {""}
        for layer in layers:
            parts = layer.split(".")
            around |= {".".join(parts[:end]) for end in range(1, len(parts))}
        watched = {}
        for name, module in denoiser.named_modules():
            if name and name.rpartition(".")[0] in around:
                watched[name] = module
                if isinstance(module, nn.ModuleList):  # a list itself is never called, so its members are watched
                    around.add(name)
        calls: list[_Call] = []
        counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        clock = 0

        def watch(name: str, forward: Forward) -> Forward:
            def watched_forward(*args: Any, **kwargs: Any) -> Output:
                nonlocal clock
                clock += 1
                entered, flops = clock, counter.get_total_flops()
                output = forward(*args, **kwargs)
                clock += 1
                calls.append(_Call(name, entered, clock, counter.get_total_flops() - flops, output, _versions(output)))
                return output

            return watched_forward

        with replaced_forwards(watched, watch), counter:
            evaluate(2)
        once = [call for call in calls if sum(other.name == call.name for other in calls) == 1]
        changed = any(_versions(call.output) != call.versions or call.is_inference for call in calls)
        if changed or not set(layers) <= {call.name for call in once}:
            return None
        usable = [call for call in once if call.name in layers or call.can_be_replayed()]
        return cls(denoiser, usable, layers, counter.get_total_flops())

    @contextmanager
    def entering(self, start: int, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Run one call of the denoiser in the block from an entry point on, and record the outputs of its modules.

        Args:
            start: the index in `layers` of the layer to enter before; `FULL_RUN`: the whole denoiser runs.
            rows: for each row of the batch, the row that an earlier run recorded. That run must have had the same
                latent, timestep, text and neurons before the entry point. For a full run each row is an empty mapping.

        Yields:
            A list. After the block it has the recorded row of each row of the batch.
        """
        cached: dict[str, Output] = {}
        if start != FULL_RUN:
            cached = {call.name: _concatenated([row[call.name] for row in rows]) for call in self._replayed[start]}
        computed: dict[str, Output] = {}

        def replay(name: str, forward: Forward) -> Forward:
            def replaying_forward(*args: Any, **kwargs: Any) -> Output:
                if name in cached:
                    return cached[name]
                computed[name] = forward(*args, **kwargs)
                return computed[name]

            return replaying_forward

        recorded: list[Row] = []
        with replaced_forwards(self._recorded, replay):
            yield recorded
        recorded += [
            {**row, **{name: _row(output, index) for name, output in computed.items()}}
            for index, row in enumerate(rows)
        ]


@dataclass(frozen=True)
class _Call:
    """One call of a module.

    Attributes:
        name: the module's name.
        entered, left: when the call began and ended, counted in calls that began or ended before.
        flops: its FLOPs.
        output: its output.
        versions: the version counters of the output's tensors when the call ended.
    """

    name: str
    entered: int
    left: int
    flops: int
    output: Output
    versions: tuple[int, ...]

    def can_be_replayed(self) -> bool:
        """Whether skipping the call saves FLOPs, and every tensor of its output has the two rows of the batch."""
        tensors = _tensors(self.output)
        return (
            self.flops > 0
            and tensors is not None
            and all(tensor.dim() > 0 and tensor.shape[0] == 2 for tensor in tensors)
        )

    @property
    def is_inference(self) -> bool:
        """Whether changes of the output in place cannot be detected."""
        return -1 in self.versions

    @property
    def row_bytes(self) -> int:
        return sum(tensor[0].nbytes for tensor in _tensors(self.output) or ())


def _outermost(calls: Iterable[_Call]) -> list[_Call]:
    """The calls of modules that are not inside another module of `calls`."""
    found: list[_Call] = []
    for call in sorted(calls, key=lambda call: len(call.name)):
        if not any(call.name.startswith(f"{other.name}.") for other in found):
            found.append(call)
    return found


def _tensors(output: Output) -> list[Tensor] | None:
    """The tensors of an output; None if the output contains anything else."""
    if isinstance(output, Tensor):
        return [output]
    if type(output) is not tuple:
        return None
    parts = [_tensors(part) for part in output]
    return None if any(part is None for part in parts) else [tensor for part in parts for tensor in part or ()]


def _versions(output: Output) -> tuple[int, ...]:
    # A view of a parameter that was loaded under inference mode has no version counter.
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in _tensors(output) or ())


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


# FLOPs of the operators that PyTorch's counter does not know.
_FLOPS = {
    torch.ops.nemo_ext.value_projection: _projection_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
