"""The results folder: appended to, mended after a kill, written by one process at a time."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemo_ext.errors import NemoError
from nemo_ext.measure.protocol import Protocol
from nemo_ext.neurons import NeuronSet
from nemo_ext.results.folder import ResultsFolder, read_results
from nemo_ext.results.record import Localization

FOUND = Localization(
    prompt="a zebra",
    memorized=False,
    score_before=0.25,
    score_after=None,
    floor=None,
    threshold=0.5,
    threshold_used=None,
    notes=(),
    theta=None,
    top_k=None,
    initial_neurons=NeuronSet(),
    neurons=NeuronSet({"layer": [1, 2]}),
    kept_seeds=(),
    unet_samples=3.0,
    seconds=0.5,
    certificate=None,
    search="exhaustive",
    protocol=Protocol.paper(),
    seeds=3,
    layers=("layer",),
    similarity_scales=1,
    model="0",
    statistics="0",
)


def of(prompt: str) -> Localization:
    return dataclasses.replace(FOUND, prompt=prompt)


def prompts(folder: Path) -> list[str]:
    return [found.prompt for found in read_results(folder)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two results."""
    with ResultsFolder(tmp_path).writing() as writer:
        writer.append(of("first"))
        writer.append(of("second, ü\n"))
    return tmp_path


def test_a_result_comes_back_as_it_was(folder: Path) -> None:
    assert read_results(folder) == [of("first"), of("second, ü\n")]
    assert ResultsFolder(folder).read() == read_results(folder / "results.jsonl")


def test_a_result_is_appended_and_what_is_there_stays_untouched(folder: Path) -> None:
    file = folder / "results.jsonl"
    before, inode = file.read_bytes(), file.stat().st_ino
    with ResultsFolder(folder).writing() as writer:
        assert [found.prompt for found in writer.kept] == ["first", "second, ü\n"]
        writer.append(of("third"))
        # It is there as soon as `append` returns.
        assert file.read_bytes() == before + json.dumps(of("third").to_dict()).encode() + b"\n"
    assert file.stat().st_ino == inode
    assert [path.name for path in folder.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_line_that_was_being_written_when_a_process_was_killed_is_cut_off(folder: Path, cut: int) -> None:
    file = folder / "results.jsonl"
    line = json.dumps(of("third").to_dict()).encode()
    with file.open("ab") as stream:
        stream.write(line[:cut])
    with ResultsFolder(folder).writing() as writer:
        assert [found.prompt for found in writer.kept] == ["first", "second, ü\n"]
        writer.append(of("third"))
    assert prompts(folder) == ["first", "second, ü\n", "third"]


def test_a_line_that_lacks_only_its_end_is_kept(folder: Path) -> None:
    file = folder / "results.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    with ResultsFolder(folder).writing() as writer:
        writer.append(of("third"))
    assert prompts(folder) == ["first", "second, ü\n", "third"]


def test_a_file_whose_only_line_is_cut_off_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(b'{"prompt": "cut')
    with ResultsFolder(tmp_path).writing() as writer:
        assert writer.kept == ()
        writer.append(of("first"))
    assert prompts(tmp_path) == ["first"]


def test_a_broken_line_in_the_middle_is_an_error_and_nothing_is_changed(folder: Path) -> None:
    file = folder / "results.jsonl"
    file.write_bytes(b"\xff\n" + file.read_bytes())
    before = file.read_bytes()
    with (
        pytest.raises(NemoError, match=r"results\.jsonl, line 1, is not a result"),
        ResultsFolder(folder).writing(),
    ):
        pass
    assert file.read_bytes() == before


def test_begun_anew_the_old_results_stay_until_there_is_a_new_one(folder: Path) -> None:
    with ResultsFolder(folder).writing(anew=True) as writer:
        assert writer.kept == ()
        assert prompts(folder) == ["first", "second, ü\n"]
        writer.append(of("third"))
        writer.append(of("fourth"))
    assert prompts(folder) == ["third", "fourth"]


def test_a_second_writer_is_refused_until_the_first_has_ended(folder: Path) -> None:
    with ResultsFolder(folder).writing() as writer:
        with (
            pytest.raises(NemoError, match=r"another process writes results to .*: wait until it has ended"),
            ResultsFolder(folder).writing(),
        ):
            pass
        writer.append(of("third"))
    with ResultsFolder(folder).writing() as writer:
        assert len(writer.kept) == 3


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    program = f"""
        import sys, time
        from nemo_ext.results.folder import ResultsFolder
        with ResultsFolder({str(tmp_path)!r}).writing():
            print("locked", flush=True)
            time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(NemoError, match="another process"), ResultsFolder(tmp_path).writing():
            pass
        os.kill(process.pid, signal.SIGKILL)
    with ResultsFolder(tmp_path).writing() as writer:
        writer.append(of("first"))
    assert prompts(tmp_path) == ["first"]
