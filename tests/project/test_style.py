"""Style and types: what `.ci/run` and every contributor's `pytest` hold the sources to."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> None:
    """Run a tool of this environment in the repository's root; its own words are the failure's message."""
    tool, *arguments = command
    done = subprocess.run(
        [Path(sys.executable).parent / tool, *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout


def test_python_has_no_lint() -> None:
    run("ruff", "check", ".")


def test_python_is_formatted() -> None:
    run("ruff", "format", "--check", ".")


def test_cpp_is_formatted() -> None:
    sources = [
        str(file)
        for pattern in ("*.h", "*.cpp", "*.cu", "*.cuh")
        for folder in ("csrc", "benchmarks")
        for file in sorted((ROOT / folder).rglob(pattern))
    ]
    run("clang-format", "--dry-run", "--Werror", *sources)


@pytest.mark.slow
def test_types_are_consistent() -> None:
    run("mypy")
