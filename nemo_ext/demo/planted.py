"""The neurons that carry each memorized caption of the demo model: planted before its training, and so known.

This is the right answer of a search on this model. It is no evidence about Stable Diffusion, where nobody knows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from nemo_ext.neurons import NeuronSet


class Planted(NamedTuple):
    """The designated neurons of one caption.

    Attributes:
        carriers: without them the model draws ordinary pictures of the caption's object.
        decoys: they deviate as much as carriers, and nothing comes of them.
    """

    carriers: NeuronSet
    decoys: NeuronSet


def planted_neurons(model: Path) -> dict[str, Planted]:
    """Return the designated neurons of each memorized caption: caption -> neurons.

    Args:
        model: the folder of the bundled pipeline, or of one that `examples/demo_model/train.py` has trained.
    """
    of_captions = json.loads((model / "carriers.json").read_text(encoding="utf-8"))
    return {
        caption: Planted(NeuronSet(own["carriers"]), NeuronSet(own["decoys"])) for caption, own in of_captions.items()
    }
