"""What was found for one prompt, and the certificate that proves it: as values, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.neurons import NeuronSet


@dataclass(frozen=True)
class NeuronScore:
    """Remaining memorization with one neuron of a set on again.

    Attributes:
        layer, index: the neuron.
        score: highest similarity over kept seeds, with all others of the set off. Where it is not below τ it is a
            seed's that shows it, and others' may be higher.
    """

    layer: str
    index: int
    score: float


@dataclass(frozen=True)
class Certificate:
    """What a set of neurons does and whether each of them is needed, measured anew.

    Attributes:
        threshold: the τ that it was searched for.
        score: remaining memorization with the set off.
        each_on: for every neuron of the set, the score with that one on again.
        below_threshold: whether `score` is not above τ.
        minimal: whether every neuron is needed, no `each_on` below τ (1-minimality). The guided search promises it, the
            exhaustive one does not: a neuron kept early can become needless through later ones.
    """

    threshold: float
    score: float
    each_on: tuple[NeuronScore, ...]
    below_threshold: bool
    minimal: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "each_on": [asdict(row) for row in self.each_on]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """The certificate that `to_dict` wrote."""
        return cls(**{**values, "each_on": tuple(NeuronScore(**row) for row in values["each_on"])})


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on besides the prompt; the fields are those of `Localization`."""

    threshold: float
    search: str
    protocol: Protocol
    seeds: int
    layers: tuple[str, ...]
    model: str
    statistics: str


@dataclass(frozen=True)
class Localization:
    """What was found for one prompt, how, and the proof.

    Attributes:
        prompt: the text.
        memorized: whether any seed's score is above τ. If not, nothing was searched: no neurons,
            and None wherever a search would have left a number.
        score_before: the prompt's score, its highest similarity between two seeds.
        score_after: remaining memorization with `neurons` off, the highest similarity over kept
            seeds to the untouched model's δ.
        floor: remaining memorization with all searched neurons off; None where it wasn't measured: by choice of the
            protocol, or by a guided search that found the threshold within reach.
        threshold: τ as asked for.
        threshold_used: τ as searched for: raised where it can't be, or wasn't, reached.
        notes: why τ was raised, in sentences.
        theta, top_k: θ and k of the initial selection; None in a guided search, which has none.
        initial_neurons: the initial selection.
        neurons: the result.
        kept_seeds: the seeds above τ, counted from 0.
        unet_samples: latents that the U-Net has evaluated for all of it; one that went through a part of it counts as
            that part's share of FLOPs. The call that finds these shares, once for a `Localizer`, is not among them.
        seconds: wall time; of runs with the same batch size the only field that differs.
        certificate: the result, measured with each of its neurons on again.
        search: "exhaustive" or "guided".
        protocol: how it was measured and searched.
        seeds: S.
        layers: the value layers searched, in network order.
        similarity_scales: M, the number of scales of the similarity.
        model: `model_fingerprint` over the statistics' layers.
        statistics: `ActivationStatistics.digest()`.
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
        """Whether the neurons bring the remaining memorization to τ itself, and not only to a raised one."""
        return self.score_after is not None and self.score_after <= self.threshold

    @property
    def settings(self) -> Settings:
        """What the result depends on besides the prompt."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("initial_neurons", "neurons", "protocol"):
            values[name] = values[name].to_dict()
        for name in ("notes", "kept_seeds", "layers"):
            values[name] = list(values[name])
        values["certificate"] = None if self.certificate is None else self.certificate.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Localization:
        """The localization that `to_dict` wrote.

        Raises:
            NemoError: a field is missing, unknown, or doesn't hold what it should.
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
