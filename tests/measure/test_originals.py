"""Reading the training images that a CSV file lists."""

from pathlib import Path

import pytest
from PIL import Image

from nemo_ext.errors import NemoError
from nemo_ext.measure.originals import Originals, read_originals


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images of one colour each, of different modes."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "images" / "red.png")
    Image.new("RGBA", (8, 6), "blue").save(tmp_path / "images" / "blue.png")
    return tmp_path


def table(folder: Path, *lines: str) -> Path:
    """A CSV file in `folder`."""
    path = folder / "originals.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_images_are_read_as_rgb_relative_to_the_file(folder: Path) -> None:
    originals = read_originals(table(folder, "prompt,image", "a fox,images/red.png", "a cat,images/blue.png"))
    assert list(originals) == ["a fox", "a cat"]
    (blue,) = originals["a cat"]
    assert (blue.mode, blue.size, blue.getpixel((0, 0))) == ("RGB", (8, 6), (0, 0, 255))


def test_a_prompt_can_have_several_images(folder: Path) -> None:
    originals = read_originals(table(folder, "prompt,image", "a fox,images/red.png", "a fox,images/blue.png"))
    assert [image.getpixel((0, 0)) for image in originals["a fox"]] == [(255, 0, 0), (0, 0, 255)]


def test_labels_are_read_where_there_are_any(folder: Path) -> None:
    originals = read_originals(
        table(folder, "label,prompt,image", "vm,a fox,images/red.png", ",a cat,images/red.png", "TM,b,images/red.png")
    )
    assert originals.labels == {"a fox": "VM", "b": "TM"}


def test_prompts_hold_commas_quotes_and_no_whitespace_around_them(folder: Path) -> None:
    originals = read_originals(table(folder, "prompt,image", '" ""Up"", a film ",images/red.png'))
    assert list(originals) == ['"Up", a film']


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("prompt,file", "a,images/red.png"), "line 1: there is no column image"),
        (("prompt,image",), "lists no image"),
        (("prompt,image", "a,images/red.png", "b,images/green.png"), "line 3: the image"),
        (("prompt,image", "a, b,images/red.png"), "line 2: there are more values"),
        (("prompt,image", "a"), "line 2: there are fewer values"),
        (("prompt,image", ",images/red.png"), "line 2: the prompt is empty"),
        (("prompt,image,label", "a,images/red.png,XM"), "line 2: the label is 'XM'"),
        (("prompt,image,label", "a,images/red.png,VM", "a,images/blue.png,TM"), "line 3: the label is TM"),
        (("prompt,image", "a,originals.csv"), "line 2: the image"),
        (("prompt,image", '"a,images/red.png'), ": unexpected end of data"),
    ],
)
def test_an_error_names_file_and_line(folder: Path, lines: tuple[str, ...], said: str) -> None:
    path = table(folder, *lines)
    with pytest.raises(NemoError) as raised:
        read_originals(path)
    assert str(path) in str(raised.value)
    assert said in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NemoError, match=r"none\.csv doesn't exist"):
        read_originals(tmp_path / "none.csv")


def test_a_file_that_is_no_text_is_named(folder: Path) -> None:
    with pytest.raises(NemoError, match=r"red\.png isn't UTF-8 text"):
        read_originals(folder / "images" / "red.png")


def test_a_label_needs_an_image() -> None:
    with pytest.raises(NemoError, match="'a', which has no training image"):
        Originals({}, {"a": "VM"})
