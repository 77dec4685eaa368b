"""Damages files as disks, transfers and editors do: the same seed gives the same damage."""

import copy
import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

# What takes the place of a number in the text of a file.
_NO_NUMBERS = (b"NaN", b"null", b"1e999", b"-Infinity", b"-1", b"0.5", b"true", b'"1"', b"[]", b"{}", b"9" * 400)
# What takes the place of a value in a JSON document.
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 0.5, 10**30, float("nan"), float("inf"), -float("inf")),
    *("", "text", "\ud800", [], {}, [None], [-1], [[]], {"": None}, [float("nan")], ["text"]),
)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def bits_flipped(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def bytes_inserted(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content) + 1)
    return content[:place] + chance.randbytes(chance.choice((1, 2, 16))) + content[place:]


def bytes_deleted(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + content[place + chance.choice((1, 2, 16)) :]


def number_replaced(content: bytes, chance: random.Random) -> bytes:
    """A number in the text becomes something else. A file without text stays as it is."""
    numbers = list(re.finditer(rb"(?<=[ :,\[])-?\d+(\.\d+)?(e-?\d+)?(?=[,\]} \n])", content))
    if not numbers:
        return content
    number = chance.choice(numbers)
    return content[: number.start()] + chance.choice(_NO_NUMBERS) + content[number.end() :]


#: The damages that every format can suffer.
OF_BYTES = (cut, bits_flipped, bytes_inserted, bytes_deleted, number_replaced)


def json_changed(content: bytes, chance: random.Random) -> bytes:
    """One value of a JSON document is replaced, left out, or given under a second name; the JSON stays well-formed."""
    document = copy.deepcopy(json.loads(content))
    places = list(_places(document))
    if not places:
        return json.dumps(chance.choice(_VALUES)).encode()
    container, key = chance.choice(places)
    match chance.choice(("replace", "replace", "replace", "leave out", "add", "whole")):
        case "replace":
            container[key] = copy.deepcopy(chance.choice(_VALUES))
        case "leave out":
            del container[key]
        case "add" if isinstance(container, dict):
            container[f"{key} too"] = container[key]
        case "add":
            container.append(container[key])
        case "whole":
            document = copy.deepcopy(chance.choice(_VALUES))
    return json.dumps(document).encode() + b"\n"


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document with each of its keys, or positions."""
    keys: Any = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys):
        yield document, key
        yield from _places(document[key])


def line_changed(content: bytes, chance: random.Random) -> bytes:
    """`json_changed` for one line of a file in JSON lines."""
    lines = content.splitlines(keepends=True)
    number = chance.randrange(len(lines))
    lines[number] = json_changed(lines[number], chance)
    return b"".join(lines)


def header_changed(content: bytes, chance: random.Random) -> bytes:
    """`json_changed` for the header of a safetensors file, or for the JSON in its metadata."""
    (length,) = struct.unpack("<Q", content[:8])
    header, tensors = content[8 : 8 + length], content[8 + length :]
    described = json.loads(header)
    if "nemo_ext" in described.get("__metadata__", {}) and chance.random() < 0.7:
        inner = json_changed(described["__metadata__"]["nemo_ext"].encode(), chance)
        described["__metadata__"]["nemo_ext"] = inner.decode()
        header = json.dumps(described).encode()
    else:
        header = json_changed(header, chance)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + tensors


def tensor_changed(content: bytes, chance: random.Random) -> bytes:
    """Eight bytes of a safetensors file's tensors become a float64 or int64 that means nothing there."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    words = (len(content) - start) // 8
    if words == 0:
        return content
    value = chance.choice(
        [struct.pack("<d", number) for number in (float("nan"), float("inf"), -1.0, -3.5, 1e308, 0.5)]
        + [struct.pack("<q", number) for number in (-1, 2**62)]
    )
    place = start + 8 * chance.randrange(words)
    return content[:place] + value + content[place + 8 :]


def damaged(
    content: bytes, kinds: tuple[Callable[[bytes, random.Random], bytes], ...], count: int, seed: int = 0
) -> Iterator[tuple[str, bytes]]:
    """Damaged copies of a file, with the name of the damage; the kinds take turns.

    Args:
        content: the undamaged file.
        kinds: the damages.
        count: how many copies.
        seed: of the random choices.
    """
    chance = random.Random(seed)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        changed = kind(content, chance)
        if changed != content:
            yield kind.__name__, changed
