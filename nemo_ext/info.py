"""Facts about the packages, the build, and what this machine can run. `python -m nemo_ext.info` prints them."""

from __future__ import annotations

import ctypes
import importlib
import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

# The first driver for each major version of CUDA: https://docs.nvidia.com/deploy/cuda-compatibility/
_DRIVERS = {12: 525, 13: 580}
_PACKAGES = ("nemo_ext", "torch", "diffusers", "transformers", "safetensors", "numpy")


class Gpu(NamedTuple):
    """A CUDA device as PyTorch sees it, and the newest version of CUDA that its driver knows."""

    name: str
    capability: tuple[int, int]
    driver: tuple[int, int]

    @property
    def architecture(self) -> str:
        """The GPU's architecture in nvcc's notation, for example `sm_86`."""
        return "sm_{}{}".format(*self.capability)


def gpus() -> list[Gpu]:
    """Return the CUDA devices that PyTorch sees, in PyTorch's order."""
    import torch

    if not torch.cuda.device_count():
        return []
    driver = cuda_of_driver()
    indices = range(torch.cuda.device_count())
    return [
        Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), driver) for index in indices
    ]


def cuda_of_driver() -> tuple[int, int]:
    """Return the newest version of CUDA that the driver knows, (12, 4) for 12.4; (0, 0) if there is no driver."""
    version = ctypes.c_int(0)
    try:  # not by PyTorch: the function of its private module that told this is gone in some versions
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0, 0
    return version.value // 1000, version.value % 1000 // 10


def cuda_obstacle(build: Mapping[str, Any], gpu: Gpu) -> str | None:
    """Return why the operators can't run on `gpu` and what to do about it, or None if they can run.

    Args:
        build: the result of `nemo_ext._module.build_facts()`.
        gpu: one of `gpus()`.
    """
    compiled = build["cuda_architectures"]
    rebuild = "pip install --force-reinstall --no-deps . in the source tree"
    if not compiled:
        return (
            f"this build of nemo_ext has no CUDA kernels ({build['cuda']}); to have them for {gpu.name}, install a "
            f"CUDA toolkit and run NEMO_EXT_CUDA=1 {rebuild}"
        )
    if any(_runs_on(architecture, gpu.capability) for architecture in compiled):
        return _driver_obstacle(build, gpu)
    obstacle = f"the CUDA kernels of this build ({', '.join(compiled)}) don't run on {gpu.name} ({gpu.architecture})"
    if gpu.capability < (8, 0):
        return f"{obstacle}, they need sm_80 or newer"
    return f"{obstacle}; to have them there, run NEMO_EXT_CUDA=1 NEMO_EXT_CUDA_ARCHS={gpu.architecture[3:]} {rebuild}"


def _driver_obstacle(build: Mapping[str, Any], gpu: Gpu) -> str | None:
    """Return why the driver can't run the kernels, which bring CUDA's runtime along, or None if it can.

    Within a major version, any driver runs any runtime (CUDA's "minor version compatibility").
    """
    toolkit = re.search(r"nvcc (\d+)", build["cuda"])
    if toolkit is None or gpu.driver[0] >= int(toolkit[1]):
        return None
    needed = _DRIVERS.get(int(toolkit[1]))
    return (
        f"the CUDA kernels of this build ({build['cuda']}) need a driver for CUDA {toolkit[1]}"
        f"{f', which is {needed} or newer,' if needed else ''} and that of {gpu.name} is for CUDA "
        f"{gpu.driver[0]}.{gpu.driver[1]}: update the driver, or build with a toolkit of CUDA {gpu.driver[0]}"
    )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether code that was compiled for `architecture` runs on a GPU of compute capability `capability`.

    Machine code (`sm_86`) needs the same major version and at least the same minor version. PTX (`compute_80`) needs at
    least the same version.
    """
    kind, _, number = architecture.partition("_")
    major, minor = int(number[:-1]), int(number[-1])
    return (major, minor) <= capability and (kind == "compute" or major == capability[0])


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Return facts for a bug report.

    Returns:
        A dict of names to values that JSON can represent: `python`, `platform`, `packages`, `devices`, `threads`,
        `cuda_paths` (how the operators compute on each GPU), `build`, `cpu` (the variant of the CPU kernels and the
        reason for it), `notes` (what to do for each GPU that the
        operators can't use) and `backends`. If a module does not load, `error` has the message, and the facts that
        follow it are missing. No import error is raised, because bug reports are most often about one.
    """
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version_of(package) for package in _PACKAGES},
    }
    try:
        import torch

        # Unlike the package's version, this one tells a CPU build from a CUDA build.
        facts["packages"]["torch"] = torch.__version__
        found = gpus()
        facts["devices"] = ["cpu", *(f"{gpu.name} ({gpu.architecture})" for gpu in found)]
        facts["threads"] = torch.get_num_threads()
        module = importlib.import_module("nemo_ext._module")
        # How the operators compute there, by dtype: csrc/cuda/path.h.
        facts["cuda_paths"] = {
            gpu.architecture: {
                dtype: module.cuda_path(dtype, 10 * gpu.capability[0] + gpu.capability[1])
                for dtype in ("float32", "bfloat16", "float16")
            }
            for gpu in found
        }
        facts["build"] = module.build_facts()
        used, because = module.cpu_choice()
        facts["cpu"] = {"capabilities": module.cpu_capabilities(), "used": used, "because": because}
        obstacles = (cuda_obstacle(facts["build"], gpu) for gpu in found)
        facts["notes"] = list(dict.fromkeys(obstacle for obstacle in obstacles if obstacle is not None))
        importlib.import_module("nemo_ext.ops")
        facts["backends"] = [
            key.lower()
            for key in ("CPU", "CUDA")
            if torch._C._dispatch_has_kernel_for_dispatch_key("nemo_ext::value_projection", key)
        ]
    except (ImportError, RuntimeError) as error:
        facts["error"] = str(error)
    return facts


if __name__ == "__main__":
    print(json.dumps(collect(), indent=2))
