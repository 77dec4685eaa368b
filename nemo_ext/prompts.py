"""Lists of prompts as people have them: text, CSV and JSON lines; and the rows of every CSV file that users write."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_ext.errors import NemoError


@dataclass(frozen=True)
class Prompt:
    """One prompt of a list.

    Attributes:
        text: the prompt, without whitespace around it.
        label: how the list labels it, such as "VM" or "TM" in the published list; None if it does not.
        url: where its training image is said to be; None if the list does not say it.
        line: the line of the file on which the prompt starts, counted from 1.
    """

    text: str
    label: str | None
    url: str | None
    line: int


@dataclass(frozen=True)
class Layout:
    """What a file with named columns contains.

    Attributes:
        what: what the file is, for messages.
        wanted: how it should look, for messages.
        columns: the meaning of a column -> the names that it may have, in lower case. Other columns are ignored.
        required: the meanings that must have a column.
    """

    what: str
    wanted: str
    columns: Mapping[str, tuple[str, ...]]
    required: tuple[str, ...]


#: The columns that every list of prompts can have. The published list has Caption, URL and type.
COLUMNS: Mapping[str, tuple[str, ...]] = {"prompt": ("caption", "prompt", "text"), "label": ("type", "label")}

_PROMPTS = Layout(
    what="the prompt file",
    wanted="write a text file with one prompt per line, or a .csv or .jsonl file with captions in a column or key "
    "named caption, prompt or text",
    columns={**COLUMNS, "url": ("url",)},
    required=("prompt",),
)
_TABLES = (".csv", ".tsv")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_DELIMITERS = ";,\t"
#: The delimiter of a file with a single column, whose values can have any of the others; it is in no readable text.
_NO_DELIMITER = "\x1f"


def read_prompt_list(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read a list of prompts. The ending of the file's name says its format.

    - .csv or .tsv: the first line names the columns, which are separated by semicolons, commas or tabs. A column is
      named caption, prompt or text; the columns type or label, and url, are kept if they are there.
    - .jsonl, .ndjson or .json: each line is a JSON object with such keys.
    - any other ending: text with one prompt per line. No character has a special meaning.

    Upper and lower case are the same in the names of columns and keys. Blank lines are skipped, and whitespace around a
    prompt is removed.

    Args:
        path: a UTF-8 file, with or without a byte order mark.

    Returns:
        The prompts, in the order of the file; one or more.

    Raises:
        NemoError: the file does not exist, cannot be read, is not UTF-8 text, has no prompt, or is not in its format.
            The message names the file and, if there is one, the line.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending in _TABLES:
        rows = read_table(path, _PROMPTS)
    elif ending in _JSON_LINES:
        rows = _read_json_lines(path)
    else:
        rows = _read_lines(path)
    prompts = []
    for line, row in rows:
        text = row["prompt"]
        if not text:
            raise NemoError(f"{path}, line {line}: the prompt is empty")
        if not _is_encodable(text):
            raise NemoError(f"{path}, line {line}: the prompt has half of a surrogate pair, which is no character")
        prompts.append(Prompt(text, row.get("label") or None, row.get("url") or None, line))
    if not prompts:
        raise NemoError(f"{_PROMPTS.what} {path} is empty: {_PROMPTS.wanted}")
    return prompts


def labels_of(prompts: Sequence[Prompt], path: str | os.PathLike[str]) -> dict[str, str]:
    """The labels of a list: prompt -> label, for the prompts that have one.

    Args:
        prompts: what `read_prompt_list` has returned.
        path: the file, for the message.

    Raises:
        NemoError: one prompt has two labels.
    """
    labels: dict[str, str] = {}
    for prompt in prompts:
        if prompt.label is not None and labels.setdefault(prompt.text, prompt.label) != prompt.label:
            raise NemoError(
                f"{path}, line {prompt.line}: the label is {prompt.label}, and an earlier line of this prompt has "
                f"{labels[prompt.text]}"
            )
    return labels


def read_table(path: Path, layout: Layout) -> Iterator[tuple[int, dict[str, str]]]:
    """Read the rows of a CSV file whose first line names the columns, separated by semicolons, commas or tabs.

    Args:
        path: a UTF-8 file, with or without a byte order mark.
        layout: the columns.

    Yields:
        For each row, the line on which it starts, and meaning -> value without whitespace around it, for the columns of
        the layout that the file has.

    Raises:
        NemoError: the file cannot be read, is not UTF-8 text, lacks a required column, or is not valid CSV; or a row
            has another number of values than there are columns.
    """
    text = _read_text(path, layout)
    end = 0
    try:
        delimiter = max(_DELIMITERS, key=lambda one: _columns_found(text, one, layout))
        if len(_header(text, delimiter)) < 2:
            delimiter = _NO_DELIMITER
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = next(reader, [])
        places = _places(names, layout, f"{path}, line 1")
        end = reader.line_num
        for values in reader:
            start, end = end + 1, reader.line_num
            if not values:
                continue
            if len(values) != len(names):
                raise NemoError(
                    f"{path}, line {start}: there are {'more' if len(values) > len(names) else 'fewer'} values than "
                    f"columns: put a text that holds a {_name_of(delimiter)} into double quotes"
                )
            yield start, {meaning: values[place].strip() for meaning, place in places.items()}
    except csv.Error as error:
        raise NemoError(f"{path}, line {end + 1} or after it: {error}: {layout.wanted}") from error


def _header(text: str, delimiter: str) -> list[str]:
    return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])


def _columns_found(text: str, delimiter: str, layout: Layout) -> tuple[int, int]:
    """How well a delimiter fits: the number of the layout's columns that it finds in the header, and of all columns."""
    try:
        names = {name.strip().casefold() for name in _header(text, delimiter)}
    except csv.Error:
        return 0, 0
    return sum(not names.isdisjoint(layout.columns[meaning]) for meaning in layout.columns), len(names)


