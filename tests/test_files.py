"""Writing a file at once or not at all."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_ext.files import replacing


def test_the_file_appears_when_the_block_is_done(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "permissions"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_file_has_the_permissions_of_a_new_one_also_from_safetensors(
    tmp_path: Path, mask: int, permissions: int
) -> None:
    with umask(mask), replacing(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == permissions
