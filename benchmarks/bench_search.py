"""Compares the searches with the published procedure, in U-Net samples and time, on the demo's memorized captions.

Run `python benchmarks/bench_search.py [--prompts N] [--quick] [--threads N] [--out DIR] [--compare CSV]`. `plain` is
the published procedure, in baseline_search.py. `verified` is the grouped search with verification on images, which goes
on if the image still comes back. The searches of a caption run one after the other. Then their results are checked: the
exhaustive search must find the neurons of `plain`, and the plain implementation measures every certificate again.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

from baseline_search import PlainSearch
from harness import Panel, Row, Run, parser, timed

from nemo_ext.demo.captions import EARLY, holdout_captions, ordinary_captions
from nemo_ext.demo.run import MODEL, SAMPLING, STATISTICS_PROMPTS, STATISTICS_TITLES, load_demo_pipeline
from nemo_ext.measure.image_similarity import PixelSimilarity
from nemo_ext.measure.score import image_score
from nemo_ext.measure.statistics import collect_statistics
from nemo_ext.measure.threshold import mean_and_std
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.record import Localization
from nemo_ext.search.localizer import Localizer
from nemo_ext.search.verification import IMAGES, Verification

SEARCHES = ("exhaustive", "grouped")
VERIFIED = "verified"
#: The number of ordinary captions whose images give τ_image.
IMAGE_PROMPTS = 16
#: How much a similarity may differ between two batches by rounding.
ROUNDING = 1e-4


def check(found: Localization, plain: PlainSearch) -> None:
    """Raise an AssertionError if the certificate does not agree with the plain implementation."""
    certificate = found.certificate
    assert certificate is not None
    if found.verdict is not None and found.verdict.final.criterion == IMAGES:
        return  # the first step did not decide
    assert found.threshold_used is not None
    threshold = found.threshold_used  # lower than the requested τ where the verification has lowered it
    score = plain.remaining(found.prompt, found.neurons)
    if not (certificate.below_threshold and score <= threshold + ROUNDING):
        raise AssertionError(f"{found.search}, '{found.prompt}': score {score}, but τ = {threshold}")
    for row in certificate.each_on:
        without = found.neurons - NeuronSet({row.layer: [row.index]})
        with_it_on = plain.remaining(found.prompt, without) if len(without) else 1.0
        if (row.score >= threshold) != (with_it_on >= threshold) or row.score > with_it_on + ROUNDING:
            raise AssertionError(
                f"{found.search}, '{found.prompt}', {row.layer} {row.index}: certificate {row.score}, "
                f"measured {with_it_on}"
            )


def summary(rows: list[Row]) -> list[Row]:
    """Return rows with the totals, and with the medians of the ratios over the captions."""
    found = []
    for what in ("plain", *SEARCHES, VERIFIED):
        of_one = [row for row in rows if row["what"] == what]
        sums = {name: sum(row[name] for row in of_one) for name in ("median_ms", "unet_samples", "neurons")}
        copies = {name: sum(row[name] for row in of_one) for name in ("first_copies", "copies") if name in of_one[0]}
        found.append({"what": what, "caption": "all", **sums, **copies})
        medians = {
            name: statistics.median(row[name] for row in of_one) for name in ("over_plain", "samples_over_plain")
        }
        found.append({"what": what, "caption": "median", **medians})
    plain = found[0]
    for row in found[::2]:
        row["over_plain"] = plain["median_ms"] / row["median_ms"]
        row["samples_over_plain"] = plain["unet_samples"] / row["unet_samples"]
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--prompts", type=int, default=len(EARLY), metavar="N", help="number of captions (default: all)"
    )
    run = Run(
        "bench_search",
        options,
        keys=("what", "caption"),
        shown=(
            *("candidates", "neurons", "unet_samples", "samples_over_plain", "median_ms", "over_plain"),
            *("first_copies", "copies"),
        ),
    )
    pipe: Any = load_demo_pipeline().to(run.device)
    captions = [caption for _, caption in ordinary_captions(STATISTICS_PROMPTS, seed=2024)]
    collected = collect_statistics(pipe, holdout_captions(captions, STATISTICS_TITLES, seed=2024))
    threshold = json.loads((MODEL / "figures.json").read_text())["scores"]["threshold"]
    plain = PlainSearch(pipe, collected, threshold)
    localizers = {
        search: Localizer(pipe, statistics=collected, threshold=threshold, search=search) for search in SEARCHES
    }
    ordinary = [caption for _, caption in ordinary_captions(STATISTICS_PROMPTS + IMAGE_PROMPTS, seed=2024)]
    pixels = PixelSimilarity()
    sampling = replace(SAMPLING, steps=5) if run.quick else SAMPLING
    image_scores = [
        image_score(pipe, caption, sampling, pixels, batch_size=2 * sampling.seeds).max
        for caption in ordinary[STATISTICS_PROMPTS : STATISTICS_PROMPTS + 2 if run.quick else None]
    ]
    verify = Verification(sampling=sampling, similarity=pixels, threshold=sum(mean_and_std(image_scores)))
    localizers[VERIFIED] = Localizer(pipe, statistics=collected, threshold=threshold, search="grouped", verify=verify)
    for localizer in localizers.values():
        localizer.localize("")  # this finds the entry points of the U-Net; there is nothing to search
    chosen = EARLY[14:15] if run.quick else EARLY[: run.arguments.prompts]
    for what in chosen:
        before = plain.unet_samples
        taken, neurons = timed(partial(plain.search, what.caption), run.device)
        rows = {"plain": (taken, neurons, plain.unet_samples - before)}
        images = {}
        results = []
        for search, localizer in localizers.items():
            taken, found = timed(partial(localizer.localize, what.caption), run.device)
            rows[search] = (taken, found.neurons, found.unet_samples)
            if found.verdict is not None:
                first = found.verdict.limits.excess(found.verdict.trials[0])
                images[search] = {"first_copies": sum(one > 1 for one in first), "copies": found.verdict.copies}
            results.append(found)
        candidates = len(results[0].initial_neurons)
        assert rows["exhaustive"][1] == neurons, f"'{what.caption}': {rows['exhaustive'][1]} instead of {neurons}"
        for found in results:
            check(found, plain)
        for name, (taken, neurons, samples) in rows.items():
            run.add(
                {
                    "what": name,
                    "caption": what.name,
                    "candidates": candidates,
                    "neurons": len(neurons),
                    "unet_samples": float(samples),
                    "samples_over_plain": rows["plain"][2] / samples,
                    "median_ms": taken,
                    "over_plain": rows["plain"][0] / taken,
                    **images.get(name, {}),
                }
            )
    for row in summary(run.rows):
        run.add(row)
    of_captions = [row for row in run.rows if "candidates" in row]
    run.finish(
        [
            Panel("U-Net samples of a caption", of_captions, x="candidates", y="unet_samples"),
            Panel("time of a caption", of_captions, x="candidates"),
        ]
    )


if __name__ == "__main__":
    main()
