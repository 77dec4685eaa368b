"""The commands under torchrun itself, on the bundled model: line by line what one process writes, but for times."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_ext.demo.captions import MEMORIZED, ordinary_captions
from nemo_ext.demo.run import MODEL

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(launcher: list[str], *arguments: object) -> None:
    command = [sys.executable, *launcher, "-m", "nemo_ext", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def lines_but_for_times(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def test_two_ranks_write_what_one_process_writes(tmp_path: Path) -> None:
    ordinary = [caption for _, caption in ordinary_captions(130, seed=2024)]
    (tmp_path / "ordinary.txt").write_text("\n".join(ordinary))
    # The score of the first ordinary caption is above τ, and a search for neurons that are not there takes long.
    suspects = [MEMORIZED[0].caption, ordinary[1], MEMORIZED[2].caption]
    (tmp_path / "suspects.txt").write_text("\n".join(suspects))
    threshold = json.loads((MODEL / "figures.json").read_text())["scores"]["threshold"]
    for name, launcher in (("ranks", TORCHRUN), ("one", [])):
        statistics = tmp_path / f"{name}.safetensors"
        run(launcher, "stats", "--model", MODEL, "--prompts", tmp_path / "ordinary.txt", "--out", statistics)
        files = ["--prompts", tmp_path / "suspects.txt", "--statistics", statistics, "--out", tmp_path / name]
        run(launcher, "localize", "--model", MODEL, *files, "--threshold", threshold, "--no-verify", "--seeds", 2)
    assert (tmp_path / "ranks.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert [line["prompt"] for line in lines_but_for_times(tmp_path / "ranks")] == suspects
    assert any(line["neurons"] for line in lines_but_for_times(tmp_path / "ranks"))
    assert lines_but_for_times(tmp_path / "ranks") == lines_but_for_times(tmp_path / "one")
    ranks, one = (
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*"))
        for name in ("ranks", "one")
    )
    assert ranks == one
