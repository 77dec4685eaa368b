"""From a prompt to the neurons that carry its image: the whole search, for one prompt or for many."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_ext.atomic import replacing
from nemo_ext.errors import NemoError
from nemo_ext.layers import ValueStack, evaluating, value_layers
from nemo_ext.memory import keep_freed_memory
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching import patched
from nemo_ext.progress import Progress, ProgressLike, open_progress
from nemo_ext.refinement import Certificate, Refinement, certify, refine_exhaustive, refine_guided
from nemo_ext.scoring import NoiseProbe, Protocol, Threshold, check_unet, fitting_batch_size
from nemo_ext.selection import initial_selection
from nemo_ext.stages import Stages, is_compiled
from nemo_ext.statistics import ActivationStatistics, check_prompts, encode_prompts

RESULTS = "results.jsonl"
SEARCHES = ("exhaustive", "guided")


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
    def from_dict(cls, values: Mapping[str, Any]) -> "Localization":
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


class Localizer:
    """Finds the neurons of one pipeline that carry memorized images (docs/method.md).

    Leaves the pipeline exactly as it was, patched or not, also after an exception. The same seeds
    give the same neurons, on every run and for any batch size.

    Args:
        pipe: a pipeline (SD1, SD2). Neurons that a patch has switched off are on during the search.
        statistics: μ and σ of this model's activations.
        threshold: τ, as a number or as `memorization_threshold` gave it (then it must be of this
            model, protocol and number of seeds).
        search: "exhaustive", the paper's; or "guided", which ranks all searched neurons by a gradient and bisects: far
            less work, for a set that need not be the paper's.
        protocol: None: `Protocol.paper()`.
        seeds: S ≥ 2.
        batch_size: latents in one U-Net call; None: as for `NoiseProbe`, found out once.
        layers: which layers to search, as for `value_layers`; None: the statistics'.

    Raises:
        NemoError: statistics or a threshold of another model, layers without statistics, or an
            unknown search.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        statistics: ActivationStatistics,
        threshold: float | Threshold,
        search: str = "exhaustive",
        protocol: Protocol | None = None,
        seeds: int = 10,
        batch_size: int | None = None,
        layers: str | Sequence[str] | None = None,
    ) -> None:
        if search not in SEARCHES:
            raise NemoError(f"search must be {' or '.join(map(repr, SEARCHES))}, got '{search}'")
        self.pipe = pipe
        self.statistics = statistics
        self.search = search
        self.protocol = protocol or Protocol.paper()
        self.seeds = seeds
        self.batch_size = batch_size
        self.layers = tuple(value_layers(pipe, statistics.layers if layers is None else layers))
        for layer in self.layers:
            if layer not in statistics.widths:
                raise NemoError(f"the statistics have no layer '{layer}': collect them with these layers")
        statistics.check(pipe)
        if isinstance(threshold, Threshold):
            threshold.check(pipe, self.protocol, seeds)
        self._watched: tuple[Any, Stages | None, int] | None = None
        self.threshold = float(threshold)
        if not -1 <= self.threshold <= 1:
            raise NemoError(f"threshold must be a similarity, from -1 to 1, got {self.threshold}")

    def settings(self) -> dict[str, Any]:
        """What a result depends on besides the prompt, ready for JSON; fields of `Localization`."""
        return {
            "threshold": self.threshold,
            "search": self.search,
            "protocol": self.protocol.to_dict(),
            "seeds": self.seeds,
            "layers": list(self.layers),
            "model": self.statistics.fingerprint,
            "statistics": self.statistics.digest(),
        }

    def localize(self, prompt: str, progress: ProgressLike = None) -> Localization:
        """Find the neurons that carry this prompt's image, if it is memorized.

        Args:
            prompt: the text.
            progress: see `nemo_ext.progress`.

        Raises:
            NemoError: activations or noise that aren't finite, latents too small for the window.
        """
        started = time.perf_counter()
        keep_freed_memory()
        with open_progress(progress) as bars, patched(self.pipe):
            found = self._search(prompt, bars)
        return Localization(
            prompt=prompt,
            seconds=time.perf_counter() - started,
            threshold=self.threshold,
            search=self.search,
            protocol=self.protocol,
            seeds=self.seeds,
            layers=self.layers,
            model=self.statistics.fingerprint,
            statistics=self.statistics.digest(),
            **found,
        )

    def _search(self, prompt: str, bars: Progress) -> dict[str, Any]:
        """The fields of a `Localization` that a search decides."""
        hidden = encode_prompts(self.pipe, [prompt])
        stages, batch_size = self._watch(hidden)
        probe = NoiseProbe(
            self.pipe,
            hidden,
            seeds=self.seeds,
            protocol=self.protocol,
            batch_size=batch_size,
            stages=stages,
        )
        with bars.task("score", self.seeds) as advance:
            score = probe.score().max
            advance(self.seeds)
        kept = probe.keep_above(self.threshold)
        found: dict[str, Any] = {
            "memorized": bool(kept),
            "score_before": score,
            "score_after": None,
            "floor": None,
            "threshold_used": None,
            "notes": (),
            "theta": None,
            "top_k": None,
            "initial_neurons": NeuronSet(),
            "neurons": NeuronSet(),
            "kept_seeds": kept,
            "certificate": None,
            "similarity_scales": probe.scales,
        }
        if kept:
            found |= self._guided(probe, bars) if self.search == "guided" else self._exhaustive(probe, hidden, bars)
        found["unet_samples"] = round(probe.unet_samples, 2)
        return found

    def _exhaustive(self, probe: NoiseProbe, hidden: Tensor, bars: Progress) -> dict[str, Any]:
        """The paper's search: selection by θ and k, then layer by layer and neuron by neuron."""
        stack = ValueStack(value_layers(self.pipe, self.layers))
        activation = {layer: values[0] for layer, values in stack.split(stack.activations(hidden)).items()}
        notes = []
        floor, threshold = None, self.threshold
        if self.protocol.measures_floor:
            floor = probe.remaining(self._everything())
            if floor > threshold:
                threshold = floor + self.protocol.raise_margin
                notes.append(self._floor_note(floor, threshold))
        with bars.task("initial selection") as advance:
            selection = initial_selection(
                activation,
                self.statistics,
                probe,
                threshold,
                protocol=self.protocol,
                on_trial=lambda: advance(1),
            )
        if selection.threshold != threshold:
            notes.append(
                f"the initial selection reached {selection.remaining:.3f} and not τ = {threshold:.3f}: "
                f"refined with τ = {selection.threshold:.3f}"
            )
        initial = selection.neurons
        with bars.task("refinement", len(initial.layers) + len(initial)) as advance:
            refinement = refine_exhaustive(
                selection.candidates, probe, selection.threshold, on_trial=lambda: advance(1)
            )
        return {
            **self._certified(refinement, probe, selection.threshold, bars),
            "floor": floor,
            "notes": tuple(notes),
            "theta": selection.theta,
            "top_k": selection.top_k,
            "initial_neurons": initial,
        }

    def _guided(self, probe: NoiseProbe, bars: Progress) -> dict[str, Any]:
        """All searched neurons in the order of their effect, and what of them is needed."""
        widths = {layer: self.statistics.widths[layer] for layer in self.layers}
        pairs = [(layer, index) for layer, width in widths.items() for index in range(width)]

        def ranked(seeds: Sequence[int]) -> list[tuple[str, int]]:
            effects = probe.effects(self.layers, seeds)
            ranks = torch.cat([effects[layer] for layer in self.layers]).sort(descending=True, stable=True).indices
            return [pairs[rank] for rank in ranks.tolist()]

        floor, threshold, notes = None, self.threshold, []
        with bars.task("guided search") as advance:
            refinement = refine_guided(ranked, probe, threshold, on_trial=lambda: advance(1))
            if refinement.remaining > threshold:
                floor = refinement.remaining
                threshold = floor + self.protocol.raise_margin
                notes.append(self._floor_note(floor, threshold))
                refinement = refine_guided(ranked, probe, threshold, on_trial=lambda: advance(1))
        return {
            **self._certified(refinement, probe, threshold, bars),
            "floor": floor,
            "notes": tuple(notes),
        }

    def _everything(self) -> NeuronSet:
        return NeuronSet({layer: range(self.statistics.widths[layer]) for layer in self.layers})

    def _floor_note(self, floor: float, threshold: float) -> str:
        return (
            f"with all {len(self._everything())} searched neurons off the similarity is still {floor:.3f}, "
            f"above τ = {self.threshold:.3f}: searched with τ = {threshold:.3f}"
        )

    def _certified(self, refinement: Refinement, probe: NoiseProbe, threshold: float, bars: Progress) -> dict[str, Any]:
        with bars.task("certificate", len(refinement.neurons)) as advance:
            certificate = certify(refinement.neurons, probe, threshold, on_trial=lambda: advance(1))
        return {
            "score_after": refinement.remaining,
            "threshold_used": threshold,
            "neurons": refinement.neurons,
            "certificate": certificate,
        }

    def _watch(self, hidden: Tensor) -> tuple[Stages | None, int]:
        """Where the U-Net can be entered, and how many latents it is given at once; found out once for each U-Net."""
        unet = self.pipe.unet
        check_unet(unet)
        known = self._watched
        # A U-Net can be compiled in place meanwhile.
        if known is None or known[0] is not unet or is_compiled(unet):
            batch_size = fitting_batch_size(self.pipe, hidden) if self.batch_size is None else self.batch_size
            with evaluating(self.pipe):
                self._watched = known = unet, Stages.of(unet, self.layers, hidden), batch_size
        return known[1:]

    def localize_many(
        self,
        prompts: Sequence[str],
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
        progress: ProgressLike = None,
    ) -> list[Localization]:
        """Localize one prompt after another, keeping every result on disk as soon as it is there.

        Args:
            prompts: texts; one that stands twice is searched once.
            out: folder for `results.jsonl`, one JSON object a line (`Localization.to_dict`),
                replaced as a whole after each prompt; None: nothing is written.
            resume: take prompts that the file already has from there. False: the file is begun anew.
            progress: see `nemo_ext.progress`.

        Returns:
            One result for each prompt, in the order of `prompts`.

        Raises:
            NemoError: the file's results were made with other settings, or as for `localize`.
        """
        texts = check_prompts(prompts)
        known: dict[str, Localization] = {}
        if out is not None and resume and (Path(out) / RESULTS).exists():
            known = {found.prompt: found for found in read_results(out)}
            for found in known.values():
                self._check_settings(found, Path(out) / RESULTS)
        with open_progress(progress) as bars, bars.task("prompts", len(texts)) as advance:
            for text in texts:
                if text not in known:
                    known[text] = self.localize(text, bars)
                    if out is not None:
                        _write_results(Path(out) / RESULTS, list(known.values()))
                advance(1)
        return [known[text] for text in texts]

    def _check_settings(self, found: Localization, path: Path) -> None:
        there = found.to_dict()
        for name, value in self.settings().items():
            if there[name] != value:
                raise NemoError(
                    f"{path} has results with another {name}: {there[name]}, now {value}; choose another "
                    "folder, or resume=False to begin anew"
                )


