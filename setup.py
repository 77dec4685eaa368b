"""Builds the two compiled modules. All other settings of the package are in pyproject.toml.

`nemo_ext._C`       contains the operators. It is built against PyTorch's stable ABI, so that one binary works with CPU
                    and CUDA builds of PyTorch, from TARGETED_TORCH on, with or without a GPU.
`nemo_ext._module`  contains build facts and CPU capabilities. It does not use PyTorch.

Both keep to Python's stable ABI, so that one wheel serves every Python from 3.10 on.

CONTRIBUTING.md, section "CUDA kernels", explains the environment variables that control the build. The GPUs of the
build machine are never consulted.

PyTorch's CUDAExtension is not used, for two reasons: it refuses to compile CUDA with a CPU build of PyTorch, and it
finds a wrong toolkit folder if nvcc is a wrapper script.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup

TARGETED_TORCH = (2, 10)

# The include path is the root and not csrc, because csrc/math.h would hide the system's math.h.
ROOT = Path(__file__).resolve().parent

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"nemo_ext needs {error.name} to build: install it first "
        '(pip install "torch>=2.10" ninja), '
        "or let pip do so by leaving out --no-build-isolation."
    )

installed = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if installed < TARGETED_TORCH:
    sys.exit(f"nemo_ext needs torch>=2.10 to build, got {torch.__version__}: pip install -U 'torch>=2.10'.")

STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{TARGETED_TORCH[0]:02x}{TARGETED_TORCH[1]:02x}000000000000"
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]

NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# Machine code for GPUs from Ampere on, and PTX for the oldest, which the driver compiles for GPUs that are not listed.
DEFAULT_ARCHITECTURES = "80+PTX;86;89;90;100;120"
OLDEST_ARCHITECTURE = 80
ARCHITECTURE_LISTS = ("NEMO_EXT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
OLDEST_TOOLKIT = (12, 0)  # the first one with C++20


class Unusable(Exception):
    """States why a CUDA toolkit can't compile the kernels."""


class Toolkit(NamedTuple):
    nvcc: str
    version: str
    runtime: str  # path of the static CUDA runtime library
    architectures: list[str]  # those to compile for
    unknown: list[str]  # those that were wanted and that it does not know

    def outcome(self) -> str:
        """Return how the kernels were compiled, for the build facts."""
        without = f", which does not know {', '.join(self.unknown)}" if self.unknown else ""
        return f"compiled by nvcc {self.version}{without}"


def cuda_choice(environment: Mapping[str, str]) -> str:
    choice = environment.get("NEMO_EXT_CUDA") or "auto"
    if choice not in ("auto", "0", "1"):
        sys.exit(f"NEMO_EXT_CUDA must be auto, 0 or 1, got {choice!r}.")
    return choice


def cuda_architectures(environment: Mapping[str, str]) -> list[str]:
    """Return the targets in nvcc's notation: machine code (`sm_80`, …), then PTX (`compute_80`, …)."""
    variable = next((name for name in ARCHITECTURE_LISTS if environment.get(name)), "")
    machine_code, ptx = [], []
    for name in re.findall(r"[^;,\s]+", environment[variable] if variable else DEFAULT_ARCHITECTURES):
        # A suffix like that of 9.0a or 10.0f is dropped, because the kernels use no architecture-specific feature.
        match = re.fullmatch(r"(\d+)\.?(\d)[af]?(\+PTX)?", name)
        if match is None:
            sys.exit(f"{variable} must name architectures like 80, 9.0 or 9.0+PTX, separated by ';', got {name!r}.")
        number, with_ptx = match[1] + match[2], match[3]
        if int(number) < OLDEST_ARCHITECTURE:
            # This is no error, because many container images set TORCH_CUDA_ARCH_LIST for all extensions.
            if variable == "TORCH_CUDA_ARCH_LIST":
                print(f"nemo_ext: {name} of {variable} is left out, the kernels need 8.0 or newer")
                continue
            sys.exit(f"{variable} must name architectures of 80 or newer, which the kernels need, got {name!r}.")
        machine_code.append(f"sm_{number}")
        if with_ptx:
            ptx.append(f"compute_{number}")
    if not machine_code:
        sys.exit(f"{variable} must name an architecture of 8.0 or newer, got {environment[variable]!r}.")
    return list(dict.fromkeys(machine_code + ptx))


