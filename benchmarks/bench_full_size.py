"""Measures time and peak memory of the whole way at Stable Diffusion 1's size: statistics, a score, and one search.

Run `python benchmarks/bench_full_size.py [--device cpu|cuda] [--quick] [--threads N] [--dtype DTYPE] [--out DIR]`. The
weights are random but for some planted neurons (sd1.py), so that there is something to find; so the number of trials
says nothing about Stable Diffusion, but the time of each and the memory do. `unet` is the bare U-Net on as many latents
as the score has. With `--quick` the model has a quarter of the channels, of the height and of the width. Each side runs
in a process of its own. What the search keeps of earlier trials must fit into the memory that it promises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Panel, Row, Run, alternate, measured, parser, peak_memory
from sd1 import pipeline, plant

from nemo_ext.demo.captions import ordinary_captions
from nemo_ext.measure.activations import encode_prompts
from nemo_ext.measure.score import memorization_score
from nemo_ext.measure.statistics import collect_statistics
from nemo_ext.models.layers import value_layers
from nemo_ext.neurons import NeuronSet
from nemo_ext.search.localizer import Localizer
from nemo_ext.search.runs import CACHE_BYTES

#: The places of the layers with planted neurons, and the neurons in each.
LAYERS, NEURONS = (0, 1, 3), (3, 11)
#: Lower than the score of the planted prompt, and higher than that of others.
THRESHOLD = 0.3
PROMPTS = 32
MIB = 2**20


def captions() -> tuple[str, list[str]]:
    """Return the caption that is planted, and ordinary ones."""
    first, *others = (caption for _, caption in ordinary_captions(2 * PROMPTS + 1, seed=2024))
    return first, others


def seeds(quick: bool) -> int:
    return 2 if quick else 4


def load(device: str, dtype: str, quick: bool) -> Any:
    """Return the pipeline, without planted neurons."""
    size = {"narrower": 4, "latent_size": 16} if quick else {}
    return pipeline(getattr(torch, dtype), **size).to(device)


def model(*which: Any) -> tuple[float, Row]:
    """Make the pipeline and do nothing with it. The other sides' memory is compared with this."""
    start = time.perf_counter()
    pipe = load(*which)
    seconds = time.perf_counter() - start
    return seconds, {"neurons": sum(layer.out_features for layer in value_layers(pipe).values())}


def stats(*which: Any) -> tuple[float, Row]:
    """Collect statistics."""
    pipe, (_, others) = load(*which), captions()
    start = time.perf_counter()
    collect_statistics(pipe, others[:PROMPTS])
    return time.perf_counter() - start, {"prompts": PROMPTS}


def score(device: str, dtype: str, quick: bool) -> tuple[float, Row]:
    """Measure the score of a prompt, and alternate with the bare U-Net on as many latents."""
    pipe, (prompt, _) = load(device, dtype, quick), captions()
    count, unet = seeds(quick), pipe.unet
    hidden = encode_prompts(pipe, [prompt]).hidden.expand(count, -1, -1)
    latents = torch.randn(count, 4, *2 * (unet.config.sample_size,), dtype=unet.dtype, device=device)

    @torch.no_grad()
    def bare() -> None:
        unet(latents, 981, hidden)

    calls = {"unet": bare, "score": lambda: memorization_score(pipe, prompt, seeds=count)}
    rows = measured(alternate(calls, device=device, rounds=3), baselines=["unet"])
    return rows["score"]["median_ms"] / 1e3, {"prompts": 1, "samples": count, "rows": rows}


def search(device: str, dtype: str, quick: bool) -> tuple[float, Row]:
    """Plant neurons for a prompt and search for them, without verification on images."""
    pipe, (prompt, others) = load(device, dtype, quick), captions()
    names = list(value_layers(pipe))
    plant(pipe, prompt, others[:PROMPTS], NeuronSet({names[place]: NEURONS for place in LAYERS}))
    statistics = collect_statistics(pipe, others[PROMPTS:])
    localizer = Localizer(pipe, statistics=statistics, threshold=THRESHOLD, seeds=seeds(quick), verify=None)
    start = time.perf_counter()
    found = localizer.localize(prompt)
    seconds = time.perf_counter() - start
    assert found.memorized, f"the planted prompt has a score of {found.score_before}, which must be above {THRESHOLD}"
    assert found.score_after is not None
    assert found.score_after < THRESHOLD
    return seconds, {"prompts": 1, "samples": found.unet_samples, "found": len(found.neurons)}


SIDES: dict[str, Callable[..., tuple[float, Row]]] = {
    function.__name__: function for function in (model, stats, score, search)
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the weights (default: float32; bfloat16 is slow on a CPU without instructions for it)",
    )
    run = Run(
        "bench_full_size",
        options,
        keys=("what", "model", "dtype"),
        shown=("median_ms", "over_unet", "prompts", "samples", "peak_mib", "above_model_mib"),
    )
    dtype = run.arguments.dtype
    own = {"model": "quarter" if run.quick else "sd1", "dtype": dtype}
    peaks: dict[str, float] = {}
    for what, side in SIDES.items():
        peak, (seconds, figures) = peak_memory(side, run.device, dtype, run.quick, device=run.device)
        peaks[what] = peak / MIB
        rows = figures.pop("rows", {what: {"median_ms": 1e3 * seconds}})
        memory = {"peak_mib": peaks[what], "above_model_mib": peaks[what] - peaks["model"]}
        for name, row in rows.items():
            run.add({"what": name, **own, **row, **(figures | memory if name == what else {})})
    kept = peaks["search"] - peaks["score"]
    if kept > CACHE_BYTES / MIB:
        raise AssertionError(f"the search needs {kept:.0f} MiB more than a score, but may keep {CACHE_BYTES / MIB:.0f}")
    run.finish([Panel("time", run.rows, x="what"), Panel("peak memory", run.rows, x="what", y="peak_mib")])


if __name__ == "__main__":
    main()
