"""Statistics in the file format of the published code: a pair of lists, the mean and the std of each value layer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.files import replacing
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.models.layers import value_layers
from nemo_ext.models.state import activation_fingerprint, name_of_model

#: The ending of such a file.
ENDING = ".pt"
#: How many captions the published file is of. The format has no place for the number.
PUBLISHED_COUNT = 50_000


@dataclass(frozen=True)
class PublishedStatistics:
    """What a published statistics file holds. It names neither its model nor its layers nor the number of its prompts.

    Attributes:
        mean: for each value layer, in network order, μ, [N].
        std: for each value layer, unbiased σ, [N].
    """

    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PublishedStatistics:
        """Read a file that `1_compute_activations_statistics.py` of the published code or `save` has written.

        Args:
            path: the file. It is read with `weights_only=True`, so it cannot run code.

        Raises:
            NemoError: the file cannot be read, or holds something else than a pair of lists of vectors; or a value is
                not finite, or a standard deviation is negative.
        """
        try:
            content = torch.load(Path(path), map_location="cpu", weights_only=True)
        except OSError as error:
            raise NemoError(f"{path} can't be read: {error.strerror or error}") from error
        except Exception as error:  # a damaged archive raises anything from RuntimeError to KeyError
            raise NemoError(f"{path} can't be read as statistics of the published code: {_short(error)}") from error
        wanted = "wanted the mean and the standard deviation of each layer, in two lists of vectors"
        if not isinstance(content, tuple | list) or len(content) != 2:
            raise NemoError(f"{path} doesn't hold statistics of the published code: {wanted}")
        mean, std = content
        for values in (mean, std):
            if not isinstance(values, tuple | list) or not all(_is_vector(vector) for vector in values):
                raise NemoError(f"{path} doesn't hold statistics of the published code: {wanted}")
        if not mean or [len(vector) for vector in mean] != [len(vector) for vector in std]:
            raise NemoError(f"{path}: the means and the standard deviations are of different neurons: {wanted}")
        if not all(bool(vector.isfinite().all()) for vector in (*mean, *std)):
            raise NemoError(f"the statistics in {path} hold NaN or infinity: collect them again")
        if any(bool((vector < 0).any()) for vector in (*mean, *std)):
            raise NemoError(f"the statistics in {path} hold negative values, which no mean of absolute values has")
        return cls(tuple(mean), tuple(std))

    @classmethod
    def of(cls, statistics: ActivationStatistics) -> PublishedStatistics:
        """The mean and the standard deviation of statistics, in float32 as the published code has them.

        Raises:
            NemoError: there are fewer than two prompts, or an activation was not finite.
        """
        mean, std = statistics.mean, statistics.std
        return cls(
            tuple(mean[layer].float() for layer in statistics.layers),
            tuple(std[layer].float() for layer in statistics.layers),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that the published code reads, atomically. The number of prompts and the model are lost.

        Args:
            path: the file, which should end in .pt.
        """
        with replacing(path) as temporary:
            torch.save((list(self.mean), list(self.std)), temporary)

    def for_model(self, pipe: Any, *, count: int = PUBLISHED_COUNT) -> ActivationStatistics:
        """Use the statistics for a model. The file does not say which model it is of, so only the widths are checked.

        Args:
            pipe: a pipeline.
            count: the number of prompts n. No search depends on it.

        Returns:
            The statistics, with the names of the down and mid blocks' value layers, in network order.

        Raises:
            NemoError: the model has another number of layers, or layers of other widths.
        """
        layers = value_layers(pipe)
        have, want = [vector.numel() for vector in self.mean], [layer.out_features for layer in layers.values()]
        if have != want:
            raise NemoError(
                f"the published statistics are of layers with {have} neurons, and this model's have {want}: collect "
                "them with `nemo-ext stats`"
            )
        return ActivationStatistics.from_moments(
            dict(zip(layers, self.mean, strict=True)),
            dict(zip(layers, self.std, strict=True)),
            count,
            fingerprint=activation_fingerprint(pipe, tuple(layers)),
            model_name=name_of_model(pipe),
        )


def _is_vector(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point() and value.numel() > 0


def _short(error: BaseException) -> str:
    """The first sentence of an error; PyTorch's go on with advice that would run code from the file."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
