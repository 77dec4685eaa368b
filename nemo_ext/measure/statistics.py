"""How active each neuron is on ordinary prompts: running mean and std (docs/method.md, section 2)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.files import replacing
from nemo_ext.measure.activations import ValueStack, accelerated_linears
from nemo_ext.measure.memory import keep_freed_memory
from nemo_ext.models.layers import value_layers
from nemo_ext.models.registry import family_of
from nemo_ext.models.state import evaluating, model_fingerprint, name_of_model
from nemo_ext.models.text import check_prompts
from nemo_ext.progress import ProgressLike, open_progress

_FORMAT = "nemo_ext.statistics.1"


class ActivationStatistics:
    """Count n, mean μ and unbiased std σ of every neuron's activation a over prompts.

    Built by `collect_statistics`, or empty and filled by `update`. Kept as float64 (n, μ, M2) and
    updated by Welford and Chan: never a sum of squares.

    Args:
        widths: layer name -> number of neurons N, in network order.
        fingerprint: `model_fingerprint` of the model that the activations come from.
        model_name: what to call that model in messages.
    """

    def __init__(self, widths: Mapping[str, int], *, fingerprint: str = "", model_name: str = "") -> None:
        self.widths = dict(widths)
        self.fingerprint = fingerprint
        self.model_name = model_name
        neurons = sum(self.widths.values())
        self._count = torch.zeros((), dtype=torch.float64)
        self._mean = torch.zeros(neurons, dtype=torch.float64)
        self._m2 = torch.zeros(neurons, dtype=torch.float64)
        self._given = 0  # prompts, which the count is less than where a call on CUDA left some out

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in network order."""
        return tuple(self.widths)

    @property
    def count(self) -> int:
        """n, the number of prompts.

        Raises:
            NemoError: an activation wasn't finite. On CUDA `update` can't say so, because it doesn't wait for the GPU:
                whatever reads the statistics does.
        """
        return int(self._read()[0])

    @property
    def mean(self) -> dict[str, Tensor]:
        """Layer name -> μ, [N] float64 on the CPU."""
        return self._by_layer(self._read()[1])

    @property
    def std(self) -> dict[str, Tensor]:
        """Layer name -> σ, [N] float64 on the CPU; NemoError with fewer than two prompts."""
        count, _, m2 = self._read()
        if count < 2:
            raise NemoError(f"a standard deviation needs two prompts or more, got {int(count)}")
        return self._by_layer((m2 / (count - 1)).sqrt())

    def update(self, hidden: Tensor, stack: ValueStack) -> None:
        """Take in the activations of B prompts: one fused call over all layers.

        Args:
            hidden: text embeddings, [B, T, K], of the stack's dtype and device.
            stack: `ValueStack(value_layers(pipe, statistics.layers))`.

        Raises:
            NemoError: the stack has other layers, or an activation isn't finite (named by layer);
                the statistics are then as before. On CUDA the latter is raised by what reads them next, see `count`.
        """
        if stack.widths != self.widths:
            raise NemoError(f"the statistics are of {_shape_of(self.widths)}, got weights of {_shape_of(stack.widths)}")
        self._count, self._mean, self._m2 = (buffer.to(hidden.device) for buffer in (self._count, self._mean, self._m2))
        stack.activations(hidden, self._count, self._mean, self._m2)
        self._given += hidden.shape[0]

    def merge(self, other: ActivationStatistics) -> ActivationStatistics:
        """The statistics of both sets of prompts together, by Chan's formula; a new object.

        Exact but for float64 rounding: the order of merging matters in the last digits only.

        Raises:
            NemoError: the other one is of another model or of other layers.
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
            merged._given = int(total)
        return merged

    def z_scores(self, activation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """|a − μ| / σ (docs/method.md, section 8).

        Args:
            activation: layer name -> a, [..., N]; some of the statistics' layers or all.

        Returns:
            Layer name -> [..., N] float64 on the CPU. Where σ is 0: 0 if a = μ, else infinity.

        Raises:
            NemoError: fewer than two prompts, or a layer that the statistics don't have.
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
        """Make sure that the statistics were collected from this model.

        Raises:
            NemoError: other weights, or the same weights in another dtype.
        """
        actual = model_fingerprint(pipe, self.layers)
        if actual != self.fingerprint:
            raise NemoError(
                f"the statistics were collected from another model or in another dtype: "
                f"'{self.model_name}' ({self.fingerprint[:12]}…), this pipeline is "
                f"'{name_of_model(pipe)}' ({actual[:12]}…): collect them again"
            )

    def digest(self) -> str:
        """SHA-256 of the numbers and the model's fingerprint: tells two statistics apart."""
        digest = hashlib.sha256(f"{self.fingerprint} {self.widths}".encode())
        for buffer in self._read():
            digest.update(buffer.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics as one safetensors file, at once or not at all.

        Tensors "count" [], "mean" [ΣN] and "m2" [ΣN], float64; layers, widths, fingerprint and
        model name as JSON in the metadata entry "nemo_ext".
        """
        # One metadata entry: safetensors writes several in no fixed order.
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
        """Read what `save` wrote.

        Raises:
            NemoError: not a file of statistics.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {}).get("nemo_ext", "{}"))
                if description.get("format") != _FORMAT:
                    raise NemoError(
                        f"{path} does not hold activation statistics: wanted format {_FORMAT}, "
                        f"got {description.get('format')}"
                    )
                statistics = cls(
                    dict(description["layers"]),
                    fingerprint=description["fingerprint"],
                    model_name=description["model_name"],
                )
                statistics._count = file.get_tensor("count")
                statistics._mean = file.get_tensor("mean")
                statistics._m2 = file.get_tensor("m2")
                statistics._given = int(statistics._count)
        except safetensors.SafetensorError as error:
            raise NemoError(f"{path} does not hold activation statistics: {error}") from error
        return statistics

    def __repr__(self) -> str:
        return (
            f"ActivationStatistics(count={int(self._count)}, {_shape_of(self.widths)}, "
            f"model '{self.model_name}' {self.fingerprint[:12]})"
        )

    def check_finite(self) -> None:
        """Make sure that the statistics are of all prompts that were given.

        Raises:
            NemoError: an activation was not finite. On CUDA this is the first call that waits for the GPU and sees it.
        """
        self._read()

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        """n, μ and M2 on the CPU, if they are of all prompts that were given."""
        count = self._count.cpu()
        if count != self._given:
            raise NemoError(
                f"the statistics lack {self._given - int(count)} of {self._given} prompts: an activation in their "
                "batches isn't finite; the text encoder or a layer has overflowed: use float32 or bfloat16, or collect "
                "on the CPU, where the error names the layer"
            )
        return count, self._mean.cpu(), self._m2.cpu()

    def _by_layer(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split(list(self.widths.values()))
        return {layer: part.clone() for layer, part in zip(self.widths, parts, strict=True)}


def _shape_of(widths: Mapping[str, int]) -> str:
    return f"{len(widths)} layers, {sum(widths.values())} neurons"


def collect_statistics(
    pipe: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    layers: str | Sequence[str] | None = None,
    progress: ProgressLike = None,
) -> ActivationStatistics:
    """μ and σ of every neuron's activation over hold-out prompts (docs/method.md, section 2).

    Text alone decides: no U-Net call. The same prompts in the same batches give the same bits.

    Args:
        pipe: a pipeline, patched or not.
        prompts: two texts or more, ordinary ones.
        batch_size: prompts in one call; changes the result by rounding only.
        layers: as for `value_layers`.
        progress: see `nemo_ext.progress`.

    Raises:
        NemoError: fewer than two prompts, or activations that aren't finite.
    """
    texts = check_prompts(prompts)
    if len(texts) < 2:
        raise NemoError(f"a standard deviation needs two prompts or more, got {len(texts)}")
    if batch_size < 1:
        raise NemoError(f"batch_size must be 1 or more, got {batch_size}")
    keep_freed_memory()
    stack = ValueStack(value_layers(pipe, layers))
    statistics = ActivationStatistics(
        stack.widths,
        fingerprint=model_fingerprint(pipe, tuple(stack.widths)),
        model_name=name_of_model(pipe),
    )
    family = family_of(pipe)
    with ExitStack() as stack_of_blocks:
        bars = stack_of_blocks.enter_context(open_progress(progress))
        advance = stack_of_blocks.enter_context(bars.task("statistics", len(texts)))
        stack_of_blocks.enter_context(evaluating(pipe))
        for encoder in family.text_encoders(pipe).values():
            stack_of_blocks.enter_context(accelerated_linears(encoder))
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            statistics.update(family.encode(pipe, batch).to(stack.weight), stack)
            advance(len(batch))
    statistics.check_finite()
    return statistics