def _places(names: Sequence[str], layout: Layout, where: str, kind: str = "column") -> dict[str, int]:
    """For each meaning of the layout the position of its column, or `kind`, among `names`.

    Raises:
        NemoError: a required column is missing, or two columns have the same meaning.
    """
    places: dict[str, int] = {}
    folded = [name.strip().casefold() for name in names]
    for meaning, known in layout.columns.items():
        found = [place for place, name in enumerate(folded) if name in known]
        if len(found) > 1:
            both = " and ".join(names[place].strip() for place in found)
            raise NemoError(f"{where}: the {kind}s {both} have the same meaning: keep one of them")
        if found:
            places[meaning] = found[0]
    missing = [" or ".join(layout.columns[meaning]) for meaning in layout.required if meaning not in places]
    if missing:
        raise NemoError(f"{where}: there is no {kind} {f' and no {kind} '.join(missing)}: {layout.wanted}")
    return places


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in _lines(_read_text(path, _PROMPTS)):
        where = f"{path}, line {number}"
        try:
            # Python's JSON, and not the strict one: exported lists have NaN where another column is empty.
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NemoError(f"{where}: the line is not a JSON object: {error}") from error
        if not isinstance(values, dict):
            raise NemoError(f"{where}: the line is not a JSON object, but {type(values).__name__}: {_PROMPTS.wanted}")
        names = list(values)
        row = {}
        for meaning, place in _places(names, _PROMPTS, where, "key").items():
            value = values[names[place]]
            # A label can be a number. A prompt is text.
            if meaning == "label" and isinstance(value, int | float):
                value = json.dumps(value)
            if not isinstance(value, str | None) or (value is None and meaning == "prompt"):
                raise NemoError(f"{where}: '{names[place]}' must be text, got {json.dumps(value)[:40]}")
            row[meaning] = (value or "").strip()
        yield number, row


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for place, (number, line) in enumerate(_lines(_read_text(path, _PROMPTS))):
        # The lines of another format would be searched as if they were prompts.
        if place == 0 and (ending := _other_format(line)):
            raise NemoError(
                f"{path}, line {number}: this looks like {ending[1:].upper()}, not like a prompt: let the name of the "
                f"file end in {ending}"
            )
        yield number, {"prompt": line}


def _other_format(first: str) -> str | None:
    """The ending of the format that the first line of a text file has by mistake; None if it looks like a prompt."""
    known = COLUMNS["prompt"]
    for delimiter in _DELIMITERS:
        names = first.split(delimiter)
        known_names = sum(name.strip('"').casefold() in known for name in names)
        if len(names) > 1 and known_names == 1 and all(name == name.strip() for name in names):
            return ".csv"
    try:
        values = json.loads(first)
    except (ValueError, RecursionError):
        return None
    return ".jsonl" if isinstance(values, dict) and any(str(name).casefold() in known for name in values) else None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank with their numbers, without whitespace around them."""
    # Not `splitlines`: it would split prompts at characters such as the line separator U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _read_text(path: Path, layout: Layout) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise NemoError(f"{layout.what} {path} doesn't exist: {layout.wanted}") from error
    except UnicodeDecodeError as error:
        raise NemoError(f"{layout.what} {path} isn't UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise NemoError(f"{layout.what} {path} can't be read: {error.strerror or error}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise NemoError(f"{layout.what} {path} isn't UTF-8 text (a zero byte in line {line}): save it as UTF-8")
    return text


def _is_encodable(text: str) -> bool:
    """Whether the text is valid Unicode; an escape in JSON can name half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _name_of(delimiter: str) -> str:
    return {";": "semicolon", ",": "comma", "\t": "tab"}.get(delimiter, "separator")
