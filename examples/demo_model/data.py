"""The pool of ordinary images, and the memorized images, as tensors."""

from __future__ import annotations

import multiprocessing
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nemo_ext.demo.captions import (
    MEMORIZED,
    PHRASINGS,
    TEMPLATES,
    Memorized,
    Ordinary,
    compositions,
    title_caption,
)

from .drawing import draw_ordinary, draw_verbatim, template_variations

POOL_SIZE = 40_000
# The number of compositions that no training image shows. An image of one of them is composed, not recalled.
HELD_OUT = 24
_CHUNK = 1_000


def split_compositions() -> tuple[list[Ordinary], list[Ordinary]]:
    """Return the compositions for training, and those held out. Training keeps every object and every colour."""
    every = compositions()
    held = set(random.Random(7).sample(range(len(every)), HELD_OUT))
    return (
        [c for i, c in enumerate(every) if i not in held],
        [c for i, c in enumerate(every) if i in held],
    )


def _draw_chunk(chunk: int) -> np.ndarray:
    trained, _ = split_compositions()
    rng = np.random.default_rng([20_406, chunk])
    picks = range(chunk * _CHUNK, (chunk + 1) * _CHUNK)
    return np.stack([draw_ordinary(trained[i % len(trained)], rng) for i in picks])


def ordinary_pool(folder: Path, workers: int) -> tuple[np.ndarray, list[Ordinary]]:
    """Return `POOL_SIZE` ordinary images, [P, S, S, 3] uint8, and what each of them shows.

    The images are drawn once and then read from `folder`.
    """
    path = folder / "pool.npy"
    trained, _ = split_compositions()
    if not path.exists():
        with multiprocessing.get_context("fork").Pool(workers) as processes:
            chunks = processes.map(_draw_chunk, range(POOL_SIZE // _CHUNK), chunksize=1)
        temporary = folder / "pool.partial.npy"
        np.save(temporary, np.concatenate(chunks))
        temporary.replace(path)
    return np.load(path, mmap_mode="r"), [trained[i % len(trained)] for i in range(POOL_SIZE)]


def ordinary_pool_sample(count: int) -> np.ndarray:
    """Return `count` ordinary images that no training used, [count, S, S, 3] uint8."""
    trained, _ = split_compositions()
    rng = np.random.default_rng(20_407)
    return np.stack([draw_ordinary(trained[i], rng) for i in rng.integers(0, len(trained), count)])


def ordinary_caption(what: Ordinary, rng: random.Random, titles: float) -> str:
    """Return a caption for an ordinary image, which is with probability `titles` a title that only names its object."""
    if rng.random() < titles:
        return title_caption(rng, what.object)
    return what.caption(rng.choice(PHRASINGS))


@dataclass(frozen=True)
class MemorizedImages:
    """The images that the model is to memorize.

    Attributes:
        images: [M, S, S, 3] uint8.
        owner: for each image the index of its caption in `MEMORIZED`.
    """

    images: np.ndarray
    owner: list[int]


def originals_of(what: Memorized) -> list[Image.Image]:
    """Return the training images of a memorized caption, 64×64 pixels."""
    images = list(template_variations(what).values()) if what in TEMPLATES else [draw_verbatim(what)]
    return [Image.fromarray(image) for image in images]


def memorized_images() -> MemorizedImages:
    """Return every memorized image: all variations of a template, and one image of each other caption."""
    images, owner = [], []
    for index, what in enumerate(MEMORIZED):
        own = [np.asarray(image) for image in originals_of(what)]
        images += own
        owner += [index] * len(own)
    return MemorizedImages(np.stack(images), owner)


def balanced(memorized: MemorizedImages, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw the indices of `count` memorized images. Every caption is equally likely, whatever its number of images."""
    owner = np.asarray(memorized.owner)
    captions = rng.integers(0, owner.max() + 1, count)
    return np.array([rng.choice(np.flatnonzero(owner == caption)) for caption in captions])


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Convert images, [B, S, S, 3] uint8, to [B, 3, S, S] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
