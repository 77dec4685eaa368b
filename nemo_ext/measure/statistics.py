"""Statistics of each neuron's activation over ordinary prompts: mean and std (docs/method.md, section 2)."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.files import replacing
from nemo_ext.measure.activations import ValueStack, accelerated_linears
from nemo_ext.measure.memory import keep_freed_memory
from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import activation_fingerprint, evaluating, name_of_model
from nemo_ext.models.text import check_prompts
from nemo_ext.progress import ProgressLike, open_progress
from nemo_ext.ranks.parts import digest_of, open_parts
from nemo_ext.ranks.ranks import Ranks
from nemo_ext.reading import PositiveCount, parse_json, read_tensors, refusing, restored
from nemo_ext.torch_state import plain_torch

_FORMAT = "nemo_ext.statistics.1"

# So many batches are one part of a job. Their statistics are merged with those of the others.
_BATCHES = 4


@dataclass(frozen=True)
class _Description:
    """The metadata of a file of statistics, as `ActivationStatistics.save` describes it."""

    format: str
    layers: tuple[tuple[str, PositiveCount], ...]
    fingerprint: str
    model_name: str


class ActivationStatistics:
    """Count n, mean μ and unbiased standard deviation σ of every neuron's activation a (docs/method.md, section 2).

    `collect_statistics` returns the statistics of a model. A new object has no prompts; `update` adds them. The state
    is n, μ and M2 (the sum of squared deviations from μ) in float64. It is updated with the formulas of Welford and
    Chan, so no sum of squares is ever formed.

    Args:
        widths: layer name -> number of neurons N, in network order.
        fingerprint: `activation_fingerprint` of the model that the activations come from.
        model_name: the name of that model in messages.
    """

    def __init__(self, widths: Mapping[str, int], *, fingerprint: str = "", model_name: str = "") -> None:
        self.widths = dict(widths)
        self.fingerprint = fingerprint
        self.model_name = model_name
        neurons = sum(self.widths.values())
        self._count = torch.zeros((), dtype=torch.float64)
        self._mean = torch.zeros(neurons, dtype=torch.float64)
        self._m2 = torch.zeros(neurons, dtype=torch.float64)
        # The prompts that `update` has received. On CUDA an operator call that meets an activation that is not finite
        # leaves its prompts out of the count and raises no error, so a difference between the two reveals it.
        self._received = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in network order."""
        return tuple(self.widths)

    @property
    def count(self) -> int:
        """n, the number of prompts.

        Raises:
            NemoError: an activation was not finite. On CUDA `update` does not raise this error, because it does not
                wait for the GPU. Every method and property that reads the statistics raises it instead.
        """
        return int(self._read()[0])

    @property
    def mean(self) -> dict[str, Tensor]:
        """Layer name -> μ, [N] float64 on the CPU.

        Raises:
            NemoError: an activation was not finite.
        """
        return self._by_layer(self._read()[1])

    @property
    def std(self) -> dict[str, Tensor]:
        """Layer name -> σ, [N] float64 on the CPU.

        Raises:
            NemoError: there are fewer than two prompts, or an activation was not finite.
        """
        count, _, m2 = self._read()
        if count < 2:
            raise NemoError(f"a standard deviation needs two prompts or more, got {int(count)}")
        return self._by_layer((m2 / (count - 1)).sqrt())

    def update(self, hidden: Tensor, stack: ValueStack) -> None:
        """Add the activations of B prompts, with one operator call for all layers.

        Args:
            hidden: text embeddings e, [B, T, K], in the stack's dtype and on its device.
            stack: `ValueStack(value_layers(pipe, statistics.layers))`.

        Raises:
            NemoError: the stack has other layers, or an activation is not finite; the message names the layer, and the
                statistics stay unchanged. On CUDA, activations that are not finite are reported later, see `count`.
        """
        if stack.widths != self.widths:
            raise NemoError(f"the statistics are of {_shape_of(self.widths)}, got weights of {_shape_of(stack.widths)}")
        self._count, self._mean, self._m2 = (buffer.to(hidden.device) for buffer in (self._count, self._mean, self._m2))
        stack.activations(hidden, self._count, self._mean, self._m2)
        self._received += hidden.shape[0]

    def merge(self, other: ActivationStatistics) -> ActivationStatistics:
        """Return the statistics of two sets of prompts together, computed with Chan's formula, as a new object.

        The result is exact up to rounding in float64; the order of several merges changes only the last digits.

        Args:
            other: statistics of the same model and layers over other prompts.

        Raises:
            NemoError: the other statistics belong to another model or to other layers, or an activation was not finite.
        """
        if other.widths != self.widths or other.fingerprint != self.fingerprint:
            raise NemoError(f"only statistics of one model and the same layers merge: {self!r}, got {other!r}")
        merged = ActivationStatistics(self.widths, fingerprint=self.fingerprint, model_name=self.model_name)
        (count, mean, m2), (other_count, other_mean, other_m2) = self._read(), other._read()
        total = count + other_count
        if total > 0:
            difference = other_mean - mean
            merged._count = total
            merged._mean = mean + difference * (other_count / total)
            merged._m2 = m2 + other_m2 + difference.square() * (count * other_count / total)
            merged._received = int(total)
        return merged

    def z_scores(self, activation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Absolute z-scores |a − μ| / σ (docs/method.md, section 8).

        Args:
            activation: layer name -> a, [..., N], for all layers of the statistics or some of them.

        Returns:
            Layer name -> [..., N] float64 on the CPU. If σ is 0, the z-score is 0 for a = μ and infinite otherwise.

        Raises:
            NemoError: there are fewer than two prompts, the statistics do not have a layer, or an activation was not
                finite.
        """
        mean, std = self.mean, self.std
        scores = {}
        for layer, values in activation.items():
            if layer not in mean:
                raise NemoError(f"the statistics have no layer '{layer}': {', '.join(mean)}")
            distance = (values.detach().cpu().double() - mean[layer]).abs()
            scores[layer] = torch.where(distance == 0, 0.0, distance / std[layer])
        return scores

    def check(self, pipe: Any) -> None:
        """Check that the statistics were collected from this model.

        Args:
            pipe: a pipeline.

        Raises:
            NemoError: the pipeline has other weights, or the same weights in another dtype.
        """
        actual = activation_fingerprint(pipe, self.layers)
        if actual != self.fingerprint:
            raise NemoError(
                f"the statistics were collected from another model or in another dtype: "
                f"'{self.model_name}' ({self.fingerprint[:12]}…), this pipeline is "
                f"'{name_of_model(pipe)}' ({actual[:12]}…): collect them again"
            )

    def digest(self) -> str:
        """SHA-256 of n, μ, M2, the layers and the model's fingerprint, as 64 hexadecimal digits.

        Results record it, so that results with different statistics are not mixed.

        Raises:
            NemoError: an activation was not finite.
        """
        digest = hashlib.sha256(f"{self.fingerprint} {self.widths}".encode())
        for buffer in self._read():
            digest.update(buffer.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics to a safetensors file, atomically.

        The file has the float64 tensors "count" [], "mean" [ΣN] and "m2" [ΣN]. Its metadata entry "nemo_ext" has the
        layers, their widths, the fingerprint and the model's name as JSON. Equal statistics give equal files.

        Args:
            path: the file.

        Raises:
            NemoError: an activation was not finite.
        """
        # All metadata is in one entry, because safetensors writes several entries in no fixed order.
        description = {
            "format": _FORMAT,
            "layers": list(self.widths.items()),
            "fingerprint": self.fingerprint,
            "model_name": self.model_name,
        }
        tensors = dict(zip(("count", "mean", "m2"), self._read(), strict=True))
        with replacing(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, {"nemo_ext": json.dumps(description, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ActivationStatistics:
        """Read statistics that `save` has written.

        Args:
            path: the file.

        Raises:
            NemoError: the file cannot be read, or does not contain activation statistics.
        """
        with refusing(path, "does not hold activation statistics"):
            tensors, metadata = read_tensors(path)
            described = parse_json(metadata.get("nemo_ext", "{}").encode())
            found = described.get("format") if isinstance(described, dict) else None
            if found != _FORMAT:
                raise NemoError(f"wanted format {_FORMAT}, got {found}")
            description = restored(_Description, described)
            widths = dict(description.layers)
            if len(widths) != len(description.layers):
                raise NemoError("layers: a layer is there twice")
            shapes = {"count": [], "mean": [sum(widths.values())], "m2": [sum(widths.values())]}
            for name, shape in shapes.items():
                _check_tensor(name, tensors.get(name), shape)
            count = float(tensors["count"])
            if not count.is_integer() or count >= 2**53:
                raise NemoError(f"count: wanted a whole number of prompts, got {count:g}")
            statistics = cls(widths, fingerprint=description.fingerprint, model_name=description.model_name)
            statistics._count, statistics._mean, statistics._m2 = (tensors[name] for name in shapes)
            statistics._received = int(count)
            return statistics

    @classmethod
    def from_moments(
        cls,
        mean: Mapping[str, Tensor],
        std: Mapping[str, Tensor],
        count: int,
        *,
        fingerprint: str = "",
        model_name: str = "",
    ) -> ActivationStatistics:
        """Make statistics of a mean and a standard deviation that are known already.

        Args:
            mean: layer name -> μ, [N], in network order.
            std: layer name -> unbiased σ, [N], for the same layers.
            count: n, two prompts or more.
            fingerprint, model_name: as for `ActivationStatistics`.
        """
        statistics = cls(
            {layer: values.numel() for layer, values in mean.items()}, fingerprint=fingerprint, model_name=model_name
        )
        statistics._count = torch.tensor(count, dtype=torch.float64)
        statistics._mean = torch.cat([mean[layer].double() for layer in mean])
        statistics._m2 = torch.cat([std[layer].double().square() for layer in mean]) * (count - 1)
        statistics._received = count
        return statistics

    def __repr__(self) -> str:
        return (
            f"ActivationStatistics(count={int(self._count)}, {_shape_of(self.widths)}, "
            f"model '{self.model_name}' {self.fingerprint[:12]})"
        )

    def check_finite(self) -> None:
        """Check that every prompt that `update` received is part of the statistics. On CUDA this waits for the GPU.

        Raises:
            NemoError: an activation was not finite, so the prompts of its batch are missing.
        """
        self._read()

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        """n, μ and M2 on the CPU, after the check that `check_finite` describes."""
        count = self._count.cpu()
        if count != self._received:
            raise NemoError(
                f"the statistics lack {self._received - int(count)} of {self._received} prompts, because an activation "
                "in their batches is not finite; the text encoder or a layer has overflowed: use float32 or bfloat16, "
                "or collect on the CPU, where the error names the layer"
            )
        return count, self._mean.cpu(), self._m2.cpu()

    def _by_layer(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split(list(self.widths.values()))
        return {layer: part.clone() for layer, part in zip(self.widths, parts, strict=True)}


def _check_tensor(name: str, tensor: Tensor | None, shape: list[int]) -> None:
    """Check one of the tensors "count", "mean" and "m2" of a file."""
    if tensor is None:
        raise NemoError(f"{name} is missing")
    if tensor.dtype != torch.float64 or list(tensor.shape) != shape:
        kind = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
        raise NemoError(f"{name}: wanted float64 {shape}, got {kind}")
    if not tensor.isfinite().all():
        raise NemoError(f"{name}: wanted finite numbers, got NaN or infinity")
    if name != "mean" and (tensor < 0).any():
        raise NemoError(f"{name}: wanted numbers of 0 or more, got {float(tensor.min()):g}")


def _shape_of(widths: Mapping[str, int]) -> str:
    return f"{len(widths)} layers, {sum(widths.values())} neurons"


@plain_torch()
def collect_statistics(
    pipe: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    layers: str | Sequence[str] | None = None,
    parts: str | os.PathLike[str] | None = None,
    ranks: Ranks | None = None,
    progress: ProgressLike = None,
) -> ActivationStatistics:
    """Compute μ and σ of every neuron's activation over hold-out prompts (docs/method.md, section 2).

    Activations depend on the text alone, so the denoiser does not run. The same prompts in the same batches give
    bit-identical statistics on one kind of processor, for any number of ranks, and also after a stop.

    Args:
        pipe: a pipeline, patched or not.
        prompts: two or more ordinary texts, which the model has not memorized.
        batch_size: the number of prompts in one call of the text encoder. It changes the result by rounding only.
        layers: as for `value_layers`.
        parts: a folder for what is finished, so that the same call continues after it was stopped. It stays; delete it
            when the statistics are saved. None: nothing is written.
        ranks: the processes that share the prompts (docs/scale.md), all of which make this call; None: this one alone.
        progress: as for `nemo_ext.progress.open_progress`.

    Returns:
        The statistics of all neurons in the chosen layers.

    Raises:
        NemoError: there are fewer than two prompts, a prompt is not text, an activation is not finite, or as for
            `open_parts`.
    """
    texts = check_prompts(prompts)
    if len(texts) < 2:
        raise NemoError(f"a standard deviation needs two prompts or more, got {len(texts)}")
    if batch_size < 1:
        raise NemoError(f"batch_size must be 1 or more, got {batch_size}")
    ranks = ranks or Ranks()
    keep_freed_memory()
    stack = ValueStack(value_layers(pipe, layers))
    model, name = activation_fingerprint(pipe, tuple(stack.widths)), name_of_model(pipe)
    family = family_of(pipe)
    chunk_size = batch_size * _BATCHES

    def of_chunk(start: int) -> ActivationStatistics:
        statistics = ActivationStatistics(stack.widths, fingerprint=model, model_name=name)
        chunk = texts[start : start + chunk_size]
        for batch in (chunk[place : place + batch_size] for place in range(0, len(chunk), batch_size)):
            statistics.update(family.encode(pipe, batch).hidden.to(stack.weight), stack)
        statistics.check_finite()
        return statistics

    starts = range(0, len(texts), chunk_size)
    with ExitStack() as exit_stack:
        bars = exit_stack.enter_context(open_progress(progress))
        advance = exit_stack.enter_context(bars.task(f"statistics, {chunk_size} prompts at a time", len(starts)))
        exit_stack.enter_context(evaluating(pipe))
        for encoder in family.text_encoders(pipe).values():
            exit_stack.enter_context(accelerated_linears(encoder))
        settings = {"model": model, "layers": stack.widths, "prompts": digest_of(texts), "batch_size": batch_size}
        folder = exit_stack.enter_context(open_parts(parts, settings, ranks))
        if folder is None:
            return functools.reduce(ActivationStatistics.merge, map(of_chunk, ranks.units(starts, advance)))
        names = [f"{start:08d}.safetensors" for start in starts]
        files = folder.do(names, lambda place, file: of_chunk(starts[place]).save(file), ranks, advance)
        merged = functools.reduce(ActivationStatistics.merge, map(ActivationStatistics.load, files))
        ranks.meet()  # before one of them deletes the files
    return merged
