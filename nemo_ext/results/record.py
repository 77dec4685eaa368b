"""The result for one prompt and its certificate, with conversion to JSON and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.neurons import NeuronSet
from nemo_ext.reading import Amount, Count, PositiveCount, Seed, restored


@dataclass(frozen=True)
class NeuronScore:
    """The remaining memorization with one neuron of a set on again, and the other neurons of the set off.

    Attributes:
        layer, index: the neuron.
        score: the remaining memorization. If it is τ or more, it is the similarity of the kept seeds that were measured
            until one of them reached τ, so the other seeds can have a higher one.
    """

    layer: str
    index: Count
    score: float


@dataclass(frozen=True)
class Certificate:
    """Whether a set of neurons is enough, and whether each of its neurons is needed (docs/method.md, section 10).

    Attributes:
        threshold: the τ that the search used.
        score: the remaining memorization with the set off.
        each_on: for every neuron of the set, the remaining memorization with that neuron on again.
        below_threshold: whether `score` is at most τ.
        minimal: whether every neuron is needed (1-minimality), which means that no score in `each_on` is below τ. The
            searches do not guarantee it, because a neuron that is needed when it is tried can become superfluous later.
        verified: whether the image no longer comes back with the set off; None if the images were not checked.
        image_similarity: the highest similarity of images with the set off; None if they were not checked.
    """

    threshold: float
    score: float
    each_on: tuple[NeuronScore, ...]
    below_threshold: bool
    minimal: bool
    verified: bool | None = None
    image_similarity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON."""
        return {**asdict(self), "each_on": [asdict(row) for row in self.each_on]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """Make a certificate from a dictionary of `to_dict`.

        Raises:
            NemoError: as for `nemo_ext.reading.restored`.
        """
        return restored(cls, values)


@dataclass(frozen=True)
class ImageTrial:
    """The images of several seeds with one set of neurons off (docs/method.md, section 12).

    Attributes:
        neurons: how many neurons were off.
        criterion: what the set was found by: "first step", "first step, τ lowered to 0.401" or "images".
        score: the remaining memorization at the first step; None if it was not measured.
        remaining: for each seed's image, the highest similarity with another seed's image of the untouched model, or
            with the prompt's training image where it is known.
        diversity: for each seed's image, the highest similarity with another seed's image with the same neurons off. It
            is empty if only some seeds were generated, because one of them already replicated.
    """

    neurons: Count
    criterion: str
    score: float | None
    remaining: tuple[float, ...]
    diversity: tuple[float, ...]

    @property
    def highest(self) -> float:
        """The highest similarity of this trial."""
        return max((*self.remaining, *self.diversity))


@dataclass(frozen=True)
class Limits:
    """From which similarity on an image counts as a copy (docs/method.md, section 12).

    Attributes:
        remaining: with another seed's image of the untouched model, or with the training image.
        diversity: with another seed's image with the same neurons off.
    """

    remaining: float
    diversity: float

    @classmethod
    def of(cls, before: Sequence[float], threshold: float) -> Limits:
        """The limits of a prompt.

        Args:
            before: the similarities of its images with no neuron off, as in `Verdict`.
            threshold: τ_image.
        """
        highest = max(before)
        if highest <= threshold:
            return cls(threshold, threshold)
        return cls(highest / 2, (threshold + highest) / 2)

    def excess(self, trial: ImageTrial) -> tuple[float, ...]:
        """For each seed of a trial, how many times the limit its highest similarity is; above 1 it is a copy."""
        remaining = tuple(value / self.remaining for value in trial.remaining)
        if not trial.diversity:
            return remaining
        diversity = (value / self.diversity for value in trial.diversity)
        return tuple(map(max, zip(remaining, diversity, strict=True)))


@dataclass(frozen=True)
class Verdict:
    """Whether a prompt's image comes back with its neurons off (docs/method.md, section 12).

    Attributes:
        threshold: τ_image.
        similarity: the name of the similarity of images, `ImageSimilarity.name`.
        seeds: the seeds of the images.
        steps, guidance: how the images were generated, as in `Sampling`.
        before: for each seed's image of the untouched model, the highest similarity with another seed's.
        final: the images with the neurons of the result off.
        trials: all sets whose images were compared, in the order in which they were tried; `final` is one of them.
        originals_before, originals_after: for each seed, the similarity with the training image, without and with the
            neurons of the result off; None if the training image is not known.
        instead: for each seed, the prompt whose training image appears with the neurons off instead of this prompt's;
            None for a seed that shows none, and None for all of it if no training images are known.
        unet_samples: how many latents the denoiser evaluated for the images. They are part of
            `Localization.unet_samples`.
    """

    threshold: float
    similarity: str
    seeds: tuple[Seed, ...]
    steps: PositiveCount
    guidance: float
    before: tuple[float, ...]
    final: ImageTrial
    trials: tuple[ImageTrial, ...]
    originals_before: tuple[float, ...] | None
    originals_after: tuple[float, ...] | None
    instead: tuple[str | None, ...] | None
    unet_samples: Amount

    @property
    def limits(self) -> Limits:
        """From which similarity on an image of this prompt counts as a copy."""
        return Limits.of(self.before, self.threshold)

    @property
    def replicated(self) -> bool:
        """Whether the untouched model makes the images of two seeds alike."""
        return max(self.before) > self.threshold

    @property
    def copies(self) -> int:
        """The number of seeds whose image is still alike another seed's, with the neurons of the result off."""
        return sum(excess > 1 for excess in self.limits.excess(self.final))

    @property
    def silenced(self) -> bool:
        """Whether no seed's image still replicates."""
        return self.copies == 0

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on besides the prompt. `Localization` has the same fields and describes them."""

    threshold: float
    search: str
    protocol: Protocol
    seeds: int
    layers: tuple[str, ...]
    model: str
    statistics: str
    verification: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Localization:
    """The result for one prompt, with all settings and the certificate.

    Attributes:
        prompt: the text.
        memorized: whether the score of any seed is above τ, or, with verification, the images of two seeds are alike.
            If not, nothing was searched: there are no neurons, and the fields of the search are None.
        score_before: the prompt's score, the highest similarity between the δ of two seeds (docs/method.md, section 5).
        score_after: the remaining memorization with `neurons` off (docs/method.md, section 7).
        floor: the remaining memorization with all searched neurons off. None if it was not measured: the protocol does
            not ask for it, or the grouped search did not need it.
        threshold: the requested τ.
        threshold_used: the τ that the search used. It is higher than `threshold` if that could not be reached.
        notes: sentences that explain why τ was raised; empty if it was not.
        theta, top_k: θ and k of the initial selection; None if the set was found by the images, among all neurons.
        initial_neurons: the neurons of the initial selection.
        neurons: the neurons that carry the image.
        kept_seeds: the seeds whose score is above τ, counted from 0.
        unet_samples: the number of latents that the denoiser has evaluated for this result. A run through a part of the
            denoiser counts as that part's share of FLOPs. The calls that find these shares and the batch size, once per
            `Localizer`, are not counted.
        seconds: the wall time. Runs with the same batch size differ in this field alone.
        certificate: the certificate of `neurons`.
        search: "grouped" or "exhaustive".
        protocol: how the prompt was measured and searched.
        seeds: S, the number of seeds.
        layers: the searched value layers, in network order.
        similarity_scales: M, the number of scales of the similarity.
        model: `model_fingerprint` of the model that was searched.
        statistics: `ActivationStatistics.digest()` of the statistics.
        history: the trials of the search at the first step, in order: how many neurons were off, and the remaining
            memorization of the seeds that the trial looked at, which the grouped search does not ask all of. A trial
            ends early if it is above its threshold, so that a value above it can be a lower bound.
        verification: the settings of the verification (`Verification.to_dict`); None: the images were not checked.
        verdict: what the images show; None if they were not checked.
        label: how the list of prompts labels this one, such as "VM" or "TM"; None if it does not. No measurement
            depends on it.
    """

    prompt: str
    memorized: bool
    score_before: float
    score_after: float | None
    floor: float | None
    threshold: float
    threshold_used: float | None
    notes: tuple[str, ...]
    theta: float | None
    top_k: Count | None
    initial_neurons: NeuronSet
    neurons: NeuronSet
    kept_seeds: tuple[Count, ...]
    unet_samples: Amount
    seconds: Amount
    certificate: Certificate | None
    search: str
    protocol: Protocol
    seeds: PositiveCount
    layers: tuple[str, ...]
    similarity_scales: PositiveCount
    model: str
    statistics: str
    history: tuple[tuple[Count, float], ...] = ()
    verification: Mapping[str, Any] | None = None
    verdict: Verdict | None = None
    label: str | None = None

    @property
    def below_threshold(self) -> bool:
        """Whether the remaining memorization at the first step is at most the requested τ, and not only a raised one.

        That does not mean that the image no longer comes back, see `verified`.
        """
        return self.score_after is not None and self.score_after <= self.threshold

    @property
    def verified(self) -> bool | None:
        """Whether the image no longer comes back with the neurons off; None if nobody checked, or nothing to check."""
        return self.verdict.silenced if self.verdict is not None and self.memorized else None

    @property
    def missed_by_first_step(self) -> bool:
        """Whether the images of different seeds are alike although the score at the first step is not above τ."""
        return self.memorized and self.score_before <= self.threshold

    @property
    def settings(self) -> Settings:
        """The settings that the result depends on, besides the prompt."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("initial_neurons", "neurons", "protocol"):
            values[name] = values[name].to_dict()
        for name in ("notes", "kept_seeds", "layers"):
            values[name] = list(values[name])
        values["certificate"] = None if self.certificate is None else self.certificate.to_dict()
        values["verdict"] = None if self.verdict is None else self.verdict.to_dict()
        values["history"] = [list(trial) for trial in self.history]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Localization:
        """Make a localization from a dictionary of `to_dict`.

        The fields with a default may be missing, because results of version 0.1 lack them.

        Raises:
            NemoError: another field is missing, a field is unknown or has a value of another type or out of range, or
                two fields do not fit together.
        """
        found = restored(cls, values)
        for fault in (*_faults(found), *(() if found.verdict is None else _faults_of_verdict(found.verdict))):
            raise NemoError(fault)
        return found


def _faults(found: Localization) -> Iterator[str]:
    """The fields of a result that do not fit together; what works with results relies on them."""
    if found.memorized and found.score_after is None:
        yield "score_after is missing, although the prompt is memorized"
    if any(seed >= found.seeds for seed in found.kept_seeds):
        yield f"kept_seeds: wanted seeds from 0 to {found.seeds - 1}, got {max(found.kept_seeds)}"
    for name, neurons in (("neurons", found.neurons), ("initial_neurons", found.initial_neurons)):
        for layer in neurons.layers:
            if layer not in found.layers:
                yield f"{name}: '{layer}' is not one of the searched layers"


def _faults_of_verdict(verdict: Verdict) -> Iterator[str]:
    """The fields of a verdict that do not fit together: most have a value for each seed, and no limit is 0."""
    seeds = len(verdict.seeds)
    if seeds < 2:
        yield f"verdict.seeds: wanted two seeds or more, got {seeds}"
    of_each_seed = {
        "before": verdict.before,
        "final.remaining": verdict.final.remaining,
        "final.diversity": verdict.final.diversity,
        "originals_before": verdict.originals_before,
        "originals_after": verdict.originals_after,
        "instead": verdict.instead,
    }
    for name, values in of_each_seed.items():
        if values is not None and len(values) != seeds:
            yield f"verdict.{name}: wanted a value for each of {seeds} seeds, got {len(values)}"
    for number, trial in enumerate(verdict.trials):
        if not trial.remaining or len(trial.diversity) not in (0, len(trial.remaining)):
            yield f"verdict.trials[{number}]: wanted values of remaining, and as many of diversity or none"
    if 0 in (verdict.limits.remaining, verdict.limits.diversity):
        yield f"verdict.threshold: no image is more alike than a limit of 0, got {verdict.threshold:g}"
