"""What a process does with the emulation: run jobs, each a kernel's arguments. NumPy alone, for sanitizers' sake.

A job is a dictionary of the arguments of `project`, `project_on_cpu` or `run_probe` in csrc/emulation/module.cpp.
Results are written into its arrays. Strided arrays are the elements from the first to the last, `NAME`, with
`NAME_shape`, `NAME_strides` and `NAME_offset`, in elements, so that they survive a file.

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
    """The compiled module, under a name of its own: to pybind11 two of one name are the same."""
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
        module.run_probe(**arguments)
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
