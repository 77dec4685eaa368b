"""The table of legs, and --require-device: a leg that did not run says why, a required one that cannot run fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = """
import pytest

def test_of_a_device(device):
    assert device.type == "cpu"

@pytest.mark.leg("cuda")
def test_of_cuda_alone(device):
    raise AssertionError("ran without a GPU")

@pytest.mark.leg("emulated")
def test_that_is_skipped():
    pytest.skip("no compiler")

@pytest.mark.leg("emulated")
def test_that_passes():
    pass

@pytest.mark.leg("compiled")
def test_that_fails():
    raise AssertionError

def test_of_no_leg():
    pass
"""


@pytest.fixture
def run(tmp_path):
    """Runs pytest on such a file, with this folder's conftest.py, where there is no GPU."""

    def run(*arguments, program=PROGRAM):
        (tmp_path / "test_program.py").write_text(program)
        command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-rN", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def legs(output):
    """First word of each line of the table -> its numbers, and the reason behind them."""
    table = output.split(" legs =")[1].splitlines()[2:8]
    return {line.split()[0]: (*map(int, line.split()[1:4]), line[39:]) for line in table}


@pytest.mark.slow
def test_every_leg_is_counted_and_what_did_not_run_says_why(run):
    result = run()
    assert result.returncode == 1
    table = legs(result.stdout)
    assert table["reference"] == (0, 0, 0, "not in this run")
    assert table["CPU"] == (1, 0, 0, "")
    assert table["emulated"] == (1, 0, 1, "no compiler")
    assert table["compiled"] == (0, 1, 0, "")
    assert table["CUDA"][:3] == (0, 0, 1)
    assert "CUDA" in table["CUDA"][3] or "GPU" in table["CUDA"][3]


@pytest.mark.slow
def test_a_required_device_that_is_missing_fails_every_test_of_it_with_the_reason(run):
    result = run("--require-device", "cuda", "-k", "device or cuda")
    assert result.returncode == 1
    table = legs(result.stdout)
    assert table["CPU"] == (1, 0, 0, "")
    assert table["CUDA"][:3] == (0, 2, 0)
    assert result.stdout.count(f"--require-device cuda: {table['CUDA'][3]}\n") == 2


@pytest.mark.slow
def test_an_unknown_leg_is_an_error(run):
    result = run(program="import pytest\n@pytest.mark.leg('gpu')\ndef test_it():\n    pass\n")
    assert result.returncode == 4
    assert "leg must be one of reference, cpu, amx, emulated, compiled, cuda, got gpu" in result.stderr
