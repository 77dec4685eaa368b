"""The whole evaluation: images before, after and with random neurons off, and everything that is measured on them."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.alignment import WHERE_FROM as CLIP_WHERE_FROM
from nemo_ext.evaluate.alignment import PromptAlignment
from nemo_ext.evaluate.diversity import seed_similarity
from nemo_ext.evaluate.images import ImageMaker, write_image
from nemo_ext.evaluate.plan import Plan
from nemo_ext.evaluate.quality import FeatureNetwork, distances, load_feature_network
from nemo_ext.evaluate.replication import OriginalComparison, load_pdq, same_seed_similarity
from nemo_ext.evaluate.table import Evaluation, OrdinaryEvaluation, PromptEvaluation, StageMeasures
from nemo_ext.measure.generation import Sampling
from nemo_ext.measure.image_similarity import ImageSimilarity, PixelSimilarity
from nemo_ext.measure.originals import Originals
from nemo_ext.measure.statistics import ActivationStatistics
from nemo_ext.models.state import model_fingerprint
from nemo_ext.models.text import check_prompts
from nemo_ext.neurons import NeuronSet
from nemo_ext.progress import ProgressLike, nothing, open_progress
from nemo_ext.ranks.parts import digest_of
from nemo_ext.ranks.ranks import Ranks
from nemo_ext.results.folder import ORIGINAL, ResultsFolder
from nemo_ext.results.record import Localization
from nemo_ext.torch_state import plain_torch

if TYPE_CHECKING:
    from PIL.Image import Image


@plain_torch()
def evaluate_results(
    pipe: Any,
    results: Sequence[Localization],
    *,
    originals: Originals | None = None,
    similarity: ImageSimilarity | None = None,
    sampling: Sampling | None = None,
    draws: int = 3,
    ordinary: Sequence[str] = (),
    clip: str | os.PathLike[str] | PromptAlignment | None = None,
    inception: str | os.PathLike[str] | FeatureNetwork | None = None,
    statistics: ActivationStatistics | None = None,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int = 4,
    progress: ProgressLike = None,
) -> Evaluation:
    """Measure on images what the found neurons do, with the measures of the paper (docs/reproduce.md).

    For each memorized prompt, images of several seeds are generated with no neuron off (before), with the found neurons
    off (after), and with as many random neurons of the same layers off (control).

    Args:
        pipe: the pipeline that the results belong to. Neurons that a patch has switched off are on meanwhile.
            Afterwards the pipeline is exactly as it was before.
        results: the results of a search, in the order of results.jsonl.
        originals: the training images; None: nothing is compared with them.
        similarity: how alike two images are; None: `PixelSimilarity()`. The paper uses SSCD.
        sampling: seeds, steps and guidance; None: 10 seeds, 50 steps and guidance 7, as in the paper. The scheduler is
            that of the model family for few steps, which is DDIM for Stable Diffusion.
        draws: the number of random sets of neurons for each prompt; 0: no control.
        ordinary: prompts that are not memorized. One image of each is generated with no neuron off, with the union of
            all found neurons off, and with as many random ones off.
        clip: the folder of a CLIP model, or the loaded model; None: no alignment.
        inception: FID's Inception network, a TorchScript file or loaded; None: EfficientNet-lite0 if it is installed.
        statistics: the statistics of the search, with which the results' model is recognized. They are needed only if
            they have other layers than were searched.
        folder: the folder of the results. Images are stored there, and reused if they exist with the same settings.
            None: nothing is written.
        batch_size: the number of images in one call of the pipeline.
        progress: as for `nemo_ext.progress.open_progress`.

    Returns:
        The evaluation. `Evaluation.save` writes its tables.

    Raises:
        NemoError: no result is memorized, the results belong to another model, no training image belongs to a result, a
            file cannot be read, or the images are not finite.
    """
    started = time.perf_counter()
    check_prompt_sets(results, originals, ordinary)
    memorized = [(index, found) for index, found in enumerate(results) if found.memorized]
    check_model(pipe, [found for _, found in memorized], statistics)
    if draws < 0 or batch_size < 1:
        raise NemoError(f"draws must be 0 or more and batch_size 1 or more, got {draws} and {batch_size}")
    prompts = check_prompts(ordinary) if ordinary else []
    sampling = (sampling or Sampling(seeds=10, steps=50, guidance=7.0)).resolved(pipe)
    tools = _Tools(similarity or PixelSimilarity(), originals, clip, inception, bool(prompts))
    images = len(memorized) * (2 + draws) * sampling.seeds + 3 * len(prompts)
    with open_progress(progress) as bars, bars.task("images", images) as advance:
        maker = ImageMaker(pipe, sampling, batch_size=batch_size, stored=folder is not None, advance=advance)
        stored = None if folder is None else ResultsFolder(folder)
        run = _Run(maker, tools, Plan(pipe, sampling.all_seeds, draws, stored), stored)
        evaluated = tuple(run.prompt(index, found) for index, found in memorized)
        union = NeuronSet.union(found.neurons for _, found in memorized)
        on_ordinary = run.ordinary(prompts, union, batch_size) if prompts else None
    assert sampling.guidance is not None
    return Evaluation(
        prompts=evaluated,
        not_memorized=len(results) - len(memorized),
        ordinary=on_ordinary,
        similarity=tools.similarity.name,
        short_similarity=tools.similarity.name.split()[0],
        model=memorized[0][1].model,
        seeds=sampling.all_seeds,
        steps=sampling.steps,
        guidance=sampling.guidance,
        scheduler=maker.scheduler,
        draws=draws,
        omitted=tools.omitted,
        seconds=time.perf_counter() - started,
        reused_images=maker.reused,
    )


def check_model(pipe: Any, results: Sequence[Localization], statistics: ActivationStatistics | None) -> None:
    """Check that results belong to a pipeline, by the fingerprint that the search has stored.

    Raises:
        NemoError: they belong to another model, or the statistics do.
    """
    if statistics is not None:
        statistics.check(pipe)
    actual = model_fingerprint(pipe)
    if any(found.model != actual for found in results):
        raise NemoError(
            "the results belong to another model, or to the same model in another precision: load the model that "
            "`nemo-ext localize` searched"
        )


def check_prompt_sets(results: Sequence[Localization], originals: Originals | None, ordinary: Sequence[str]) -> None:
    """Check that the prompts of results, training images and ordinary prompts fit together.

    Raises:
        NemoError: no result is memorized, none of the memorized prompts has a training image, or one of them is among
            the ordinary prompts.
    """
    memorized = {found.prompt for found in results if found.memorized}
    if not memorized:
        raise NemoError(f"none of the {len(results)} results is memorized, so there is nothing to evaluate")
    if originals is not None and not memorized & set(originals):
        raise NemoError(
            f"none of the {len(originals)} prompts with originals is among the {len(memorized)} memorized prompts "
            "of the results: their texts must be equal, letter by letter"
        )
    if both := memorized & set(ordinary):
        raise NemoError(
            f"'{min(both)}' is a memorized prompt of the results and an ordinary prompt: remove it from one"
        )


class _Tools:
    """Everything that measures images, loaded before the first image is generated; and what is missing, and why."""

    def __init__(
        self,
        similarity: ImageSimilarity,
        originals: Originals | None,
        clip: str | os.PathLike[str] | PromptAlignment | None,
        inception: str | os.PathLike[str] | FeatureNetwork | None,
        ordinary: bool,
    ) -> None:
        self.similarity = similarity
        self.originals = originals
        self.omitted: dict[str, str] = {}
        short = similarity.name.split()[0]
        if short != "SSCD":
            self.omitted["SSCD"] = f"there is no SSCD without its model file; {short} takes its place"
        self.comparison: OriginalComparison | None = None
        if originals is None:
            self.omitted[f"{short}_orig"] = "nothing is compared with training images, because none were given"
        else:
            pdq = load_pdq()
            if pdq is None:
                self.omitted["PDQ distance"] = (
                    "there is no PDQ distance without the package pdqhash: install it with pip"
                )
            self.comparison = OriginalComparison(originals, similarity, pdq)
        self.clip = clip if isinstance(clip, PromptAlignment) or clip is None else PromptAlignment(clip)
        if self.clip is None:
            self.omitted["CLIP alignment"] = f"there is no alignment without {CLIP_WHERE_FROM}"
        self.network: FeatureNetwork | None = None
        if not ordinary:
            self.omitted["FID"] = "there is no distance of ordinary images without ordinary prompts"
        else:
            network = inception if isinstance(inception, FeatureNetwork) else load_feature_network(inception)
            if isinstance(network, str):
                self.omitted["FID"] = network
            else:
                self.network = network
                if network.frechet != "FID":
                    self.omitted["FID"] = (
                        f"there is no FID without FID's Inception network; {network.frechet} takes its place"
                    )


@plain_torch()
def generate_shared(
    pipe: Any,
    results: Sequence[Localization],
    *,
    sampling: Sampling,
    draws: int,
    ordinary: Sequence[str],
    folder: str | os.PathLike[str],
    batch_size: int,
    ranks: Ranks,
    progress: ProgressLike = None,
) -> None:
    """Generate the images of an evaluation with several ranks (docs/scale.md). `evaluate_results` then reads them.

    Args:
        pipe, results, sampling, draws, ordinary, folder, batch_size, progress: as for `evaluate_results`.
        ranks: the ranks, all of which make this call with the same arguments.

    Raises:
        NemoError: a rank has other arguments or is lost, or the images are not finite.
    """
    sampling = sampling.resolved(pipe)
    ranks.agree(
        {
            "model": model_fingerprint(pipe),
            "way to generate": str(sampling),
            "list of results": digest_of([f"{found.prompt} {found.neurons}" for found in results]),
            "list of ordinary prompts": digest_of(ordinary),
        }
    )
    plan = Plan(pipe, sampling.all_seeds, draws, ResultsFolder(folder))
    memorized = [(index, found) for index, found in enumerate(results) if found.memorized]
    # All stages of a prompt are one unit, because one file has the settings of all of them.
    units = [plan.of_prompt(index, found) for index, found in memorized]
    units += plan.of_ordinary(ordinary, NeuronSet.union(found.neurons for _, found in memorized), batch_size)
    with open_progress(progress) as bars, bars.task("images of prompts", len(units)) as advance:
        maker = ImageMaker(pipe, sampling, batch_size=batch_size, stored=True, advance=nothing)
        for stages in ranks.units(units, advance):
            for stage in stages:
                maker.make(stage)


class _Run:
    """Generates and measures, prompt by prompt, so that only one prompt's images are in memory."""

    def __init__(self, maker: ImageMaker, tools: _Tools, plan: Plan, folder: ResultsFolder | None) -> None:
        self._maker, self._tools, self._plan, self._folder = maker, tools, plan, folder

    def prompt(self, index: int, found: Localization) -> PromptEvaluation:
        """Evaluate one memorized prompt; `index` is its position in results.jsonl."""
        originals = self._tools.originals
        if self._folder is not None and originals is not None and found.prompt in originals:
            write_image(self._folder.images_folder(index, found.prompt) / ORIGINAL, originals[found.prompt][0])
        untouched: Any = None
        stages = []
        for stage in self._plan.of_prompt(index, found):
            images = self._maker.make(stage)
            described = self._tools.similarity.describe(images)
            stages.append(self._measure(found.prompt, images, described, untouched, len(stage.neurons)))
            untouched = described if untouched is None else untouched
        return PromptEvaluation(
            index=index,
            prompt=found.prompt,
            label=found.label if originals is None else originals.labels.get(found.prompt, found.label),
            verified=found.verified,
            before=stages[0],
            after=stages[1],
            controls=tuple(stages[2:]),
        )

    def _measure(
        self, prompt: str, images: Sequence[Image], described: Any, untouched: Any, neurons: int
    ) -> StageMeasures:
        tools = self._tools
        return StageMeasures(
            neurons=neurons,
            seed_similarity=seed_similarity(tools.similarity, described),
            originals=None if tools.comparison is None else tools.comparison.compare(prompt, images, described),
            same_seed=None if untouched is None else same_seed_similarity(tools.similarity, untouched, described),
            alignment=None if tools.clip is None else tools.clip.measure(prompt, images),
        )

    def ordinary(self, prompts: Sequence[str], union: NeuronSet, batch_size: int) -> OrdinaryEvaluation:
        """Evaluate the union of all found neurons on ordinary prompts, with one seed for each prompt."""
        tools = self._tools
        same_seed, alignment, features = (defaultdict[str, list[Any]](list) for _ in range(3))
        off: dict[str, int] = {}
        for stages in self._plan.of_ordinary(prompts, union, batch_size):
            untouched: Any = None
            for stage in stages:
                images = self._maker.make(stage)
                described = tools.similarity.describe(images)
                untouched = described if untouched is None else untouched
                off[stage.name] = len(stage.neurons)
                same_seed[stage.name] += same_seed_similarity(tools.similarity, untouched, described)
                if tools.clip is not None:
                    for (prompt, _, _), image in zip(stage.wanted, images, strict=True):
                        alignment[stage.name] += tools.clip.measure(prompt, [image])
                if tools.network is not None:
                    features[stage.name].append(tools.network.describe(images))
        network = tools.network if len(prompts) > 1 else None
        if tools.network is not None and network is None:
            tools.omitted[tools.network.frechet] = "a distance of ordinary images needs two or more ordinary prompts"
        apart = {} if network is None else _apart(features)
        return OrdinaryEvaluation(
            prompts=len(prompts),
            neurons=len(union),
            control_neurons=off["control-1"],
            network=None if network is None else network.name,
            frechet=None if network is None else network.frechet,
            kernel=None if network is None else network.kernel,
            distance_after=apart.get("after"),
            distance_control=apart.get("control-1"),
            same_seed_after=tuple(same_seed["after"]),
            same_seed_control=tuple(same_seed["control-1"]),
            alignment_before=tuple(alignment["before"]) or None,
            alignment_after=tuple(alignment["after"]) or None,
            alignment_control=tuple(alignment["control-1"]) or None,
        )


def _apart(features: dict[str, list[Any]]) -> dict[str, Any]:
    import torch

    joined = {stage: torch.cat(rows) for stage, rows in features.items()}
    return {stage: distances(joined["before"], joined[stage]) for stage in ("after", "control-1")}
