"""Progress bars: named, on stderr, and silent where nobody looks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias


class Progress:
    """A group of named bars on stderr that can be handed down into nested calls.

    Args:
        enabled: True draws, False is silent, None draws only where stderr is a terminal.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self._bars: Any = None

    def __enter__(self) -> "Progress":
        if self.enabled:
            # Imported here so that silent use never pays for rich.
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
            )
            from rich.progress import (
                Progress as RichProgress,
            )

            self._bars = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                # Not asked for on anything but a terminal, or by name.
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
        """Show a bar called `name` for as long as the block lasts; call what is given to advance.

        Args:
            name: what is being counted.
            total: how many steps there will be at most; None where that isn't known.
        """
        if self._bars is None:
            yield lambda steps: None
            return
        identifier = self._bars.add_task(name, total=total)
        try:
            yield lambda steps: self._bars.advance(identifier, steps)
        finally:
            self._bars.remove_task(identifier)


ProgressLike: TypeAlias = Progress | bool | None


def open_progress(progress: ProgressLike) -> Any:
    """A context manager giving a `Progress`: the caller's own, left open, or a new one.

    Args:
        progress: a `Progress` already entered, or what `Progress(enabled=…)` takes.
    """
    return nullcontext(progress) if isinstance(progress, Progress) else Progress(progress)
