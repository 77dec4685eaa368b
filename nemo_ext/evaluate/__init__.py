"""Results measured on images with the field's measures: copies, diversity, alignment, quality, and detection.

The names below are imported at their first use, because torch takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lazy_loader

if TYPE_CHECKING:
    from nemo_ext.evaluate.evaluation import evaluate_results as evaluate_results
    from nemo_ext.evaluate.table import Evaluation as Evaluation

__getattr__: Any
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"evaluation": ["evaluate_results"], "table": ["Evaluation"]}
)
