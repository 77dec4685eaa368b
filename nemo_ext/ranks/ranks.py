"""Several processes that share the work of one command, started by PyTorch's `torchrun` (docs/scale.md).

Each process is a *rank*. The ranks meet in the store of torchrun (`torch.distributed.Store`). There each of them takes
the next unit of work when it is free, rank 0 sees how much is done, and a failure of one is told to all. What the ranks
compute does not go through the store: it is written to a folder that all of them see (`nemo_ext.parts.py`).
No collective operation of torch is needed, and so no process group.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, TypeVar

from nemo_ext.errors import NemoError, reason, warn

_Unit = TypeVar("_Unit")

#: After so many seconds without a sign of life, a rank counts as lost.
PATIENCE = 300.0

_POLL = 0.05
_HEARTBEAT = 0.5
_PARTING = timedelta(seconds=30)
_FAILURE, _TOLD, _LEFT = "nemo_ext/failure", "nemo_ext/told", "nemo_ext/left"
# The value of `_FAILURE` if a rank was stopped with Ctrl-C, which is no error.
_STOPPED = "stopped"


def _interrupt_main_thread() -> None:
    """Raise KeyboardInterrupt in the main thread, also where a shell has started this process in the background.

    There Ctrl-C is ignored, and interrupting by SIGINT would do nothing. The command line handles SIGTERM, too.
    """
    handled = (number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number)))
    _thread.interrupt_main(next(handled, signal.SIGINT))


class Store(Protocol):
    """What the ranks use of a `torch.distributed.TCPStore`, which torchrun provides."""

    def add(self, key: str, value: int, /) -> int: ...

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...

    def clone(self) -> Store: ...


def started_by_torchrun() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, has started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


class Ranks:
    """The ranks that share one job, seen from one of them; a context manager around everything that they do together.

    Every rank calls the same methods in the same order. An exception in one rank ends the others: their current unit is
    interrupted, and they raise a `NemoError` that says which rank has failed and why.

    A rank that is not heard of for `PATIENCE` seconds counts as lost, so no rank waits forever.

    Args:
        rank: the number of this process, from 0.
        count: the number of processes.
        local_rank: the number of this process on its machine, from 0.
        store: where the ranks meet; None if there is one rank only.

    Attributes:
        rank, count, local_rank: as above.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, store: Store | None = None) -> None:
        assert (store is None) == (count == 1)
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._store = store
        self._meetings = 0
        self._failure: str | None = None
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._progress: tuple[str, int, Callable[[int], None]] | None = None
        self._heard: dict[int, tuple[bytes, float]] = {}

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """Return the ranks that torchrun has started, or a single one if it has not started this process.

        Raises:
            NemoError: the store of torchrun cannot be reached.
        """
        if not started_by_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
            return cls()
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, count = next(rendezvous("env://"))
        except (RuntimeError, ValueError) as error:
            raise NemoError(f"the store of torchrun cannot be reached: {error}") from error
        return cls(rank, count, int(os.environ.get("LOCAL_RANK", rank)), store)

    def __enter__(self) -> Ranks:
        if self._store is not None:
            # A store's connection serves one call at a time, so the thread has one of its own.
            self._watcher = threading.Thread(target=self._watch, args=(self._store.clone(),), daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._store is None or self._watcher is None:
            return
        self._closed.set()
        self._watcher.join()
        if isinstance(error, KeyboardInterrupt) and self._failure not in (None, _STOPPED):
            raise NemoError(self._failure) from None
        if error is not None and self._failure is None:
            self._tell_failure(error)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the results and speaks to the user."""
        return self.rank == 0

    def units(self, todo: Sequence[_Unit], done: Callable[[int], None]) -> Iterator[_Unit]:
        """Yield the units of work that fall to this rank. A unit goes to the rank that is the first to be free.

        Args:
            todo: all units, the same on every rank.
            done: called in rank 0 with the number of units that any rank has finished; from another thread if there are
                several ranks.

        Warns:
            NemoWarning: there are more ranks than units.
        """
        if self._store is None:
            for unit in todo:
                yield unit
                done(1)
            return
        if self.first and 0 < len(todo) < self.count:
            idle = self.count - len(todo)
            warn(f"{self.count} ranks share {len(todo)} units of work, so that {idle} of them have nothing to do")
        key = self._key("units")
        self._progress = (f"{key}/done", 0, done)
        while (place := self._store.add(f"{key}/taken", 1) - 1) < len(todo):
            yield todo[place]
            self._store.add(f"{key}/done", 1)
        self.meet()
        self._report_progress(self._store)
        self._progress = None

    def meet(self) -> None:
        """Wait until every rank has come here.

        Raises:
            NemoError: a rank is lost.
        """
        if self._store is None:
            return
        key = self._key("meet")
        self._store.set(f"{key}/{self.rank}", "here")
        for rank in range(self.count):
            self._wait_for(f"{key}/{rank}")

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return in every rank what `make` returns in rank 0.

        Args:
            make: called in rank 0 only; it returns something that JSON can hold.

        Raises:
            NemoError: a rank is lost.
        """
        if self._store is None:
            return make()
        key = self._key("from_first")
        if self.first:
            made = make()
            self._store.set(key, json.dumps(made))
            return made
        self._wait_for(key)
        return json.loads(self._store.get(key))

    def agree(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks know the same facts, such as the model and the settings, and wait until it is certain.

        Args:
            facts: what the fact is about -> the fact.

        Raises:
            NemoError: a rank has another fact than rank 0, or is lost.
        """
        if self._store is None:
            return
        key = self._key("agree")
        self._store.set(f"{key}/{self.rank}", json.dumps(dict(facts)))
        if self.first:
            for rank in range(1, self.count):
                self._wait_for(f"{key}/{rank}")
                theirs = json.loads(self._store.get(f"{key}/{rank}"))
                for about, fact in facts.items():
                    if theirs.get(about) != fact:
                        raise NemoError(
                            f"rank {rank} has another {about} than rank 0: {theirs.get(about)}, wanted {fact}"
                        )
        self.meet()

    def leave(self) -> None:
        """End together, when rank 0 has told the user what there is to tell.

        After a failure the others wait for it, because torchrun ends all processes as soon as one has failed. And rank
        0 waits for the others, because the store ends with it if no launcher holds it.
        """
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # the store is gone, or a rank is lost
            if self.first:
                self._store.set(_TOLD, "")
                self._store.wait([f"{_LEFT}/{rank}" for rank in range(1, self.count)], _PARTING)
            else:
                if self._store.check([_FAILURE]):
                    self._store.wait([_TOLD], _PARTING)
                self._store.set(f"{_LEFT}/{self.rank}", "")

    def _key(self, name: str) -> str:
        """A key of its own for each meeting; all ranks count their meetings alike."""
        self._meetings += 1
        return f"nemo_ext/{self._meetings}/{name}"

    def _wait_for(self, key: str) -> None:
        assert self._store is not None
        while not self._store.check([key]):
            self._check_alive()
            time.sleep(_POLL)

    def _check_alive(self) -> None:
        assert self._store is not None
        now = time.monotonic()
        for rank in range(self.count):
            beat = str(self._store.add(f"nemo_ext/alive/{rank}", 0)).encode()
            known, since = self._heard.get(rank, (b"", now))
            self._heard[rank] = (beat, since if beat == known else now)
            if now - self._heard[rank][1] > PATIENCE:
                raise NemoError(
                    f"rank {rank} has not been heard of for {PATIENCE:.0f} s: its process has ended, or its machine "
                    "cannot be reached; start again to continue"
                )

    def _watch(self, store: Store) -> None:
        """Give signs of life, and end this rank's unit if another rank has failed. Runs in a thread of its own."""
        while not self._closed.wait(_HEARTBEAT):
            try:
                store.add(f"nemo_ext/alive/{self.rank}", 1)
                if store.check([_FAILURE]):
                    self._failure = store.get(_FAILURE).decode()
                else:
                    self._report_progress(store)
            except RuntimeError as error:
                self._failure = f"the store of torchrun is lost: {error}"
            if self._failure is not None:
                _interrupt_main_thread()
                return

    def _report_progress(self, store: Store) -> None:
        if self.first and self._progress is not None:
            key, known, done = self._progress
            now = store.add(key, 0)
            if now > known:
                self._progress = (key, now, done)
                done(now - known)

    def _tell_failure(self, error: BaseException) -> None:
        assert self._store is not None
        said = reason(error) if self.first else f"rank {self.rank}: {reason(error)}"
        with contextlib.suppress(RuntimeError):  # if the store is gone, torchrun ends the other ranks
            self._store.compare_set(_FAILURE, "", _STOPPED if isinstance(error, KeyboardInterrupt) else said)
