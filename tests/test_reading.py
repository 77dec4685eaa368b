"""Reading JSON that may be damaged, and making dataclasses from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_ext.errors import NemoError
from nemo_ext.reading import Amount, Count, parse_json, refusing, restored


@dataclass(frozen=True)
class Part:
    size: Count
    weight: Amount = 1.0

    def __post_init__(self) -> None:
        if self.size == 13:
            raise NemoError("size must not be 13")


@dataclass(frozen=True)
class Whole:
    name: str
    parts: tuple[Part, ...]
    more: Mapping[str, Any] | None = None


WHOLE = Whole("a", (Part(1, 0.5), Part(2)), {"any": ["thing", None]})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"a": ', r"it is not JSON \(column 7: Expecting value\)"),
        (b'{\n"a": }', r"it is not JSON \(line 2, column 6: Expecting value\)"),
        (b"[NaN]", "wanted finite numbers, got NaN"),
        (b"[-Infinity]", "wanted finite numbers, got -Infinity"),
        (b"[1e999]", "wanted finite numbers, got 1e999"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'["\\ud800"]', "a text in it has one half of a surrogate pair"),
        (b'["a\xff"]', "byte 3 is not UTF-8 text"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"9" * 10_000, "a number in it has too many digits"),
    ],
)
def test_what_is_not_json_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(NemoError, match=f"^{said}$"):
        parse_json(content)


def test_json_is_read_with_and_without_a_byte_order_mark() -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        assert parse_json(mark + '{"ü": [1, 0.5, "\\ud83e\\udd8a", null, true]}'.encode()) == {
            "ü": [1, 0.5, "🦊", None, True]
        }


def test_a_dataclass_comes_back_with_its_parts() -> None:
    values = {"name": "a", "parts": [{"size": 1, "weight": 0.5}, {"size": 2}], "more": {"any": ["thing", None]}}
    assert restored(Whole, values) == WHOLE


def test_a_whole_number_is_a_float_and_nothing_else_is_converted() -> None:
    assert restored(Part, {"size": 1, "weight": 2}) == Part(1, 2.0)
    for size in ("1", 1.0, True, None):
        with pytest.raises(NemoError, match="size: wanted a valid integer, got"):
            restored(Part, {"size": size})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "wanted an object, got a list"),
        ({"parts": []}, "name is missing"),
        ({"name": "a", "parts": [{}]}, r"parts\[0\].size is missing"),
        ({"name": "a", "parts": {}}, "parts: wanted a valid array, got an object"),
        ({"name": "a", "parts": [], "colour": 1}, "there is no field colour"),
        ({"name": None, "parts": []}, "name: wanted a valid string, got null"),
        ({"name": "a", "parts": [{"size": -1}]}, r"parts\[0\].size: wanted greater than or equal to 0, got -1"),
        ({"name": "a", "parts": [{"size": 2**63}]}, r"parts\[0\].size: wanted less than or equal to 9\d+, got 9\d+"),
        ({"name": "a", "parts": [{"size": 13}]}, r"parts\[0\]: size must not be 13"),
        ({"name": "a", "parts": [{"size": 1, "weight": 10**400}]}, r"parts\[0\].weight: wanted a finite number, got 1"),
        ({"name": "a", "parts": [{"size": 1, "weight": float("nan")}]}, "it can't be written as JSON"),
    ],
)
def test_the_message_names_the_field_and_what_was_wanted_and_what_came(values: object, said: str) -> None:
    with pytest.raises(NemoError, match=f"^{said}") as refusal:
        restored(Whole, values)
    assert len(str(refusal.value)) < 200


def test_a_refusal_names_the_file() -> None:
    with (
        pytest.raises(NemoError, match=r"^a\.json does not hold a thing: it is empty$"),
        refusing("a.json", "does not hold a thing"),
    ):
        parse_json(b"")


def test_so_does_one_of_the_file_system(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(NemoError, match=r"a\.json can't be read: No such file or directory$"), refusing(path, "is bad"):
        path.read_bytes()
