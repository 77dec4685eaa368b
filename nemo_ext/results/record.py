"""The result for one prompt and its certificate, with conversion to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.neurons import NeuronSet


@dataclass(frozen=True)
class NeuronScore:
    """The remaining memorization with one neuron of a set on again, and the other neurons of the set off.

    Attributes:
        layer, index: the neuron.
        score: the remaining memorization. If it is τ or more, it is the similarity of the kept seeds that were measured
            until one of them reached τ, so the other seeds can have a higher one.
    """

    layer: str
    index: int
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
            guided search guarantees it. The others do not, because a neuron that is needed when it is
            tried can become superfluous later.
    """

    threshold: float
    score: float
    each_on: tuple[NeuronScore, ...]
    below_threshold: bool
    minimal: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON."""
        return {**asdict(self), "each_on": [asdict(row) for row in self.each_on]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """Make a certificate from a dictionary of `to_dict`."""
        return cls(**{**values, "each_on": tuple(NeuronScore(**row) for row in values["each_on"])})


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


@dataclass(frozen=True)
class Localization:
    """The result for one prompt, with all settings and the certificate.

    Attributes:
        prompt: the text.
        memorized: whether the score of any seed is above τ. If not, nothing was searched: there are no neurons, and the
            fields of the search are None.
        score_before: the prompt's score, the highest similarity between the δ of two seeds (docs/method.md, section 5).
        score_after: the remaining memorization with `neurons` off (docs/method.md, section 7).
        floor: the remaining memorization with all searched neurons off. None if it was not measured: the protocol does
            not ask for it, or a guided search has reached the threshold.
        threshold: the requested τ.
        threshold_used: the τ that the search used. It is higher than `threshold` if that could not be reached.
        notes: sentences that explain why τ was raised; empty if it was not.
        theta, top_k: θ and k of the initial selection; None in a guided search, which has no initial selection.
        initial_neurons: the neurons of the initial selection; empty in a guided search.
        neurons: the neurons that carry the image.
        kept_seeds: the seeds whose score is above τ, counted from 0.
        unet_samples: the number of latents that the denoiser has evaluated for this result. A run through a part of the
            denoiser counts as that part's share of FLOPs. The calls that find these shares and the batch size, once per
            `Localizer`, are not counted.
        seconds: the wall time. Runs with the same batch size differ in this field alone.
        certificate: the certificate of `neurons`.
        search: "exhaustive", "grouped" or "guided".
        protocol: how the prompt was measured and searched.
        seeds: S, the number of seeds.
        layers: the searched value layers, in network order.
        similarity_scales: M, the number of scales of the similarity.
        model: `model_fingerprint` over the layers of the statistics.
        statistics: `ActivationStatistics.digest()` of the statistics.
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
    top_k: int | None
    initial_neurons: NeuronSet
    neurons: NeuronSet
    kept_seeds: tuple[int, ...]
    unet_samples: float
    seconds: float
    certificate: Certificate | None
    search: str
    protocol: Protocol
    seeds: int
    layers: tuple[str, ...]
    similarity_scales: int
    model: str
    statistics: str

    @property
    def silenced(self) -> bool:
        """Whether the remaining memorization is at most the requested τ, and not only a raised one."""
        return self.score_after is not None and self.score_after <= self.threshold

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
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Localization:
        """Make a localization from a dictionary of `to_dict`.

        Raises:
            NemoError: a field is missing or unknown, or has a wrong type.
        """
        try:
            restored = dict(values)
            for name in ("initial_neurons", "neurons"):
                restored[name] = NeuronSet.from_dict(values[name])
            for name in ("notes", "kept_seeds", "layers"):
                restored[name] = tuple(values[name])
            restored["protocol"] = Protocol.from_dict(values["protocol"])
            if values["certificate"] is not None:
                restored["certificate"] = Certificate.from_dict(values["certificate"])
            return cls(**restored)
        except (KeyError, TypeError) as error:
            raise NemoError(f"not a localization: {error}") from error