def host_compiler_of(command: list[str]) -> str:
    """Return the compiler's name in a command like "ccache g++ -m64": nvcc takes no more than a name."""
    return next(word for word in command if not word.endswith("cache"))


def nvcc_candidates(environment: Mapping[str, str]) -> list[str]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            # The user asked for this toolkit, so no other one replaces it.
            return [os.path.join(os.path.abspath(environment[variable]), "bin", "nvcc")]
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    # PyPI's packages install nvcc to nvidia/cu13, which is not on the PATH.
    in_packages = [path for folder in sys.path for path in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"))]
    others = [str(path) for path in (Path("/usr/local/cuda/bin/nvcc"), *in_packages) if path.exists()]
    return list(dict.fromkeys([on_path, *others] if on_path else others))


def all_are_needed(environment: Mapping[str, str]) -> bool:
    """Whether a toolkit is unusable that does not know all architectures: somebody wants kernels, and for these."""
    return cuda_choice(environment) == "1" and any(environment.get(name) for name in ARCHITECTURE_LISTS)


def toolkit_of(nvcc: str, host_compiler: str, architectures: list[str], *, all_needed: bool) -> Toolkit:
    """Return the toolkit that `nvcc` belongs to. Only nvcc knows its folders, because it may be a wrapper script."""

    def ask(*arguments: str) -> str:
        try:
            answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=True)
        except OSError as error:
            raise Unusable(f"{nvcc} does not start ({error.strerror})") from None
        except subprocess.CalledProcessError as error:
            said = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
            raise Unusable(f"{nvcc} {arguments[0]} fails ({said})") from None
        return answer.stdout + answer.stderr

    version = re.search(r"release .*V(\d+(?:\.\d+)+)", ask("--version"))
    if version is None:
        raise Unusable(f"{nvcc} --version prints no release")
    if tuple(int(part) for part in version[1].split(".")[:2]) < OLDEST_TOOLKIT:
        oldest = ".".join(map(str, OLDEST_TOOLKIT))
        raise Unusable(f"{nvcc} is of CUDA {version[1]}, and the kernels need {oldest} or newer")
    listed = ask("--list-gpu-code").split() + ask("--list-gpu-arch").split()
    known, unknown = ([name for name in architectures if (name in listed) is there] for there in (True, False))
    if unknown and (all_needed or not known):
        raise Unusable(f"{nvcc} is of CUDA {version[1]}, which does not know {', '.join(unknown)}")
    # A dry run prints the commands that nvcc would run, with the toolkit's folders; the source need not exist.
    dry_run = ask("--dryrun", "-ccbin", host_compiler, "-c", "kernels.cu")
    for flag, name in (("-I", "cuda_runtime.h"), ("-L", "libcudart_static.a")):
        folders = re.findall(f'"{flag}([^"]+)"', dry_run)
        found = next((path for path in (Path(folder, name) for folder in folders) if path.is_file()), None)
        if found is None:
            raise Unusable(f"the toolkit of {nvcc} has no {name}")
    return Toolkit(nvcc, version[1], str(found), known, unknown)


def find_toolkit(environment: Mapping[str, str], host_compiler: str, architectures: list[str]) -> Toolkit:
    reasons = []
    for nvcc in nvcc_candidates(environment):
        try:
            return toolkit_of(nvcc, host_compiler, architectures, all_needed=all_are_needed(environment))
        except Unusable as reason:
            reasons.append(str(reason))
    raise Unusable("; ".join(reasons) or "there is no nvcc on the PATH, in /usr/local/cuda or in the Python packages")


