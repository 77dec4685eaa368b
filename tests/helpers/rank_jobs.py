"""What the ranks of `rank_processes` do in tests. The process that they are forked from imports this module once."""

import errno
import os
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from tiny_pipeline import planted_pipeline

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.evaluation import generate_shared
from nemo_ext.measure.generation import Sampling
from nemo_ext.measure.protocol import Protocol
from nemo_ext.measure.statistics import collect_statistics
from nemo_ext.measure.threshold import memorization_threshold
from nemo_ext.ranks import ranks as ranks_module
from nemo_ext.ranks.parts import Parts
from nemo_ext.ranks.ranks import Ranks
from nemo_ext.results.folder import read_results
from nemo_ext.search.localizer import Localizer
from nemo_ext.search.verification import Verification

#: Every seventh one is memorized by the planted pipeline.
PROMPTS = [f"a {'zebra' if place % 7 == 3 else 'camel'} number {place}" for place in range(16)]


def share_units(ranks: Ranks, count: int) -> list[int]:
    """Do units of which the first takes longest, and return this rank's."""
    mine = []
    for unit in ranks.units(range(count), lambda done: None):
        time.sleep(2.0 if unit == 0 else 0.02)
        mine.append(unit)
    return mine


def do_nothing(ranks: Ranks, folder: str) -> None:
    """Nothing."""


def count_done(ranks: Ranks, count: int) -> int:
    """How many units rank 0 is told of."""
    told = []
    for _ in ranks.units(range(count), told.append):
        time.sleep(0.01)
    return sum(told)


def warned(ranks: Ranks, count: int) -> list[str]:
    """Do units, and return what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in ranks.units(range(count), lambda done: None):
            pass
    return [str(one.message) for one in caught]


def from_first(ranks: Ranks) -> tuple[Any, Any]:
    return ranks.from_first(lambda: {"rank": ranks.rank}), ranks.from_first(lambda: ["ü", 2.5])


def fail(ranks: Ranks, which: int) -> None:
    """One rank fails, while the others are in the middle of a long unit."""
    for _ in ranks.units(range(ranks.count), lambda done: None):
        if ranks.rank == which:
            time.sleep(0.5)
            raise NemoError("there is no paper left")
        for _ in range(600):
            time.sleep(0.1)


def fail_in_the_background(ranks: Ranks) -> None:
    """As `fail`, in processes that a shell has started with `&`: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fail(ranks, 0)


def fill_the_disk(ranks: Ranks, file: str) -> None:
    """Rank 1 cannot write."""
    for _ in ranks.units(range(ranks.count), lambda done: None):
        if ranks.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device", file)
        for _ in range(600):
            time.sleep(0.1)


def stop(ranks: Ranks) -> None:
    """Somebody presses Ctrl-C in rank 1, while rank 0 is in the middle of a long unit."""
    for _ in ranks.units(range(ranks.count), lambda done: None):
        if ranks.rank == 1:
            raise KeyboardInterrupt
        for _ in range(600):
            time.sleep(0.1)


def agree(ranks: Ranks, facts: list[dict[str, str]]) -> str:
    ranks.agree(facts[ranks.rank])
    return "agreed"


def lose_one(ranks: Ranks) -> None:
    """The last rank ends without a word, and the others wait for it."""
    ranks_module.PATIENCE, ranks_module._PARTING = 3.0, timedelta(seconds=2)
    if ranks.rank == ranks.count - 1:
        os._exit(0)
    ranks.meet()


def open_parts(ranks: Ranks, paths: list[str]) -> None:
    with Parts(paths[ranks.rank], {"model": "a"}).open(ranks):
        pass


def localize(ranks: Ranks, out: str) -> list[str]:
    """Localize `PROMPTS`, and return those that this rank has searched."""
    planted = planted_pipeline()
    statistics = collect_statistics(planted.pipe, planted.ordinary_prompts)
    verify = Verification(Sampling(2, steps=1, guidance=1.0), threshold=0.5, budget=4)
    localizer = Localizer(planted.pipe, statistics=statistics, threshold=0.5, seeds=2, verify=verify)
    searched = []
    search = localizer._search

    def noted(prompt: str, bars: Any) -> Any:
        searched.append(prompt)
        with (Path(out).parent / f"searched-{ranks.rank}.txt").open("a") as file:
            file.write(prompt + "\n")
        return search(prompt, bars)

    localizer._search = noted  # type: ignore[method-assign]
    found = localizer.localize_many(PROMPTS, out=out, ranks=ranks)
    assert [one.prompt for one in found] == PROMPTS
    return searched


def evaluate(ranks: Ranks, results: str, ordinary: list[str], sampling: Sampling) -> None:
    """Generate the images of an evaluation of the results in a folder."""
    planted = planted_pipeline()
    generate_shared(
        planted.pipe,
        read_results(results),
        sampling=sampling,
        draws=1,
        ordinary=ordinary,
        folder=results,
        batch_size=2,
        ranks=ranks,
    )


def measure(ranks: Ranks, out: str) -> None:
    """Collect statistics and measure a threshold, and write both in rank 0, as the commands do."""
    planted = planted_pipeline()
    texts = [f"a camel number {place}" for place in range(120)]
    statistics = collect_statistics(planted.pipe, texts, batch_size=2, parts=f"{out}/statistics.parts", ranks=ranks)
    threshold = memorization_threshold(
        planted.pipe, texts[:4], seeds=2, protocol=Protocol.paper(), parts=f"{out}/threshold.parts", ranks=ranks
    )
    if ranks.first:
        statistics.save(f"{out}/statistics.safetensors")
        threshold.save(f"{out}/threshold.json")
