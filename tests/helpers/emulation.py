"""The emulation of the CUDA kernels and of the CPU kernels' variants: its builds, and jobs for the operators' cases.

A build is made from the current sources when a test first asks for it. It is kept in build/emulation under a hash of
everything that went into it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import emulation_jobs
import numpy as np
import pybind11
import pytest
import torch
from emulation_jobs import Job

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulation"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))

TORCH_INCLUDES = ["-isystem", str(Path(torch.__file__).parent / "include")]  # for its header of float16 conversions
# No contraction to fused multiply-adds: the emulated instructions define where they round.
FLAGS = [
    "-std=c++20",
    "-ffp-contract=off",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
VARIANTS = ("avx2", "avx512", "avx512_bf16", "amx")
# In the order of linking. Of functions that the emulator and the kernels both define, the linker takes the first: it
# must be the emulator's, which is compiled without ThreadSanitizer.
UNITS = (
    *("emulation/emulator", "emulation/projection", "emulation/self_tests", "emulation/module", "emulation/cpu"),
    *(f"cpu/variant_{name}" for name in VARIANTS),
)
# Where a fault is planted: in the CUDA kernels, and in one variant of the CPU kernels.
FAULTY = ("emulation/projection", "cpu/variant_amx")


@dataclass(frozen=True)
class Fault:
    """A fault to plant: `replacement` takes the place of `snippet`, which occurs in `file` exactly once."""

    file: str
    snippet: str
    replacement: str

    def plant(self, sources: dict[str, str]) -> dict[str, str]:
        found = sources[self.file].count(self.snippet)
        assert found == 1, f"{self.file} must contain this once, but contains it {found} times: {self.snippet}"
        return {**sources, self.file: sources[self.file].replace(self.snippet, self.replacement)}


@functools.cache
def _compiler_version() -> str:
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler to build the emulation with: {COMPILER[0]!r} was not found")
    return subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _sources() -> dict[str, str]:
    files = [ROOT / "csrc" / "math.h", ROOT / "csrc" / "projection.h"]
    files += [file for folder in ("cpu", "cuda", "emulation") for file in sorted((ROOT / "csrc" / folder).iterdir())]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


@functools.cache
def _pattern_flags() -> list[str]:
    """Return the flag that fills uninitialized variables with a pattern, so that reading them shows (since g++ 12)."""
    flag = "-ftrivial-auto-var-init=pattern"
    trial = [*COMPILER, flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return [flag] if subprocess.run(trial, capture_output=True).returncode == 0 else []


def _is_of_cpu(unit: str) -> bool:
    """Whether a unit belongs to the CPU kernels, which share only the headers of csrc/ itself with the CUDA kernels."""
    return unit.startswith("cpu/") or unit == "emulation/cpu"


def _flags(unit: str, sanitizer: str | None, ucontext: bool, fault: Fault | None) -> list[str]:
    flags = [*FLAGS, "-I."]
    if unit == "emulation/projection" and fault and not fault.file.startswith("csrc/cpu/"):
        flags += ["-DNEMO_EXT_FLOAT16_ONLY"]  # there are many such builds, and this takes 5 seconds instead of 9
    if unit == "emulation/module":  # only calls the others, so that one build without sanitizers serves all
        flags += ["-O1", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        return flags
    if _is_of_cpu(unit):
        flags += ["-DNEMO_EXT_EMULATED", "-Wno-unused-parameter", "-Wno-psabi", *TORCH_INCLUDES]
    if unit == "emulation/emulator":
        flags += ["-DNEMO_EXT_THREAD_SANITIZER"] * (sanitizer == "thread") + ["-DNEMO_EXT_UCONTEXT"] * ucontext
    if sanitizer == "thread" and unit not in ("emulation/projection", "emulation/self_tests"):
        return [*flags, "-O2"]  # the emulator itself, and code that runs on one thread
    if sanitizer is None:
        return [*flags, "-O1" if unit == "emulation/projection" else "-O2", *_pattern_flags()]
    return [*flags, "-O1", *SANITIZERS[sanitizer]]


def _run_compiler(arguments: list[str], folder: Path) -> None:
    done = subprocess.run([*COMPILER, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join([*COMPILER, *arguments])}\n{done.stderr}"


def _compiled(unit: str, sources: dict[str, str], flags: list[str]) -> Path:
    folders = ("cpu/", "emulation/cpu") if _is_of_cpu(unit) else ("cuda/", "emulation/")
    headers = tuple(f"csrc/{folder}" for folder in (*folders, "math.h", "projection.h"))
    used = {
        name: text
        for name, text in sources.items()
        if name == f"csrc/{unit}.cpp" or (name.startswith(headers) and name.endswith((".h", ".cuh")))
    }
    key = hashlib.sha256(repr((_compiler_version(), flags, sorted(used.items()))).encode()).hexdigest()[:16]
    target = CACHE / f"{Path(unit).name}-{key}.o"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            for name, text in used.items():
                file = Path(folder, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            _run_compiler([*flags, "-c", f"csrc/{unit}.cpp", "-o", "unit.o"], Path(folder))
            os.replace(Path(folder, "unit.o"), target)
    return target


def build(sanitizer: str | None = None, fault: Fault | None = None, ucontext: bool = False) -> Path:
    """Return the path of the module.

    A `fault` is planted in the units of `FAULTY` only. With one in the CUDA kernels, the module has those of float16
    only.
    """
    version = _compiler_version()
    sources = _sources()
    faulty = fault.plant(sources) if fault else sources

    def compiled(unit: str) -> Path:
        return _compiled(unit, faulty if unit in FAULTY else sources, _flags(unit, sanitizer, ucontext, fault))

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, UNITS))
    flags = ["-shared", *SANITIZERS.get(sanitizer or "", [])]
    key = hashlib.sha256(repr((version, flags, objects)).encode()).hexdigest()[:16]
    target = CACHE / f"_emulation-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _run_compiler([*flags, *map(str, objects), "-o", "module.so"], Path(folder))
            os.replace(Path(folder, "module.so"), target)
    return target


@functools.cache
def module(fault: Fault | None = None, ucontext: bool = False) -> ModuleType:
    """Load a build without sanitizers into this process."""
    return emulation_jobs.load(build(fault=fault, ucontext=ucontext))


@functools.cache
def _runtime(name: str) -> str:
    """Return the path of a library of the compiler that must be loaded before Python."""
    path = subprocess.run(
        [*COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{COMPILER[0]} has no {name} here")
    return str(Path(path).resolve())


@functools.cache
def _fixed_addresses() -> list[str]:
    """Return a command that turns off address randomization, which ThreadSanitizer cannot handle on newer kernels.

    Where the command is not permitted, ThreadSanitizer is tried without it.
    """
    command = ["setarch", "-R"]
    if shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    return []


def sanitizer_report(sanitizer: str, jobs: list[Job], fault: Fault | None = None) -> str:
    """Run jobs under a sanitizer, in a process of their own, and return its report, or "" if it found nothing."""
    _compiler_version()
    # Without libstdc++ the sanitizer does not find the function that throws exceptions.
    preload = [_runtime({"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]), _runtime("libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    path = build(sanitizer, fault)
    with tempfile.TemporaryDirectory() as folder:
        emulation_jobs.save(Path(folder, "jobs.npz"), jobs)
        done = subprocess.run(
            [*_fixed_addresses(), sys.executable, emulation_jobs.__file__, str(path), f"{folder}/jobs.npz"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if "unexpected memory mapping" in done.stdout:
        pytest.skip("ThreadSanitizer cannot run with this kernel's memory layout (vm.mmap_rnd_bits)")
    if done.returncode == 0:
        return ""
    return done.stdout or f"exit status {done.returncode}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)


def _not_a_number(shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Return an array of NaN for results, so that elements which a kernel does not write show."""
    return _bits(torch.full(shape, torch.nan, dtype=dtype)).numpy()


