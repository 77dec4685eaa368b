"""What is installed, how it was built, and what this machine can run: `python -m nemo_ext.info`."""

from __future__ import annotations

import importlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("nemo_ext", "torch", "diffusers", "transformers", "safetensors", "numpy")


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Facts for a bug report: `build`, `cpu`, `devices`, `packages`, `python`, and `error` where something is missing.

    Never raises: a package that does not load is what a report is most often about.
    """
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version_of(package) for package in _PACKAGES},
    }
    try:
        import torch

        facts["devices"] = ["cpu"] + [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts["threads"] = torch.get_num_threads()
        module = importlib.import_module("nemo_ext._module")
        facts["build"] = module.build_facts()
        facts["cpu"] = {"capabilities": module.cpu_capabilities(), "used": module.cpu_capability()}
        importlib.import_module("nemo_ext.ops")
    except (ImportError, RuntimeError) as error:
        facts["error"] = str(error)
    return facts


if __name__ == "__main__":
    print(json.dumps(collect(), indent=2))
