"""What surrounds a command: the encoding of its output, a home folder, folders that nobody may write to."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from evaluation_parts import localization

from nemo_ext import info
from nemo_ext.cli import main
from nemo_ext.commands.devices import usable_device
from nemo_ext.errors import NemoError, NemoWarning
from nemo_ext.neurons import NeuronSet
from nemo_ext.ranks.ranks import Ranks

PROMPT = "a café → 日本"
#: Takes from root the right to write everywhere, as other users lack it.
NO_PRIVILEGES = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all") if os.geteuid() == 0 else ()
needs_permissions = pytest.mark.skipif(
    bool(NO_PRIVILEGES) and shutil.which("setpriv") is None, reason="root may write everywhere, and setpriv is missing"
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with one result, whose prompt has characters from everywhere."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "results.jsonl").write_text(json.dumps(localization(PROMPT, NeuronSet(), "").to_dict()) + "\n")
    return folder


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: object) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command whose output has an encoding, and refuses other characters."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setenv("COLUMNS", "120")
    code = main(list(map(str, arguments)))
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    return code, texts[0], texts[1]


@pytest.mark.parametrize(
    ("encoding", "prompt", "threshold"),
    [
        ("ascii", "a cafe -> ??", "tau"),
        ("latin-1", "a café -> ??", "tau"),
        ("cp1252", "a café -> ??", "tau"),
        ("utf-8", PROMPT, "τ"),
    ],
)
def test_a_table_replaces_only_what_the_encoding_lacks(
    encoding: str, prompt: str, threshold: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "report.html"
    code, out, err = printed(monkeypatch, encoding, "report", "--results", results, "--out", page)
    assert (code, err) == (0, "")
    assert f" {prompt} " in out
    assert f" {threshold} " in out
    assert PROMPT in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["localize", "evaluate", "demo"])
def test_help_is_printed_in_ascii(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = printed(monkeypatch, "ascii", command, "--help")
    assert (code, err) == (0, "")
    assert f"usage: nemo-ext {command}" in out


def test_an_error_is_printed_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = printed(monkeypatch, "ascii", "report", "--results", "où → nulle part", "--out", "r.html")
    assert code == 1
    assert err.startswith("nemo-ext report: ou -> nulle part does not exist")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, without privileges; an empty variable is not set at all."""
    around = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": "", **environment}
    command = [*NO_PRIVILEGES, sys.executable, "-m", "nemo_ext", *map(str, arguments)]
    known = {name: value for name, value in around.items() if value}
    return subprocess.run(command, env=known, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_permissions
@pytest.mark.parametrize("exists", [True, False])
def test_no_home_folder_is_needed(exists: bool, results: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    page = tmp_path / "report.html"
    done = run(
        *("report", "--results", results, "--out", page), HOME=str(home) if exists else "", PYTHONIOENCODING="ascii"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert page.is_file()


@pytest.mark.slow
@needs_permissions
def test_a_folder_that_nobody_may_write_to_is_refused_with_one_sentence(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    done = run("report", "--results", results, "--out", folder / "report.html")
    assert done.returncode == 1
    assert done.stderr == f"nemo-ext report: {folder} can't be written to: no permission to write in {folder}\n"


class TestAGpuThatTheKernelsWereNotBuiltFor:
    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(info, "gpus", lambda: [info.Gpu("Some GPU", (7, 5), (13, 0))])

    def test_is_not_left_out_silently(self) -> None:
        with pytest.warns(NemoWarning, match=r"the CPU is used, although there is a GPU: .*Some GPU.*--device cpu"):
            assert usable_device(None, Ranks()) == "cpu"

    def test_is_left_out_on_request(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert usable_device("cpu", Ranks()) == "cpu"

    def test_is_refused_on_request(self) -> None:
        with pytest.raises(NemoError, match=r"--device cuda: .*Some GPU"):
            usable_device("cuda", Ranks())
