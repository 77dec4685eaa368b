"""Processes that are ranks, started without torchrun, which takes seconds for each process.

They get the variables that torchrun sets. Rank 0 holds the store, as under a launcher that has no store of its own. The
processes are forked from one that has imported torch already.
"""

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_ext.errors import NemoError
from nemo_ext.ranks.ranks import Ranks

_CONTEXT = multiprocessing.get_context("forkserver")
# Modules that every path finds: the folder of the helpers is not in that of the server.
_CONTEXT.set_forkserver_preload(
    ["diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "nemo_ext.search.localizer"]
)


def _run(job: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], said: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ranks = Ranks()
    code = 0
    try:
        with Ranks.of_torchrun() as ranks:
            said.put((ranks.rank, job(ranks, *arguments)))
    except NemoError as error:
        said.put((ranks.rank, str(error)))
        code = 1
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 2
    ranks.leave()
    os._exit(code)


class RankProcesses:
    """Running ranks.

    Attributes:
        processes: the processes in the order of the ranks.
    """

    def __init__(self, count: int, job: Callable[..., Any], *arguments: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._said = _CONTEXT.SimpleQueue()
        self.processes: list[Any] = []
        for rank in range(count):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            process = _CONTEXT.Process(target=_run, args=(job, arguments, environment, self._said), daemon=True)
            process.start()
            self.processes.append(process)

    @property
    def alive(self) -> bool:
        """Whether a process is still running."""
        return any(process.is_alive() for process in self.processes)

    def results(self, timeout: float = 300) -> tuple[list[int | None], dict[int, Any]]:
        """Wait for all processes; return their exit codes, and rank -> what its job returned or raised."""
        said = {}
        for process in self.processes:
            process.join(timeout)
        while not self._said.empty():
            rank, value = self._said.get()
            said[rank] = value
        return [process.exitcode for process in self.processes], said

    def kill(self) -> None:
        """Kill all processes at once, as if the machine had lost its power."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@contextmanager
def rank_processes(count: int, job: Callable[..., Any], *arguments: Any) -> Iterator[RankProcesses]:
    """Start ranks, which end with the block."""
    running = RankProcesses(count, job, *arguments)
    try:
        yield running
    finally:
        running.kill()
