"""The device that a command uses."""

from __future__ import annotations

import importlib

from nemo_ext.errors import NemoError, warn
from nemo_ext.ranks.ranks import Ranks


def usable_device(wanted: str | None, ranks: Ranks) -> str:
    """Return `wanted` if the operators run on that device. For None, return CUDA if they run there, else the CPU.
    Each rank of a machine has a GPU of its own, unless `wanted` has the number of one.

    A GPU on which they do not run is not left out silently, because the CPU can take hours for what a GPU does in
    minutes.
    """
    from nemo_ext import info

    # `nemo_ext.ops` is imported first. If compiled modules are missing, its error says what to do; `_module` has none.
    importlib.import_module("nemo_ext.ops")
    build = importlib.import_module("nemo_ext._module").build_facts()
    found = [] if wanted == "cpu" else info.gpus()
    device = wanted
    if ranks.count > 1 and found and ranks.local_rank >= len(found) and wanted in (None, "cuda"):
        raise NemoError(
            f"rank {ranks.rank} has no GPU, because PyTorch sees {len(found)} on its machine: start "
            f"torchrun with --nproc-per-node {len(found)}, or say --device cpu"
        )
    if device is None:
        obstacle = info.cuda_obstacle(build, found[0]) if found else None
        if obstacle is not None:
            warn(f"the CPU is used, although there is a GPU: {obstacle}; or say --device cpu")
        device = "cuda" if found and obstacle is None else "cpu"
    if device == "cuda" and ranks.count > 1:
        device = f"cuda:{ranks.local_rank}"
    if device != "cpu":
        index = int(device.partition(":")[2] or 0)
        if index >= len(found):
            raise NemoError(f"--device {device}: PyTorch sees {len(found)} CUDA devices; use --device cpu")
        obstacle = info.cuda_obstacle(build, found[index])
        if obstacle is not None:
            raise NemoError(f"--device {device}: {obstacle}; or use --device cpu")
    return device