def read_results(out: str | os.PathLike[str]) -> list[Localization]:
    """The results that `localize_many` wrote to a folder, in the order of the file.

    Args:
        out: the folder, or the file in it.

    Raises:
        NemoError: no such file, or a line that isn't a result.
    """
    path = Path(out) / RESULTS if Path(out).is_dir() else Path(out)
    if not path.is_file():
        raise NemoError(f"{path} does not exist: wanted a folder that localize wrote its results to")
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            results.append(Localization.from_dict(json.loads(line)))
        except (json.JSONDecodeError, NemoError) as error:
            raise NemoError(f"{path}, line {number}, is not a result: {error}") from error
    return results


def _write_results(path: Path, results: Sequence[Localization]) -> None:
    lines = [json.dumps(found.to_dict(), allow_nan=False) + "\n" for found in results]
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def localize(
    pipe: Any,
    prompt: str,
    *,
    statistics: ActivationStatistics,
    threshold: float | Threshold,
    search: str = "exhaustive",
    protocol: Protocol | None = None,
    seeds: int = 10,
    batch_size: int | None = None,
    layers: str | Sequence[str] | None = None,
    progress: ProgressLike = None,
) -> Localization:
    """Find the neurons of a pipeline that carry one prompt's image, if it is memorized.

    For several prompts make one `Localizer`, whose arguments these are, and use it again.

    Args:
        prompt: the text.
        progress: see `nemo_ext.progress`.
    """
    localizer = Localizer(
        pipe,
        statistics=statistics,
        threshold=threshold,
        search=search,
        protocol=protocol,
        seeds=seeds,
        batch_size=batch_size,
        layers=layers,
    )
    return localizer.localize(prompt, progress)
