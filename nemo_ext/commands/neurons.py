"""`nemo-ext neurons`, a command as `nemo_ext.commands.Command` describes it."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.commands.shared import NOTHING_WRITTEN, new_table, plain, show, whole_number
from nemo_ext.errors import NemoError

if TYPE_CHECKING:
    from rich.table import Table

    from nemo_ext.neurons import NeuronSet

NAME = "neurons"
SUMMARY = "compare the neurons of several prompts, and combine them"
DESCRIPTION = """\
Compare the neurons that were found for several prompts, or combine them into one set.

  union         all neurons of all prompts; with --top K, the K neurons that most prompts share
  intersection  the neurons that every prompt has
  frequency     how many prompts each neuron belongs to; with --top K, the K most frequent neurons
  overlap       how much the sets of every two prompts overlap (Jaccard index: shared neurons / all neurons)
  clusters      groups of prompts that share neurons: the overlap of one with another is --at-least X

Whether a combined set stops all prompts at once, and what it does to ordinary ones, is a measurement:
`nemo-ext evaluate --neurons FILE`.

reads   --neurons  results folders, results.jsonl files, or files of neurons (.json, .safetensors); the neurons of a
                   result count if its prompt is memorized, unless its images were checked and still replicate
writes  --out      union and intersection: a set of neurons (.json, .safetensors), for `generate`, `evaluate` and
                   `bake`; the others: a table (.csv, .json)

example:
  nemo-ext neurons frequency --neurons results --top 20
  nemo-ext neurons union --neurons results-1 results-2 --out union.json
"""
WHEN_STOPPED = NOTHING_WRITTEN
SHARED = False

_SETS = ("union", "intersection")
_SHOWN = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=(*_SETS, "frequency", "overlap", "clusters"), help="see above")
    parser.add_argument(
        "--neurons",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="results folders, results.jsonl files, or files of neurons",
    )
    parser.add_argument(
        "--top", type=whole_number(1), metavar="K", help="union, frequency: the K most frequent neurons"
    )
    parser.add_argument(
        "--at-least",
        type=_overlap,
        metavar="X",
        help="clusters: the overlap from which two prompts are connected, above 0 and at most 1 (default: 0.1)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the file to write (default: the table is only printed)"
    )


def run(args: argparse.Namespace) -> None:
    """Read all sets, combine or compare them, write the result, and print it."""
    from nemo_ext.files import check_output_file

    for option, value, commands in (
        ("--top", args.top, ("union", "frequency")),
        ("--at-least", args.at_least, ("clusters",)),
    ):
        if value is not None and args.what not in commands:
            raise NemoError(f"{option} is for {' and '.join(commands)}, not for {args.what}")
    if args.out is not None:
        check_output_file(args.out, suffixes=(".json", ".safetensors") if args.what in _SETS else (".csv", ".json"))
    from nemo_ext.results.sources import choose

    chosen = choose(args.neurons)
    if args.what in _SETS:
        neurons = _combined(args, list(chosen.sets.values()))
        table = new_table(f"{args.what.capitalize()} of {len(chosen.sets)} sets", "layer", "neurons")
        for layer, indices in neurons.items():
            table.add_row(layer, str(len(indices)))
        if args.out is not None:
            neurons.save(args.out)
    else:
        rows = {"frequency": _frequency, "overlap": _overlaps, "clusters": _clusters}[args.what](args, chosen.sets)
        table = _table(args.what, rows)
        if args.out is not None:
            _write(args.out, rows)
    show(table, *chosen.notes, *([f"Written: {args.out}"] if args.out is not None else []))


def _combined(args: argparse.Namespace, sets: Sequence[NeuronSet]) -> NeuronSet:
    from nemo_ext.aggregate import intersection, most_frequent
    from nemo_ext.neurons import NeuronSet

    if args.what == "intersection":
        return intersection(sets)
    return NeuronSet.union(sets) if args.top is None else most_frequent(sets, args.top)


def _frequency(args: argparse.Namespace, sets: Mapping[str, NeuronSet]) -> list[dict[str, Any]]:
    from nemo_ext.aggregate import frequencies

    counts = list(frequencies(list(sets.values())).items())[: args.top]
    return [
        {"layer": layer, "neuron": index, "prompts": count, "share": round(count / len(sets), 4)}
        for (layer, index), count in counts
    ]


def _overlaps(args: argparse.Namespace, sets: Mapping[str, NeuronSet]) -> list[dict[str, Any]]:
    from nemo_ext.aggregate import overlaps

    matrix = overlaps(list(sets.values()))
    names = list(sets)
    pairs = [
        {"prompt": names[i], "other": names[j], "overlap": round(float(matrix[i, j]), 4)}
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]
    return sorted(pairs, key=lambda pair: -pair["overlap"])


def _clusters(args: argparse.Namespace, sets: Mapping[str, NeuronSet]) -> list[dict[str, Any]]:
    from nemo_ext.aggregate import clusters, intersection

    names, values = list(sets), list(sets.values())
    groups = clusters(values, 0.1 if args.at_least is None else args.at_least)
    return [
        {
            "cluster": number,
            "prompt": names[place],
            "neurons": len(values[place]),
            "shared": len(intersection([values[member] for member in group])),
        }
        for number, group in enumerate(groups, start=1)
        for place in group
    ]


def _table(what: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    more = f", the first {_SHOWN} of {len(rows)}" if len(rows) > _SHOWN else ""
    table = new_table(what.capitalize() + more, *(rows[0] if rows else ("nothing",)))
    for row in rows[:_SHOWN]:
        table.add_row(*(plain(str(value)) for value in row.values()))
    return table


def _write(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from nemo_ext.files import replacing

    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if out.suffix == ".json":
            json.dump(list(rows), file, indent=1, ensure_ascii=False)
            file.write("\n")
        else:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _overlap(text: str) -> float:
    """The type of `--at-least`."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number above 0 and at most 1")
    return number
