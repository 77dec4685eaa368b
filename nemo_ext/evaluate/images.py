"""The images of an evaluation: they are generated once, stored, and reused if their settings are the same.

Beside the images of a prompt lies a JSON file with the settings of each stage and the SHA-256 of each image. So an
image that another command has written, or that was made with other settings, is never mistaken for one of this
evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.errors import NemoError
from nemo_ext.evaluate.plan import Stage
from nemo_ext.files import replacing
from nemo_ext.measure.generation import Sampling, generate_images, sampler_of
from nemo_ext.models.state import model_fingerprint
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import patched
from nemo_ext.reading import parse_json
from nemo_ext.results.folder import IMAGE_SETTINGS, image_name

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageMaker:
    """Generates the images of prompts with neurons off, or reads them if they exist.

    Args:
        pipe: a pipeline. Neurons that a patch has switched off are on while images are generated.
        sampling: how the images are generated, with the guidance as a number (`Sampling.resolved`).
        batch_size: the number of images in one call of the pipeline.
        stored: whether images are written to folders and reused. If not, `make` needs no folder.
        advance: called with the number of images that have been made or read.
    """

    def __init__(
        self,
        pipe: Any,
        sampling: Sampling,
        *,
        batch_size: int,
        stored: bool,
        advance: Callable[[int], None],
    ) -> None:
        assert sampling.guidance is not None
        self._pipe = pipe
        self._sampler = sampler_of(pipe)
        self._steps, self._guidance = sampling.steps, sampling.guidance
        self._batch_size = batch_size
        self._advance = advance
        self.scheduler = type(self._sampler.scheduler).__name__
        # Hashing all weights takes seconds, and is needed only to recognize images of an earlier run.
        self._model = model_fingerprint(pipe) if stored else None
        #: How many images have been generated, and how many have been reused.
        self.generated, self.reused = 0, 0

    def make(self, stage: Stage) -> list[Image]:
        """The images of one stage, in the order of `stage.wanted`.

        Raises:
            NemoError: the images are not finite, or a layer or neuron does not exist.
        """
        name, neurons, wanted = stage
        settings = {prompt: self._settings(prompt, neurons) for prompt, _, _ in wanted}
        images = [
            None if folder is None else _stored(folder, name, seed, settings[prompt]) for prompt, seed, folder in wanted
        ]
        missing = [place for place, image in enumerate(images) if image is None]
        if missing:
            with patched(self._pipe, neurons):
                made = generate_images(
                    self._sampler,
                    [wanted[place][0] for place in missing],
                    [wanted[place][1] for place in missing],
                    steps=self._steps,
                    guidance=self._guidance,
                    batch_size=self._batch_size,
                )
            new: dict[tuple[str, Path], dict[int, Image]] = {}
            for place, image in zip(missing, made, strict=True):
                prompt, seed, folder = wanted[place]
                images[place] = image
                if folder is not None:
                    new.setdefault((prompt, folder), {})[seed] = image
            for (prompt, folder), of_prompt in new.items():
                _store(folder, name, settings[prompt], of_prompt)
        self.generated += len(missing)
        self.reused += len(wanted) - len(missing)
        self._advance(len(wanted))
        return [image for image in images if image is not None]

    def _settings(self, prompt: str, neurons: NeuronSet) -> dict[str, Any]:
        """Everything that an image depends on besides its seed."""
        return {
            "prompt": prompt,
            "model": self._model,
            "scheduler": self.scheduler,
            "steps": self._steps,
            "guidance": self._guidance,
            "neurons": neurons.to_dict(),
        }


def write_image(path: Path, image: Image) -> None:
    """Write an image as PNG, completely or not at all."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def _read_settings(folder: Path) -> dict[str, Any]:
    """The stages in the settings file of a folder; empty if there is no such file, or if it cannot be read."""
    try:
        stages = parse_json((folder / IMAGE_SETTINGS).read_bytes())
    except (OSError, NemoError):
        return {}  # The images will be generated anew, which is always right.
    return stages if isinstance(stages, dict) else {}


def _stored(folder: Path, stage: str, seed: int, settings: Mapping[str, Any]) -> Image | None:
    """The stored image of a seed; None if it was made with other settings, or has changed since then."""
    from PIL import Image as pictures

    wanted = _hashes(_read_settings(folder), stage, settings).get(str(seed))
    path = folder / image_name(stage, seed)
    if wanted is None or not path.is_file() or _hash(path) != wanted:
        return None
    with pictures.open(path) as image:
        converted: Image = image.convert("RGB")
        return converted


def _store(folder: Path, stage: str, settings: Mapping[str, Any], images: Mapping[int, Image]) -> None:
    """Write images, and then their hashes; so an interruption leaves no image that is taken for another."""
    for seed, image in images.items():
        write_image(folder / image_name(stage, seed), image)
    stages = _read_settings(folder)
    hashes = {str(seed): _hash(folder / image_name(stage, seed)) for seed in images}
    stages[stage] = {"settings": settings, "images": {**_hashes(stages, stage, settings), **hashes}}
    with replacing(folder / IMAGE_SETTINGS) as temporary:
        temporary.write_text(json.dumps(stages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _hashes(stages: Mapping[str, Any], stage: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of a stage's images, seed -> SHA-256; empty if they were made with other settings."""
    of_stage = stages.get(stage)
    if not isinstance(of_stage, dict) or of_stage.get("settings") != settings:
        return {}
    images = of_stage.get("images")
    return dict(images) if isinstance(images, dict) else {}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
