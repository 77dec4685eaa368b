"""Tables that other parts of the package add to the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
