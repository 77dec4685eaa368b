"""A small Stable-Diffusion-style pipeline that memorized images, bundled: NeMo's whole way, offline.

What the model is, how it was trained and what it does and doesn't show: `model/README.md`.
"""

from .run import load_demo_pipeline, original_images, run

__all__ = ["load_demo_pipeline", "original_images", "run"]
