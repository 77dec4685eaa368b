"""Images of one prompt with sets of neurons off, each generated once and compared (docs/method.md, section 12)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_ext.errors import NemoError
from nemo_ext.measure.generation import Sampling, sample_images, sampler_of
from nemo_ext.measure.image_similarity import ImageSimilarity
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import patched

if TYPE_CHECKING:
    from PIL.Image import Image

#: The set of the untouched model.
NOTHING = NeuronSet()


class ImageRuns:
    """Generates the images of one prompt, compares them, and counts the samples.

    Args:
        pipe: a pipeline.
        prompt: the text.
        sampling: how images are generated, with the guidance as a number (`Sampling.resolved`).
        similarity: how alike two images are.
        batch_size: the number of latents in one call of the denoiser.
        threshold: τ_image. A seed's untouched image *replicates* if it is more alike to another seed's.
        originals: descriptions of the prompt's training images, [O, …]; None if they are not known. They are compared
            like images of the untouched model, and count for every seed.

    Attributes:
        places: the places of the seeds in `sampling.all_seeds`: 0, 1, …
        samples: the number of latents that the denoiser has evaluated so far.
        generated: the number of images that have been generated with neurons off.
    """

    def __init__(
        self,
        pipe: Any,
        prompt: str,
        sampling: Sampling,
        similarity: ImageSimilarity,
        *,
        batch_size: int,
        threshold: float,
        originals: Tensor | None = None,
    ) -> None:
        self.places = tuple(range(sampling.seeds))
        self.samples = 0
        self.generated = 0
        self.similarity = similarity
        self._threshold = threshold
        self._pipe = pipe
        self._sampler = sampler_of(pipe)
        self._prompt = prompt
        self._sampling = sampling
        self._batch_size = batch_size
        self._images: dict[NeuronSet, dict[int, Image]] = {}
        self._described: dict[NeuronSet, dict[int, Tensor]] = {}
        self._originals = originals

    def known(self, neurons: NeuronSet) -> tuple[int, ...]:
        """The places of the seeds whose images with these neurons off have been generated."""
        return tuple(sorted(self._images.get(neurons, ())))

    def images(self, neurons: NeuronSet) -> dict[int, Image]:
        """All images with these neurons off: seed -> image. Images that are missing are generated."""
        self._find(neurons, self.places)
        return {seed: self._images[neurons][place] for place, seed in enumerate(self._sampling.all_seeds)}

    def before(self) -> tuple[float, ...]:
        """For each seed, the highest similarity of its untouched image with another seed's."""
        return self._highest_with_others(NOTHING, NOTHING, self.places, self.places)

    def remaining(self, neurons: NeuronSet, places: Sequence[int]) -> tuple[float, ...]:
        """For some seeds, the highest similarity of the image with another seed's untouched image, or an original.

        The same seed's untouched image is left out, because the same initial noise makes any two images alike. If only
        some seeds replicate, the others' untouched images are left out, too: they do not show what is memorized.
        """
        replicating = [place for place, value in enumerate(self.before()) if value > self._threshold]
        values = self._highest_with_others(neurons, NOTHING, places, replicating or self.places)
        if self._originals is None:
            return values
        with_originals = self.with_originals(neurons, places)
        return tuple(map(max, zip(values, with_originals, strict=True)))

    def diversity(self, neurons: NeuronSet) -> tuple[float, ...]:
        """For each seed, the highest similarity of its image with another seed's, both with these neurons off."""
        return self._highest_with_others(neurons, neurons, self.places, self.places)

    def with_originals(self, neurons: NeuronSet, places: Sequence[int]) -> tuple[float, ...]:
        """For some seeds, the highest similarity of the image with an original of the prompt, which must be known."""
        assert self._originals is not None
        values = self.similarity.between(self._of(neurons, places), self._originals)
        return tuple(values.amax(1).tolist())

    def nearest(self, neurons: NeuronSet, originals: Mapping[str, Tensor]) -> list[tuple[str, float]]:
        """For each seed, the nearest one of several prompts' originals: the prompt, and the similarity.

        Args:
            neurons: the neurons that are off.
            originals: prompt -> descriptions of its training images; at least one prompt.
        """
        after = self._of(neurons, self.places)
        table = {prompt: self.similarity.between(after, these).amax(1).tolist() for prompt, these in originals.items()}
        found = []
        for place in self.places:
            prompt = max(table, key=lambda name: table[name][place])
            found.append((prompt, table[prompt][place]))
        return found

    def _highest_with_others(
        self, neurons: NeuronSet, others: NeuronSet, places: Sequence[int], among: Sequence[int]
    ) -> tuple[float, ...]:
        table = self.similarity.between(self._of(neurons, places), self._of(others, among))
        table[torch.tensor(places)[:, None] == torch.tensor(among)] = -math.inf
        return tuple(table.amax(1).tolist())

    def _of(self, neurons: NeuronSet, places: Sequence[int]) -> Tensor:
        """The descriptions of some seeds' images with neurons off, [len(places), …]."""
        self._find(neurons, places)
        described = self._described[neurons]
        return torch.stack([described[place] for place in places])

    def _find(self, neurons: NeuronSet, places: Iterable[int]) -> None:
        """Generate and describe the images that are missing."""
        images = self._images.setdefault(neurons, {})
        missing = [place for place in places if place not in images]
        if not missing:
            return
        seeds = [self._sampling.all_seeds[place] for place in missing]
        with patched(self._pipe, neurons):
            made = sample_images(self._sampler, self._prompt, self._sampling, seeds, batch_size=self._batch_size)
        self.samples += self._sampling.unet_samples(len(missing))
        self.generated += len(missing) if len(neurons) else 0
        described = self.similarity.describe(made)
        if not described.isfinite().all():
            raise NemoError(f"{self.similarity.name} is not finite for an image of '{self._prompt}'")
        images.update(zip(missing, made, strict=True))
        self._described.setdefault(neurons, {}).update(zip(missing, described, strict=True))
