"""What a release says about itself: its version, what is new in it, and the versions that it needs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[1]


def test_the_version_has_an_entry_in_the_changelog():
    assert re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_version_is_the_one_to_cite():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", ["python", "torch", "diffusers", "transformers"])
def test_the_oldest_versions_are_those_of_the_support_table(name):
    pattern = r'^requires-python = ">=(.+)"$' if name == "python" else rf'^  "{name}>=([\d.]+)",'
    oldest = re.search(pattern, PYPROJECT, re.MULTILINE)[1]
    (row,) = re.findall(
        rf"^\| {name} \| (.+?) \|", (ROOT / "docs" / "support.md").read_text(), re.MULTILINE | re.IGNORECASE
    )
    assert row == f"{oldest} and newer"
