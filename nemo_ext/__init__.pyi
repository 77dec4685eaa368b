# The public names of the package: `__init__.py` loads them from here at their first use, and type checkers read them.

from . import ops as ops
from .baking.bake import bake as bake
from .errors import NemoError as NemoError
from .measure.generation import Sampling as Sampling
from .measure.protocol import Protocol as Protocol
from .measure.score import memorization_score as memorization_score
from .measure.sscd import Sscd as Sscd
from .measure.statistics import ActivationStatistics as ActivationStatistics
from .measure.statistics import collect_statistics as collect_statistics
from .measure.threshold import Threshold as Threshold
from .measure.threshold import memorization_threshold as memorization_threshold
from .neurons import NeuronSet as NeuronSet
from .patching.patch import patch as patch
from .patching.patch import patched as patched
from .patching.patch import unpatch as unpatch
from .results.record import Localization as Localization
from .search.localizer import Localizer as Localizer
from .search.localizer import localize as localize
from .search.verification import Verification as Verification

__version__: str
