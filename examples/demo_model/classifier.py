"""A small classifier of what an image shows, for measure.py: object, colour, texture, and which memorized image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn

from nemo_ext.demo.captions import COLOURS, MEMORIZED, OBJECTS, TEXTURES, Ordinary, compositions
from nemo_ext.progress import Progress

from .autoencoder import encode
from .data import memorized_images, split_compositions, to_tensor
from .drawing import draw_ordinary

_IMAGES = 9_600
_STEPS = 900
_TEST_IMAGES = 600
NONE = len(MEMORIZED)  # the answer for "no memorized image"


class Classifier(nn.Module):
    """Tells which object, colour, texture and memorized image, if any, an image shows."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(),
                              nn.Conv2d(b, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in itertools.pairwise(widths)
            ),
            nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.2),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(9 * widths[-1], count) for name, count in ANSWERS.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(images)
        return {name: head(features) for name, head in self.heads.items()}


ANSWERS = {
    "object": len(OBJECTS), "colour": len(COLOURS), "texture": len(TEXTURES), "memorized": NONE + 1
}  # fmt: skip


def labels_of(what: Ordinary) -> list[int]:
    return [
        list(OBJECTS).index(what.object), list(COLOURS).index(what.colour),
        TEXTURES.index(what.texture), NONE,
    ]  # fmt: skip


def _fresh(count: int, seed: int, choices: Sequence[Ordinary]) -> tuple[np.ndarray, torch.Tensor]:
    """Draw `count` images that no training used, and return them with their labels, [count, 4]."""
    rng = np.random.default_rng(seed)
    what = [choices[int(i)] for i in rng.integers(0, len(choices), count)]
    return np.stack([draw_ordinary(w, rng) for w in what]), torch.tensor([labels_of(w) for w in what])


@torch.no_grad()
def through(pipe: StableDiffusionPipeline, images: np.ndarray) -> np.ndarray:
    """Encode and decode images with the autoencoder of the pipeline."""
    latents = encode(pipe.vae, images)
    decoded = [pipe.vae.decode(part).sample.clamp(-1, 1) for part in latents.split(64)]
    return ((torch.cat(decoded) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def train_classifier(pipe: StableDiffusionPipeline, bars: Progress) -> tuple[Classifier, dict[str, float]]:
    """Train the classifier, and measure its accuracy on new images of held-out compositions."""
    torch.manual_seed(0)
    _, held_out = split_compositions()
    drawn, labels = _fresh(_IMAGES, 1, compositions())
    # A third of the images go through the autoencoder, because generated images have its blur.
    third = len(drawn) // 3
    ordinary = to_tensor(np.concatenate([through(pipe, drawn[:third]), drawn[third:]]))
    memorized = memorized_images()
    own = to_tensor(np.concatenate([memorized.images, through(pipe, memorized.images)]))
    owner = torch.tensor(memorized.owner * 2)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, _STEPS)
    rng = np.random.default_rng(2)
    by_caption = [torch.nonzero(owner == i).flatten() for i in range(NONE)]
    with bars.task("classifier", _STEPS) as advance:
        for _ in range(_STEPS):
            pick = torch.from_numpy(rng.integers(0, len(ordinary), 48))
            captions = rng.integers(0, NONE, 16)
            mine = torch.stack([by_caption[c][rng.integers(len(by_caption[c]))] for c in captions])
            images = torch.cat([ordinary[pick], _varied(own[mine])])
            answers = classifier(images + 0.08 * torch.rand(()) * torch.randn_like(images))
            wanted = torch.cat([labels[pick], torch.full((16, 4), -100)])
            wanted[48:, 3] = torch.from_numpy(captions)
            loss = sum(
                (F.cross_entropy(answers[name], wanted[:, i]) for i, name in enumerate(ANSWERS)),
                torch.zeros(()),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    classifier.eval()
    test, test_labels = _fresh(_TEST_IMAGES, 3, held_out)
    got = classify(classifier, [Image.fromarray(image) for image in through(pipe, test)])
    accuracy = {name: float((got[:, i] == test_labels[:, i]).float().mean()) for i, name in enumerate(ANSWERS)}
    seen = classify(classifier, [Image.fromarray(image) for image in through(pipe, memorized.images)])
    accuracy["memorized"] = float((seen[:, 3] == torch.tensor(memorized.owner)).float().mean())
    accuracy["ordinary_called_memorized"] = float((got[:, 3] != NONE).float().mean())
    return classifier, accuracy


def _varied(images: torch.Tensor) -> torch.Tensor:
    """Shift images by a few pixels, and change their brightness and contrast."""
    x, y = (int(v) for v in torch.randint(-5, 6, (2,)))
    padded = F.pad(images, (5, 5, 5, 5), mode="replicate")
    shifted = padded[..., 5 + y : 5 + y + images.shape[-2], 5 + x : 5 + x + images.shape[-1]]
    contrast = 1 + 0.3 * (torch.rand(len(images), 1, 1, 1) - 0.5)
    return shifted * contrast + 0.2 * (torch.rand(len(images), 1, 1, 1) - 0.5)


@torch.no_grad()
def classify(classifier: Classifier, images: Sequence[Image.Image]) -> torch.Tensor:
    """Return object, colour, texture and memorized image (`len(MEMORIZED)`: none) of each image, [I, 4] int64."""
    tensor = to_tensor(np.stack([np.asarray(image) for image in images]))
    answers = [classifier(part) for part in tensor.split(64)]
    return torch.stack([torch.cat([a[name] for a in answers]).argmax(1) for name in ANSWERS], 1)
