"""NeMo: find the neurons of a text-to-image diffusion model that carry a memorized image.

Hintersdorf, Struppek, Kersting, Dziedzic, Boenisch, "Finding NeMo: Localizing Neurons Responsible
For Memorization in Diffusion Models", NeurIPS 2024, arXiv 2406.02366.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("nemo_ext")

# The public names are listed in `__init__.pyi` and imported at their first use, because importing torch takes seconds
# and `nemo-ext --help` does not need it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
