"""Ranks generate the images of an evaluation; a single process then finds all of them, and measures the same."""

import dataclasses
from pathlib import Path
from typing import Any

import rank_jobs
from evaluation_parts import localization
from rank_processes import rank_processes
from tiny_pipeline import planted_pipeline

from nemo_ext.evaluate.evaluation import evaluate_results
from nemo_ext.measure.generation import Sampling
from nemo_ext.models.state import model_fingerprint
from nemo_ext.results.folder import ResultsFolder, read_results

SAMPLING = Sampling(2, steps=1, guidance=1.0)


def test_images_of_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    planted = planted_pipeline()
    ordinary = list(planted.ordinary_prompts[:3])
    model = model_fingerprint(planted.pipe)
    for name in ("ranks", "one"):
        with ResultsFolder(tmp_path / name).writing() as writer:
            for prompt in (planted.memorized_prompt, "zoo zebra", "a zebra"):
                writer.append(localization(prompt, planted.neurons, model))

    with rank_processes(2, rank_jobs.evaluate, str(tmp_path / "ranks"), ordinary, SAMPLING) as running:
        codes, said = running.results()
    assert codes == [0, 0], said

    settings: dict[str, Any] = {"sampling": SAMPLING, "draws": 1, "ordinary": ordinary, "batch_size": 2}
    shared, alone = (
        evaluate_results(planted.pipe, read_results(tmp_path / name), **settings, folder=tmp_path / name)
        for name in ("ranks", "one")
    )
    assert shared.reused_images == 3 * 3 * 2 + 3 * 3
    assert alone.reused_images == 0
    assert dataclasses.replace(shared, seconds=0.0, reused_images=0) == dataclasses.replace(
        alone, seconds=0.0, reused_images=0
    )