def compile_kernels(toolkit: Toolkit, host_compiler: str, folder: Path) -> Path:
    """Compile csrc/cuda/value_projection.cu if its inputs have changed, and return the path of the object file."""
    source = ROOT / "csrc" / "cuda" / "value_projection.cu"
    target = folder / "csrc" / "cuda" / "value_projection.cu.o"
    command = [toolkit.nvcc, "-ccbin", host_compiler, *NVCC_FLAGS, f"-I{ROOT}"]
    for name in toolkit.architectures:
        command.append(f"-gencode=arch=compute_{name.partition('_')[2]},code={name}")
    command += ["-c", str(source), "-o", str(target)]

    # nvcc reads further options from these two environment variables.
    options = [os.environ.get(f"NVCC_{which}_FLAGS", "") for which in ("PREPEND", "APPEND")]
    inputs = hashlib.sha256(shlex.join([toolkit.version, *options, *command]).encode())
    for path in sorted([*(ROOT / "csrc").glob("*.h"), *source.parent.glob("*.*")]):
        inputs.update(path.read_bytes())
    stamp = target.with_suffix(".sha256")
    if target.exists() and stamp.exists() and stamp.read_text() == inputs.hexdigest():
        return target

    stamp.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs = min(len(toolkit.architectures), int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    command.append(f"--threads={jobs}")
    print(shlex.join(command), flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(
            f"nvcc {toolkit.version} could not compile {source.relative_to(ROOT)}, its messages are above. "
            "To build without CUDA kernels, set NEMO_EXT_CUDA=0."
        )
    stamp.write_text(inputs.hexdigest())
    return target


class BuildWithFacts(BuildExtension):
    """Checks that there is a compiler, adds the CUDA kernels, and defines the build facts that `_module` reports."""

    def build_extensions(self) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(compiler[0]) is None:
            sys.exit(
                f"nemo_ext needs a C++20 compiler to build, and {compiler[0]!r} was not found: install one "
                "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda: conda install gxx), "
                "or set CXX to its name."
            )
        operators, module = self.extensions
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
        cuda, architectures = self.add_cuda(operators, compiler)
        print(f"nemo_ext: CUDA kernels {cuda}", flush=True)
        facts = {
            "VERSION": self.distribution.get_version(),
            "COMPILER": version.splitlines()[0],
            "FLAGS": " ".join([*FLAGS, STABLE_ABI]),
            "TORCH": torch.__version__,
            "PLATFORM": f"{platform.system()} {platform.machine()}",
            "CUDA": cuda,
            "CUDA_ARCHITECTURES": " ".join(architectures),
        }
        module.define_macros = [(f"NEMO_EXT_{key}", json.dumps(value)) for key, value in facts.items()]
        super().build_extensions()

    def add_cuda(self, operators: Extension, compiler: list[str]) -> tuple[str, list[str]]:
        """Add the CUDA kernels if they are wanted and can be built; return the outcome and the architectures."""
        choice = cuda_choice(os.environ)
        if choice == "0":
            return "left out: NEMO_EXT_CUDA=0", []
        architectures = cuda_architectures(os.environ)
        host_compiler = host_compiler_of(compiler)
        try:
            toolkit = find_toolkit(os.environ, host_compiler, architectures)
        except Unusable as reason:
            if choice == "1":
                sys.exit(
                    f"NEMO_EXT_CUDA=1 needs a CUDA toolkit for {', '.join(architectures)}, and found none: {reason}. "
                    "Set CUDA_HOME to the folder of one, or set NEMO_EXT_CUDA=0 to build without CUDA kernels."
                )
            return f"left out: {reason}", []
        operators.extra_objects = [str(compile_kernels(toolkit, host_compiler, Path(self.build_temp))), toolkit.runtime]
        operators.libraries += ["dl", "rt", "pthread"]
        operators.sources.append("csrc/cuda/value_projection.cpp")
        return toolkit.outcome(), toolkit.architectures


if __name__ == "__main__":
    setup(
        ext_modules=[
            CppExtension(
                "nemo_ext._C",
                [
                    "csrc/registration.cpp",
                    "csrc/cpu/value_projection.cpp",
                    "csrc/cpu/variant_default.cpp",
                    "csrc/cpu/variant_avx2.cpp",
                    "csrc/cpu/variant_avx512.cpp",
                    "csrc/cpu/variant_avx512_bf16.cpp",
                    "csrc/cpu/variant_amx.cpp",
                ],
                py_limited_api=True,
                include_dirs=[str(ROOT)],
                # PyTorch reports where a kernel was registered. The path should start at the root of these sources.
                extra_compile_args=[*FLAGS, STABLE_ABI, f"-ffile-prefix-map={ROOT}/="],
            ),
            Extension(
                "nemo_ext._module",
                ["csrc/module.cpp"],
                language="c++",
                py_limited_api=True,
                include_dirs=[str(ROOT)],
                extra_compile_args=FLAGS,
            ),
        ],
        cmdclass={"build_ext": BuildWithFacts},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
