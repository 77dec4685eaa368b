"""From a prompt to the neurons that carry its image: the whole search, for one prompt or for many."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.layers import ValueStack, evaluating, value_layers
from nemo_ext.memory import keep_freed_memory
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching import patched
from nemo_ext.progress import Progress, ProgressLike, open_progress
from nemo_ext.refinement import Refinement, certify, refine_exhaustive, refine_guided
from nemo_ext.results.folder import ResultsFolder
from nemo_ext.results.record import Localization
from nemo_ext.scoring import NoiseProbe, Protocol, Threshold, check_unet, fitting_batch_size
from nemo_ext.selection import initial_selection
from nemo_ext.stages import Stages, is_compiled
from nemo_ext.statistics import ActivationStatistics, check_prompts, encode_prompts

SEARCHES = ("exhaustive", "guided")


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
            out: folder for the results, one line for each prompt, written as soon as it is found
                (`nemo_ext.results.folder`); None: nothing is written.
            resume: take prompts that the folder already has from there. False: it is begun anew.
            progress: see `nemo_ext.progress`.

        Returns:
            One result for each prompt, in the order of `prompts`.

        Raises:
            NemoError: the folder's results were made with other settings, another process writes to it, or as for
                `localize`.
        """
        texts = check_prompts(prompts)
        known: dict[str, Localization] = {}
        with ExitStack() as stack:
            writer = None
            if out is not None:
                writer = stack.enter_context(ResultsFolder(out).writing(anew=not resume))
                for found in writer.kept:
                    self._check_settings(found, writer.path)
                known = {found.prompt: found for found in writer.kept}
            bars = stack.enter_context(open_progress(progress))
            advance = stack.enter_context(bars.task("prompts", len(texts)))
            for text in texts:
                if text not in known:
                    known[text] = self.localize(text, bars)
                    if writer is not None:
                        writer.append(known[text])
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
