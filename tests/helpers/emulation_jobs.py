"""Jobs for the emulation, and a script that runs them in a process of its own.

A job is a dictionary of the arguments of `project`, `project_on_cpu` or `run_self_test` in csrc/emulation/module.cpp.
The kernels write results into its arrays. A strided array is stored as the elements from its first to its last, `NAME`,
with `NAME_shape`, `NAME_strides` and `NAME_offset` in elements, so that it can be written to a file.

This module imports only NumPy, so that a process under a sanitizer need not load torch.

    python emulation_jobs.py MODULE.so JOBS.npz
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

Job = dict[str, Any]
STRIDED = ("hidden", "weight")


def load(path: Path) -> ModuleType:
    """Load a compiled module under a unique name, because pybind11 takes two modules of one name for the same."""
    name = f"{path.stem}._emulation"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run(module: ModuleType, job: Job) -> None:
    arguments = dict(job)
    if "name" in job:
        module.run_self_test(**arguments)
        return
    for name in STRIDED:
        shape, strides, offset = (arguments.pop(f"{name}_{part}") for part in ("shape", "strides", "offset"))
        elements = arguments[name]
        arguments[name] = np.lib.stride_tricks.as_strided(
            elements[offset:], shape, np.multiply(strides, elements.itemsize)
        )
    (module.project_on_cpu if "variant" in job else module.project)(**arguments)


def save(path: Path, jobs: list[Job]) -> None:
    np.savez(path, **{f"{i}/{name}": value for i, job in enumerate(jobs) for name, value in job.items()})


def read(path: Path) -> list[Job]:
    jobs: dict[int, Job] = {}
    with np.load(path) as arrays:
        for key in arrays:
            i, name = key.split("/")
            value = arrays[key]
            jobs.setdefault(int(i), {})[name] = value if value.ndim else value.item()
    return [jobs[i] for i in sorted(jobs)]


if __name__ == "__main__":
    emulation = load(Path(sys.argv[1]))
    for number, one in enumerate(read(Path(sys.argv[2]))):
        print(f"job {number}", file=sys.stderr, flush=True)  # the last one is whose the report is
        run(emulation, one)
