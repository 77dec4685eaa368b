"""NeMo: find the neurons of a text-to-image diffusion model that carry a memorized image.

Hintersdorf, Struppek, Kersting, Dziedzic, Boenisch, "Finding NeMo: Localizing Neurons Responsible
For Memorization in Diffusion Models", NeurIPS 2024, arXiv 2406.02366.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_ext import ops
    from nemo_ext.errors import NemoError
    from nemo_ext.localizer import Localizer, localize
    from nemo_ext.neurons import NeuronSet
    from nemo_ext.patching import patch, patched, unpatch
    from nemo_ext.results.record import Localization
    from nemo_ext.scoring import Protocol, Threshold, memorization_score, memorization_threshold
    from nemo_ext.statistics import ActivationStatistics, collect_statistics

__version__ = version("nemo_ext")

__all__ = [
    "ActivationStatistics",
    "Localization",
    "Localizer",
    "NemoError",
    "NeuronSet",
    "Protocol",
    "Threshold",
    "__version__",
    "collect_statistics",
    "localize",
    "memorization_score",
    "memorization_threshold",
    "ops",
    "patch",
    "patched",
    "unpatch",
]

_HOMES = {
    "errors": ("NemoError",),
    "localizer": ("Localizer", "localize"),
    "neurons": ("NeuronSet",),
    "patching": ("patch", "patched", "unpatch"),
    "results.record": ("Localization",),
    "scoring": ("Protocol", "Threshold", "memorization_score", "memorization_threshold"),
    "statistics": ("ActivationStatistics", "collect_statistics"),
}


def __getattr__(name: str) -> Any:
    # Public names load at their first use: `nemo-ext --help` has no need of torch, which takes seconds.
    if name == "ops":
        return import_module("nemo_ext.ops")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"nemo_ext.{module}"), name)
    raise AttributeError(f"module 'nemo_ext' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
