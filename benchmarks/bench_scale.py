"""Measures what several ranks gain over one, and what larger batches gain over smaller ones.

Run `python benchmarks/bench_scale.py [--device cpu|cuda] [--quick] [--ranks N …] [--prompts N] [--out DIR]`. The ranks
run the jobs on the bundled model, one thread each on a CPU, and time them from the moment that all of them have loaded
the model. Results must be those of one rank. With more ranks than idle cores, nothing can be gained.

Then the bare U-Nets of the bundled model and of Stable Diffusion 1 (sd1.py) run on several numbers of latents. A latent
that takes less time in a larger call is what could be gained if prompts shared calls.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Panel, Row, Run, alternate, measured, parser
from sd1 import TOKENS, initialized, unet_without_weights

from nemo_ext.demo.captions import MEMORIZED, holdout_captions, ordinary_captions
from nemo_ext.demo.run import MODEL, load_demo_pipeline
from nemo_ext.measure.statistics import ActivationStatistics, collect_statistics
from nemo_ext.ranks.ranks import Ranks
from nemo_ext.results.folder import read_results
from nemo_ext.search.localizer import Localizer

#: How many texts the statistics are collected over, per prompt that is localized.
TEXTS = 512
ROUNDS = 3
#: The numbers of latents in a call. A latent takes seconds at Stable Diffusion 1's size on a CPU.
LATENTS = {"demo": (1, 2, 4, 8, 10, 16, 32), "sd1": (1, 2, 4, 8)}


def prompts(count: int) -> list[str]:
    """Return memorized and ordinary captions in turns, because a search takes longer than a score."""
    ordinary = [caption for _, caption in ordinary_captions(count, seed=5)]
    memorized = [what.caption for what in MEMORIZED]
    return [memorized[i // 2 % len(memorized)] if i % 2 else ordinary[i] for i in range(count)]


def job(folder: Path, count: int, device: str) -> None:
    """Do both jobs as a rank. Rank 0 writes how long they took."""
    with Ranks.of_torchrun() as ranks:
        pipe: Any = load_demo_pipeline().to(f"cuda:{ranks.local_rank}" if device == "cuda" else "cpu")
        texts = [caption for _, caption in ordinary_captions(TEXTS * count // 8, seed=2024)]
        seconds = {}
        ranks.meet()
        start = time.perf_counter()
        collected = collect_statistics(pipe, texts, parts=folder / "parts", ranks=ranks)
        seconds["statistics"] = time.perf_counter() - start
        known = collect_statistics(pipe, holdout_captions(texts[:64], 16, seed=2024))
        threshold = json.loads((MODEL / "figures.json").read_text())["scores"]["threshold"]
        localizer = Localizer(pipe, statistics=known, threshold=threshold)
        localizer.localize(prompts(1)[0])  # this finds the entry points of the U-Net
        ranks.meet()
        start = time.perf_counter()
        localizer.localize_many(prompts(count), folder / "results", ranks=ranks)
        seconds["localize"] = time.perf_counter() - start
        if ranks.first:
            collected.save(folder / "statistics.safetensors")
            (folder / "seconds.json").write_text(json.dumps(seconds))
    ranks.leave()


def start(ranks: int, count: int, device: str, folder: Path) -> dict[str, float]:
    """Let torchrun start the ranks; return the seconds of each job."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["--job", str(folder), "--prompts", str(count), "--device", device]
    subprocess.run([*command, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds: dict[str, float] = json.loads((folder / "seconds.json").read_text())
    return seconds


def outcome(folder: Path) -> tuple[list[Any], str]:
    """Return what a run has found, but for times."""
    found = [dataclasses.replace(one, seconds=0.0) for one in read_results(folder / "results")]
    return found, ActivationStatistics.load(folder / "statistics.safetensors").digest()


def measure(counts: Sequence[int], count: int, device: str, rounds: int) -> list[Row]:
    """Run all numbers of ranks in turns, and compare their results."""
    seconds: dict[tuple[str, int], list[float]] = {}
    samples = 0.0
    with tempfile.TemporaryDirectory() as name:
        expected = None
        for number in range(rounds):
            for ranks in counts:
                folder = Path(name) / f"{number}-{ranks}"
                folder.mkdir()
                for what, taken in start(ranks, count, device, folder).items():
                    seconds.setdefault((what, ranks), []).append(taken)
                found = outcome(folder)
                expected = expected or found
                if found != expected:
                    raise AssertionError(f"{ranks} ranks have found something else than {counts[0]}")
                samples = sum(one.unet_samples for one in found[0])
    rows = []
    for (what, ranks), taken in seconds.items():
        alone = statistics.median(seconds[what, counts[0]])
        median = statistics.median(taken)
        units = {"statistics": TEXTS * count // 8, "localize": count}[what]
        row: Row = {
            "what": what,
            "ranks": ranks,
            "latents": "",
            "prompts": units,
            "median_ms": 1e3 * median,
            "rounds": rounds,
        }
        row |= {"prompts_per_second": units / median, "over_single": alone / median}
        rows.append(row | ({"samples": samples} if what == "localize" else {}))
    return rows


@torch.inference_mode()
def measure_batches(which: str, device: str, quick: bool) -> list[Row]:
    """Call a bare U-Net on several numbers of latents, in turns."""
    if which == "demo":
        unet: Any = load_demo_pipeline().unet
    else:
        unet = initialized(unet_without_weights(4, 16) if quick else unet_without_weights())
    unet = unet.to(device)

    def call(latents: int) -> Any:
        size = unet.config.sample_size
        noise = torch.zeros(latents, unet.config.in_channels, size, size, device=device)
        hidden = torch.zeros(latents, TOKENS, unet.config.cross_attention_dim, device=device)
        return unet(noise, 999, encoder_hidden_states=hidden)

    counts = LATENTS[which][:2] if quick else LATENTS[which]
    # A call at Stable Diffusion 1's size takes much longer on a CPU than warming up.
    slow = which == "sd1" and device == "cpu"
    times = alternate(
        {str(count): partial(call, count) for count in counts},
        device=device,
        rounds=1 if slow or quick else 5,
        warm_up=not slow,
    )
    rows = []
    for count, columns in zip(counts, measured(times).values(), strict=True):
        row: Row = {"what": f"U-Net, {which}", "ranks": 1, "latents": count, **columns}
        row["ms_per_latent"] = row["median_ms"] / count
        row["over_single"] = rows[0]["ms_per_latent"] / row["ms_per_latent"] if rows else 1.0
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of ranks (default: 1 2)"
    )
    options.add_argument("--prompts", type=int, default=16, metavar="N", help="prompts to localize (default: 16)")
    options.add_argument("--job", type=Path, metavar="DIR", help="for the ranks only: the folder that they share")
    if "--job" in sys.argv:
        arguments = options.parse_args()
        job(arguments.job, arguments.prompts, arguments.device)
        return
    run = Run(
        "bench_scale",
        options,
        keys=("what", "ranks", "latents"),
        shown=("prompts", "median_ms", "prompts_per_second", "ms_per_latent", "over_single", "samples"),
    )
    count, rounds = (2, 1) if run.quick else (run.arguments.prompts, ROUNDS)
    for row in measure(run.arguments.ranks, count, run.device, rounds):
        run.add(row)
    of_ranks = list(run.rows)
    for which in LATENTS:
        for row in measure_batches(which, run.device, run.quick):
            run.add(row)
    of_batches = run.rows[len(of_ranks) :]
    run.finish(
        [
            Panel("prompts per second", of_ranks, x="ranks", y="prompts_per_second", series="what"),
            Panel("a latent over one alone", of_batches, x="latents", y="over_single", series="what"),
        ]
    )


if __name__ == "__main__":
    main()
