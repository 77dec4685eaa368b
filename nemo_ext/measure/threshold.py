"""The memorization threshold τ of a model (docs/method.md, section 6)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_ext.errors import NemoError
from nemo_ext.files import replacing
from nemo_ext.measure.generation import Sampling
from nemo_ext.measure.image_similarity import ImageSimilarity, PixelSimilarity
from nemo_ext.measure.memory import fitting_batch_size
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.score import image_score, score_of_embedding
from nemo_ext.models.state import model_fingerprint, name_of_model
from nemo_ext.models.text import check_prompts, encode_prompts
from nemo_ext.progress import ProgressLike, open_progress
from nemo_ext.ranks.parts import digest_of, measure_each, open_parts
from nemo_ext.ranks.ranks import Ranks
from nemo_ext.reading import PositiveCount, parse_json, refusing, restored
from nemo_ext.torch_state import plain_torch

# The protocol's fields that scores must share to be comparable. The seeds may differ, but not their number.
_FIELDS_OF_A_SCORE = ("num_inference_steps", "step_index", "data_range", "window_sigma", "threshold_guidance")


def mean_and_std(scores: Sequence[float]) -> tuple[float, float]:
    """The mean and the unbiased standard deviation of scores, in float64. τ is their sum.

    Raises:
        NemoError: there are fewer than two scores.
    """
    if len(scores) < 2:
        raise NemoError(f"a standard deviation needs two prompts or more, got {len(scores)}")
    values = torch.tensor(scores, dtype=torch.float64)
    return values.mean().item(), values.std().item()


@dataclass(frozen=True)
class ImageThreshold:
    """τ_image, the threshold for the similarity of images (docs/method.md, section 12), with what is behind it.

    Attributes:
        value: τ_image = mean + std.
        mean, std: the mean and the unbiased standard deviation of the scores.
        scores: the image score of each unmemorized prompt.
        sampling: how the images were generated.
        similarity: the name of the similarity, `ImageSimilarity.name`.
    """

    value: float
    mean: float
    std: float
    scores: tuple[float, ...]
    sampling: Sampling
    similarity: str

    def check(self, sampling: Sampling, similarity: str) -> None:
        """Check that τ_image applies to images that are generated and compared in a certain way.

        Raises:
            NemoError: it was measured with another sampling or similarity. The message names what differs.
        """
        there, now = {**self.sampling.to_dict(), "similarity": self.similarity}, sampling.to_dict()
        for name, asked_for in {**now, "similarity": similarity}.items():
            if name != "first_seed" and there[name] != asked_for:
                raise NemoError(
                    f"τ_image was measured with {name} {there[name]}, got {asked_for}: measure the threshold again "
                    f"with this {name}"
                )


@dataclass(frozen=True)
class Threshold:
    """The memorization threshold τ of a model, with the scores and settings behind it (docs/method.md, section 6).

    `float(threshold)` is τ.

    Attributes:
        value: τ = mean + std.
        mean, std: the mean and the unbiased standard deviation of the scores.
        scores: the score of each unmemorized prompt.
        seeds: S, the number of seeds for each prompt.
        protocol: how the scores were measured.
        fingerprint: `model_fingerprint` of the model.
        model_name: the folder or name that the model was loaded from.
        images: τ_image; None if no images were generated.
    """

    value: float
    mean: float
    std: float
    scores: tuple[float, ...]
    seeds: PositiveCount
    protocol: Protocol
    fingerprint: str
    model_name: str
    images: ImageThreshold | None = None

    def __float__(self) -> float:
        return self.value

    def check(self, pipe: Any, protocol: Protocol, seeds: int, *, fingerprint: str | None = None) -> None:
        """Check that τ applies to scores of a pipeline with a protocol and a number of seeds.

        Args:
            pipe: a pipeline.
            protocol: how its scores are measured.
            seeds: S, the number of seeds.
            fingerprint: the pipeline's `model_fingerprint`, if it is known.

        Raises:
            NemoError: τ was measured with another model, another number of seeds, or other values of the protocol's
                fields that scores depend on. `float(threshold)` has no such check.
        """
        choices = [("seeds", self.seeds, seeds)]
        choices += [(name, getattr(self.protocol, name), getattr(protocol, name)) for name in _FIELDS_OF_A_SCORE]
        for name, measured_with, asked_for in choices:
            if measured_with != asked_for:
                raise NemoError(
                    f"the threshold was measured with {name} {measured_with}, got {asked_for}: "
                    "measure it again, or give it as a number"
                )
        actual = fingerprint or model_fingerprint(pipe)
        if actual != self.fingerprint:
            raise NemoError(
                "the threshold was measured on another model or in another dtype: "
                f"'{self.model_name}' ({self.fingerprint[:12]}…), this pipeline is "
                f"'{name_of_model(pipe)}' ({actual[:12]}…): measure it again, or give it as a number"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all attributes to a JSON file, atomically."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Threshold:
        """Read a threshold that `save` has written.

        Raises:
            NemoError: the file cannot be read, does not contain a threshold, or the threshold is not the one of its
                scores.
        """
        with refusing(path, "does not hold a threshold"):
            read = restored(cls, parse_json(Path(path).read_bytes()))
            _check_sums(read, "")
            if read.images is not None:
                _check_sums(read.images, "images.")
            return read


def _check_sums(read: Threshold | ImageThreshold, where: str) -> None:
    """Check that a threshold follows from its scores, because a damaged digit shows in nothing else."""
    mean, std = mean_and_std(read.scores)
    for name, wanted in {"mean": mean, "std": std, "value": mean + std}.items():
        if not math.isclose(wanted, getattr(read, name), rel_tol=1e-6, abs_tol=1e-9):
            raise NemoError(f"{where}{name}: wanted {wanted:.6g}, as the scores say, got {getattr(read, name):.6g}")


@plain_torch()
def memorization_threshold(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: int = 10,
    protocol: Protocol | None = None,
    batch_size: int | None = None,
    sampling: Sampling | None = None,
    similarity: ImageSimilarity | None = None,
    image_prompts: int = 32,
    parts: str | os.PathLike[str] | None = None,
    ranks: Ranks | None = None,
    progress: ProgressLike = None,
) -> Threshold:
    """Measure τ, the mean plus one std of unmemorized prompts' scores (docs/method.md, section 6).

    With `sampling`, images are generated too, and τ_image is measured by the same rule (section 12).

    Args:
        pipe: a pipeline.
        prompts: two or more texts that the model has not memorized.
        seeds: S ≥ 2. τ applies only to scores with the same number of seeds.
        protocol: how to measure; None: `Protocol.paper()`.
        batch_size: latents in one call of the denoiser. It changes the result by rounding only. None: as many as
            memory allows (`fitting_batch_size`), at most `seeds`.
        sampling: how images are generated for τ_image; None: it is not measured.
        similarity: how alike two images are; None: `PixelSimilarity()`.
        image_prompts: how many of the prompts, the first ones, have their images compared; 2 or more.
        parts: a folder for what is finished, so that the same call continues after it was stopped. It stays; delete it
            when the threshold is saved. None: nothing is written.
        ranks: the processes that share the prompts (docs/scale.md), all of which make this call; None: this one alone.
        progress: as for `nemo_ext.progress.open_progress`.

    Returns:
        τ, with the scores of the prompts.

    Raises:
        NemoError: there are fewer than two prompts, or as for `open_parts` and `memorization_score`.
    """
    if sampling is not None and image_prompts < 2:
        raise NemoError(f"image_prompts must be 2 or more for a standard deviation, got {image_prompts}")
    texts = check_prompts(prompts)
    if len(texts) < 2:
        raise NemoError(f"a standard deviation needs two prompts or more, got {len(texts)}")
    ranks = ranks or Ranks()
    protocol = protocol or Protocol.paper()
    empty = encode_prompts(pipe, [""])
    guidance = (protocol.threshold_guidance, empty) if protocol.threshold_guidance != 0 else None
    if batch_size is None:
        batch_size = fitting_batch_size(pipe, empty)
    model = model_fingerprint(pipe)
    image_texts = [] if sampling is None else texts[:image_prompts]
    alike = similarity or PixelSimilarity()
    sampling = None if sampling is None else sampling.resolved(pipe)

    def score(place: int) -> float:
        embedding = encode_prompts(pipe, [texts[place]])
        return score_of_embedding(pipe, embedding, seeds, protocol, batch_size, guidance).max

    def score_of_images(place: int) -> float:
        assert sampling is not None
        return image_score(pipe, image_texts[place], sampling, alike, batch_size=batch_size).max

    with ExitStack() as stack:
        bars = stack.enter_context(open_progress(progress))
        settings = {
            "model": model,
            "prompts": digest_of(texts),
            "seeds": seeds,
            "protocol": protocol.to_dict(),
            "sampling": None if sampling is None else sampling.to_dict(),
            "similarity": alike.name,
        }
        folder = stack.enter_context(open_parts(parts, settings, ranks))
        with bars.task("threshold", len(texts)) as advance:
            scores = measure_each(len(texts), "first-step", score, float, folder, ranks, advance)
        with bars.task("image threshold", len(image_texts)) as advance:
            image_scores = measure_each(len(image_texts), "images", score_of_images, float, folder, ranks, advance)
    images = None
    if sampling is not None:
        images = ImageThreshold(*_tau(image_scores), tuple(image_scores), sampling, alike.name)
    value, mean, std = _tau(scores)
    return Threshold(
        value=value,
        mean=mean,
        std=std,
        scores=tuple(scores),
        seeds=seeds,
        protocol=protocol,
        fingerprint=model,
        model_name=name_of_model(pipe),
        images=images,
    )


def _tau(scores: Sequence[float]) -> tuple[float, float, float]:
    """The threshold, the mean and the standard deviation of scores."""
    mean, std = mean_and_std(scores)
    return mean + std, mean, std
