"""Reading JSON and safetensors that may be damaged, cut off or edited by hand; every fault is one sentence.

`parse_json` refuses what is not JSON, and what Python's parser accepts beyond JSON. `restored` makes a dataclass from
parsed JSON: pydantic compares the values with the types of the fields, among them the ranges below. `refusing` adds the
name of the file to the sentence.
"""

from __future__ import annotations

import functools
import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar, cast

from annotated_types import Interval

from nemo_ext.errors import NemoError

T = TypeVar("T")

#: Whole numbers with a range, for the fields of dataclasses that `restored` makes. The range is checked there alone.
Count = Annotated[int, Interval(ge=0, le=2**63 - 1)]
PositiveCount = Annotated[int, Interval(ge=1, le=2**63 - 1)]
Seed = Annotated[int, Interval(ge=-(2**63), le=2**63 - 1)]
#: Seconds, and counts that have fractions.
Amount = Annotated[float, Interval(ge=0)]


@contextmanager
def refusing(name: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn every `NemoError` of the block, and every error of the file system, into one that names the file.

    Args:
        name: the file, and perhaps the line, with which the message begins.
        what: what is wrong with it, such as "does not hold a threshold"; the reason follows.

    Raises:
        NemoError: the block raised one, or an `OSError`.
    """
    try:
        yield
    except NemoError as error:
        raise NemoError(f"{os.fspath(name)} {what}: {error}") from error
    except OSError as error:
        raise NemoError(f"{os.fspath(name)} can't be read: {error.strerror or error}") from error


def parse_json(content: bytes) -> Any:
    """Parse one JSON document.

    Args:
        content: the document in UTF-8.

    Returns:
        Dictionaries, lists, texts, finite numbers, booleans and None.

    Raises:
        NemoError: it is not JSON, holds a number that is not finite, has a name twice in one object, or a text in it
            cannot be encoded.
    """
    try:
        text = content.decode("utf-8-sig")
        if not text.strip():
            raise NemoError("it is empty")
        found = json.loads(
            text, parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_without_duplicates
        )
        if "\\ud" in text.lower():  # an escape of half a character, which cannot be hashed or written later
            json.dumps(found, ensure_ascii=False).encode()
    except NemoError:
        raise
    except UnicodeDecodeError as error:
        raise NemoError(f"byte {error.start} is not UTF-8 text") from error
    except UnicodeEncodeError as error:
        raise NemoError("a text in it has one half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise NemoError(f"it is not JSON ({line}column {error.colno}: {error.msg})") from error
    except RecursionError as error:
        raise NemoError("it is nested too deeply") from error
    except ValueError as error:  # Python refuses to convert numbers with thousands of digits.
        raise NemoError("a number in it has too many digits") from error
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise NemoError(f"wanted finite numbers, got {text[:20]}")
    return number


def _no_constant(name: str) -> float:
    raise NemoError(f"wanted finite numbers, got {name}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise NemoError(f"{_shown(name)} is there twice")
        found[name] = value
    return found


def restored(kind: type[T], values: object) -> T:
    """Make a dataclass from what `parse_json` returns, or from a dictionary that could be written as JSON.

    Nothing is converted, apart from lists, which become tuples, and whole numbers, which become floats. A field that is
    itself a dataclass is made in the same way.

    Args:
        kind: a dataclass.
        values: field name -> value.

    Raises:
        NemoError: a field is missing or unknown, or has a value of another type or out of its range. The message names
            the field.
    """
    from pydantic import ValidationError

    reader = _reader(cast(Any, kind))
    try:
        # JSON and not Python's objects: only then lists are taken for tuples, without further conversions.
        made: T = reader.validate_json(json.dumps([values], allow_nan=False))[0]
    except ValidationError as error:
        raise NemoError(_sentence(error.errors(include_url=False)[0])) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise NemoError(f"it can't be written as JSON: {error}") from error
    return made


@functools.cache
def _reader(kind: Any) -> Any:
    """What checks a dataclass. It is imported late, because that takes a tenth of a second."""
    from pydantic import ConfigDict, TypeAdapter

    # pydantic takes settings for everything but a dataclass itself; those of a tuple hold for all that is in it.
    return TypeAdapter(tuple[kind], config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))


def _sentence(fault: Any) -> str:
    """What is wrong, from one entry of pydantic's list."""
    kind, (_, *path) = fault["type"], fault["loc"] or (0,)
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    if kind == "missing":
        return f"{field} is missing"
    if kind == "unexpected_keyword_argument":
        return f"there is no field {field}"
    prefix = f"{field}: " if field else ""
    if kind == "value_error":
        return f"{prefix}{fault['ctx']['error']}"
    return f"{prefix}{fault['msg'].replace('Input should be', 'wanted')}, got {_shown(fault['input'])}"


def _shown(value: object) -> str:
    """A value in a message: short, on one line, and in the words of JSON."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return reprlib.repr(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else json.dumps(value)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Read a safetensors file.

    Args:
        path: the file.

    Returns:
        Its tensors by name, and its metadata.

    Raises:
        NemoError: it is not a safetensors file, or is cut off.
        OSError: it cannot be read.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # safetensors and torch raise anything from SafetensorError to OverflowError
        raise NemoError(" ".join(str(error).split())) from error