def _operands(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    gradient: torch.Tensor | None,
) -> Job:
    job: Job = {"element": str(hidden.dtype)[6:]} | _strided("hidden", hidden) | _strided("weight", weight)
    for name, small in (("bias", bias), ("scale", scale)):
        if small is not None:
            job[name] = small.float().contiguous().numpy()
    if token_mask is not None:
        job["token_mask"] = token_mask.contiguous().numpy()
    if gradient is not None:
        job["gradient"] = _bits(gradient.contiguous()).numpy()
        job["scale_gradient"] = _not_a_number((hidden.shape[0], weight.shape[0]), torch.float32)
    return job


def _strided(name: str, tensor: torch.Tensor) -> Job:
    """Return the elements behind a tensor, at the same offset from a 16-byte boundary, with NaN between them."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        extent = 0
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    elements = _not_a_number((offset + extent,), tensor.dtype)
    strides = np.multiply(tensor.stride(), tensor.element_size())
    np.lib.stride_tricks.as_strided(elements[offset:], tensor.shape, strides)[...] = _bits(tensor).numpy()
    return {
        name: elements,
        f"{name}_shape": np.array(tensor.shape),
        f"{name}_strides": np.array(tensor.stride()),
        f"{name}_offset": offset,
    }


def projection_job(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    token_mask: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    running: dict[str, torch.Tensor] | None = None,
    values: bool = True,
    multiprocessors: int = 132,
    shape: str | None = None,
    order: str = "forward",
    seed: int = 0,
    adder: tuple[int, int] = (0, 0),
    products: torch.Tensor | None = None,
    launches: int = 1,
) -> Job:
    """Return the job of one operator: `value_projection_stats` if `running` is given, of which the job gets a copy,
    `value_projection_scale_gradient` if `gradient` is given, else `value_projection`.

    It computes as on a GPU with this number of multiprocessors, with the tile that the plan chooses or with `shape`
    (wide, medium, narrow, strided). `adder` is the tensor cores' `Adder` of csrc/emulation/emulator.h: terms, and extra
    bits. With `products`, which is hidden weightᵀ in float32, it takes the library's path, with at least so many
    launches if there are as many prompts.
    """
    batch, tokens, out_features = *hidden.shape[:2], weight.shape[0]
    job = _operands(hidden, weight, bias, scale, token_mask, gradient)
    job |= {"multiprocessors": multiprocessors, "order": order, "seed": seed}
    job |= {"adder_terms": adder[0], "adder_extra_bits": adder[1]}
    if shape is not None:
        job["shape"] = shape
    if products is not None:
        job["products"] = products.numpy()
        job["product_bytes"] = products.nbytes // launches
    if gradient is not None:
        return job
    if values:
        job["values"] = _not_a_number((batch, tokens, out_features), hidden.dtype)
    if running is not None:
        job["activation"] = _not_a_number((batch, out_features), torch.float32)
        job |= {name: buffer.numpy().reshape(-1).copy() for name, buffer in running.items()}
    return job


def cpu_job(
    variant: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    token_mask: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
) -> Job:
    """Return the job of a variant of the CPU kernels: values and activation, or the gradient of the scale."""
    job = _operands(hidden, weight, bias, scale, token_mask, gradient) | {"variant": variant}
    if gradient is None:
        job["activation"] = _not_a_number((hidden.shape[0], weight.shape[0]), torch.float32)
        job["values"] = _not_a_number((*hidden.shape[:2], weight.shape[0]), hidden.dtype)
    return job


def result(job: Job, name: str) -> torch.Tensor:
    """Return an array of a job that has run, as a tensor."""
    tensor = torch.from_numpy(job[name])
    return tensor.view(getattr(torch, job["element"])) if tensor.dtype == torch.uint16 else tensor
