"""Build of the two compiled modules; everything that is not about compiling is in pyproject.toml.

`nemo_ext._C`       the operators, against PyTorch's stable ABI: one binary for CPU and CUDA builds of PyTorch,
                    from the targeted version on.
`nemo_ext._module`  build facts and CPU capabilities, without PyTorch, through pybind11.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys

from setuptools import Extension, setup

TARGETED_TORCH = (2, 13)

# The root and not csrc: a csrc on the include path would put its math.h before the system's.
ROOT = os.path.dirname(os.path.abspath(__file__))

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"nemo_ext needs {error.name} to build: install it first "
        '(pip install "torch>=2.13,<2.14" "pybind11>=3.0" ninja), '
        "or let pip do so by leaving out --no-build-isolation."
    )

installed = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if installed < TARGETED_TORCH:
    sys.exit(f"nemo_ext needs torch>=2.13 to build, got {torch.__version__}: pip install -U 'torch>=2.13,<2.14'.")

STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{TARGETED_TORCH[0]:02x}{TARGETED_TORCH[1]:02x}000000000000"
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]


class BuildWithFacts(BuildExtension):
    """Says what to install where there is no compiler, and tells `_module` how it was built."""

    def build_extensions(self) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(compiler[0]) is None:
            sys.exit(
                f"nemo_ext needs a C++20 compiler to build, and {compiler[0]!r} was not found: install one "
                "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda: conda install gxx), "
                "or set CXX to its name."
            )
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
        facts = {
            "VERSION": self.distribution.get_version(),
            "COMPILER": version.splitlines()[0],
            "FLAGS": " ".join([*FLAGS, STABLE_ABI]),
            "TORCH": torch.__version__,
            "PLATFORM": f"{platform.system()} {platform.machine()}",
        }
        for extension in self.extensions:
            if extension.name == "nemo_ext._module":
                extension.define_macros = [(f"NEMO_EXT_{key}", f'"{value}"') for key, value in facts.items()]
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "nemo_ext._C",
            [
                "csrc/registration.cpp",
                "csrc/cpu/value_projection.cpp",
                "csrc/cpu/tile_default.cpp",
                "csrc/cpu/tile_avx2.cpp",
                "csrc/cpu/tile_avx512.cpp",
                "csrc/cpu/tile_avx512_bf16.cpp",
            ],
            py_limited_api=True,
            include_dirs=[ROOT],
            extra_compile_args=[*FLAGS, STABLE_ABI],
        ),
        Extension(
            "nemo_ext._module",
            ["csrc/module.cpp"],
            language="c++",
            include_dirs=[ROOT, pybind11.get_include()],
            extra_compile_args=FLAGS,
        ),
    ],
    cmdclass={"build_ext": BuildWithFacts},
)
