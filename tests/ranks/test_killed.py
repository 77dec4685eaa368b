"""Ranks that are killed at random moments, all at once: what they did is kept, and nothing is done twice or lost.

`NEMO_EXT_KILLS=50 pytest tests/ranks/test_killed.py` kills them fifty times in each test; by default it is a few times.
"""

import dataclasses
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import rank_jobs
from rank_processes import RankProcesses, rank_processes

from nemo_ext.ranks.ranks import Ranks
from nemo_ext.results.folder import read_results
from nemo_ext.results.record import Localization

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("NEMO_EXT_KILLS", "2"))


class Whole(NamedTuple):
    """A job that one process did and nobody killed: the folder with what it wrote, and how long it took."""

    folder: Path
    seconds: float


def whole(job: Callable[..., Any], folder: Path) -> Whole:
    started = time.monotonic()
    codes, said = RankProcesses(1, job, str(folder)).results()
    assert codes == [0], said
    return Whole(folder, time.monotonic() - started)


@pytest.fixture(scope="module")
def localized(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    whole(rank_jobs.do_nothing, tmp_path_factory.mktemp("imports"))  # the first process waits for them
    return whole(rank_jobs.localize, tmp_path_factory.mktemp("localized") / "results")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole(rank_jobs.measure, tmp_path_factory.mktemp("measured"))


def run_with_kills(job: Callable[..., Any], folder: Path, seconds: float, chance: random.Random) -> int:
    """Let one to three ranks do a job, and kill all of them at a random moment, until they have done it.

    Returns how often they were killed. `seconds` is about what one rank takes for the whole job.
    """
    for kills in count():
        with rank_processes(chance.choice((1, 2, 3)), job, str(folder)) as running:
            end = time.monotonic() + chance.uniform(0, 1.5 * seconds)
            while time.monotonic() < end and running.alive:
                time.sleep(0.002)
            if not running.alive:
                codes, said = running.results()
                assert set(codes) == {0}, said
                return kills
    raise AssertionError


def but_for_time(folder: Path) -> list[Localization]:
    return [dataclasses.replace(found, seconds=0.0) for found in read_results(folder)]


def files_in(folder: Path) -> list[str]:
    """All files, temporary ones and those in `parts` too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_results_are_those_of_an_uninterrupted_run(tmp_path: Path, localized: Whole) -> None:
    chance = random.Random()
    kills, runs = 0, 0
    while kills < KILLS:
        folder = tmp_path / f"{runs}"
        folder.mkdir()
        now = run_with_kills(rank_jobs.localize, folder / "results", localized.seconds, chance)
        assert but_for_time(folder / "results") == but_for_time(localized.folder)
        assert files_in(folder / "results") == files_in(localized.folder)
        searched = Counter(line for file in folder.glob("searched-*.txt") for line in file.read_text().splitlines())
        assert set(searched) == set(rank_jobs.PROMPTS)
        # Only a search that was interrupted is done again: one for each rank that was killed.
        assert searched.total() - len(searched) <= 3 * now
        kills, runs = kills + now, runs + 1
    print(f"{kills} kills in {runs} runs")


def test_statistics_and_threshold_are_those_of_an_uninterrupted_run(tmp_path: Path, measured: Whole) -> None:
    chance = random.Random()
    kills, runs = 0, 0
    while kills < KILLS:
        folder = tmp_path / f"{runs}"
        folder.mkdir()
        kills, runs = kills + run_with_kills(rank_jobs.measure, folder, measured.seconds, chance), runs + 1
        for name in ("statistics.safetensors", "threshold.json"):
            assert (folder / name).read_bytes() == (measured.folder / name).read_bytes()
    print(f"{kills} kills in {runs} runs")


def test_a_single_process_without_torchrun_continues_what_ranks_began(tmp_path: Path, localized: Whole) -> None:
    with rank_processes(3, rank_jobs.localize, str(tmp_path / "results")) as running:
        while not list((tmp_path / "results").glob("parts/[0-9a-f]*.json")):
            assert running.alive, running.results()
            time.sleep(0.002)
    rank_jobs.localize(Ranks(), str(tmp_path / "results"))
    assert but_for_time(tmp_path / "results") == but_for_time(localized.folder)
