"""The demo: all steps of NeMo, offline, on a small bundled model of the Stable Diffusion kind that memorized images.

`model/README.md` describes the model, its training, and what the demo can and cannot show.
"""

from .run import load_demo_pipeline, original_images, run

__all__ = ["load_demo_pipeline", "original_images", "run"]
