"""Tables that other parts of the package add to the report, among them those of an evaluation."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_ext.errors import NemoError
from nemo_ext.results.folder import EVALUATION_SUMMARY


@dataclass(frozen=True)
class ReportTable:
    """A table that the report shows after its summary. All texts are shown as they are, and never as markup.

    Attributes:
        title: the heading above the table.
        caption: a sentence that says what the table shows.
        columns: the names of the columns.
        rows: the cells of each row, one for each column.
        numbers: the positions of the columns that hold numbers, which are aligned to the right.

    Raises:
        ValueError: a row has another number of cells than there are columns, or there is no column at a position.
    """

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table '{self.title}': wanted {len(self.columns)} cells in a row, got {len(row)}")
        for position in self.numbers:
            if not 0 <= position < len(self.columns):
                raise ValueError(f"table '{self.title}': column {position} of {len(self.columns)} does not exist")


def evaluation_tables(folder: str | Path) -> list[ReportTable]:
    """The tables of the evaluation in a results folder, one for each group of prompts; none if there is no evaluation.

    Raises:
        NemoError: the file is not one that `nemo-ext evaluate` has written.
    """
    path = Path(folder) / EVALUATION_SUMMARY
    if not path.is_file():
        return []
    groups: dict[str, dict[str, dict[str, str]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if None in row.values():
                    raise ValueError("a row is cut off")
                number = f"{float(row['value']):.3g}" if row["value"] else "–"
                deviation = f" ± {float(row['deviation']):.2g}" if row["deviation"] else ""
                groups.setdefault(row["group"], {}).setdefault(row["measure"], {})[row["stage"]] = number + deviation
    except (KeyError, ValueError, TypeError, csv.Error, OSError) as error:
        raise NemoError(f"{path} is not the summary of an evaluation: run `nemo-ext evaluate` again") from error
    stages = ("before", "after", "control")
    return [
        ReportTable(
            title=f"Evaluation: {group}",
            caption="Median ± median absolute deviation over the prompts, without neurons off, with the found neurons "
            "off, and with as many random neurons off.",
            columns=("measure", *stages),
            rows=[(measure, *(values.get(stage, "–") for stage in stages)) for measure, values in measures.items()],
            numbers=(1, 2, 3),
        )
        for group, measures in groups.items()
    ]
