"""Progress bars with names on stderr. They are drawn only on a terminal, unless the caller asks for them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias


class Progress:
    """A context manager that draws a group of named bars on stderr. Callers pass it on to nested calls.

    Args:
        enabled: True draws the bars, False draws nothing, and None draws them only if stderr is a terminal.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self._bars: Any = None

    def __enter__(self) -> "Progress":
        if self.enabled:
            # rich is imported here, because importing it takes time that a run without bars should not spend.
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import (
                Progress as RichProgress,
            )

            self._bars = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                # `enabled` has already decided, so rich must not check for a terminal again.
                console=Console(stderr=True, force_terminal=True),
            )
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a bar called `name` for the length of the block.

        Args:
            name: what the bar counts.
            total: the largest possible number of steps; None if it is not known.

        Yields:
            A function that advances the bar by a number of steps.
        """
        if self._bars is None:
            yield nothing
            return
        identifier = self._bars.add_task(name, total=total)
        try:
            yield lambda steps: self._bars.advance(identifier, steps)
        finally:
            self._bars.remove_task(identifier)


def nothing(steps: int) -> None:
    """Advance no bar."""


#: The type of the argument `progress=` of public functions; `open_progress` describes it.
ProgressLike: TypeAlias = Progress | bool | None


def open_progress(progress: ProgressLike) -> Any:
    """Return a context manager that yields a `Progress`: the caller's, which stays open after the block, or a new one.

    Args:
        progress: a `Progress` that has been entered, or a value for `Progress(enabled=…)`: True draws bars, False draws
            nothing, and None draws them only if stderr is a terminal.
    """
    return nullcontext(progress) if isinstance(progress, Progress) else Progress(progress)
