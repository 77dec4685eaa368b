"""The interface of a model family: all that the package has to know about Stable Diffusion, SDXL or another family.

Everything outside `nemo_ext/models/` works with a pipeline through this interface. A new family is one file in this
folder with a class derived from `Family`, and one entry in `registry.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class TextEmbedding:
    """What the denoiser reads of B texts.

    Attributes:
        hidden: e, the embeddings of all tokens, [B, T, K]; the value layers project them.
        pooled: one embedding of each whole text, [B, P], which some denoisers read besides; else None.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> TextEmbedding:
        """The embeddings on a device and in a dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return TextEmbedding(self.hidden.to(device, dtype), pooled)


#: Predicts the noise ε in latents for one text: (latents [B, C, H, W] float32, embedding of a text) -> ε [B, C, H, W]
#: float32.
NoisePredictor: TypeAlias = Callable[[Tensor, TextEmbedding], Tensor]


class Family(ABC):
    """One family of text-to-image diffusion models.

    In all methods `pipe` is a diffusers pipeline of the family, and `model` is such a pipeline or its denoiser: the
    network that predicts the noise, for Stable Diffusion the U-Net.

    Attributes:
        name: the family's name in messages.
        pipeline_classes: the names of the pipelines' classes, as `model_index.json` in a saved pipeline has them.
        components: the folders of a saved pipeline that hold weights.
        searched_layers: the name of the group of value layers that is searched by default.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    components: tuple[str, ...]
    searched_layers: str

    @abstractmethod
    def recognizes(self, model: Any) -> bool:
        """Whether a pipeline or denoiser belongs to this family."""

    @abstractmethod
    def denoiser(self, model: Any) -> nn.Module:
        """The denoiser as the pipeline calls it: torch.compile's wrapper, where there is one."""

    @abstractmethod
    def cross_attentions(self, denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """All cross-attentions with their names inside the denoiser, in network order. Each has a layer `to_v`."""

    @abstractmethod
    def layer_groups(self, layers: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """The groups that users may name in `layers=` instead of a list: group name -> the value layers in it.

        The group "all" is not among them; every family has it.

        Args:
            layers: the names of all value layers.
        """

    @abstractmethod
    def short_name(self, layer: str) -> str | None:
        """A value layer's name, short enough for a plot; None if no layer of this family has such a name."""

    @abstractmethod
    def text_encoders(self, pipe: Any) -> Mapping[str, nn.Module]:
        """The modules that turn text into embeddings, under their names in the pipeline."""

    @abstractmethod
    def encode(self, pipe: Any, texts: Sequence[str]) -> TextEmbedding:
        """The embeddings of B texts, on the text encoder's device and in its dtype.

        Raises:
            NemoError: the pipeline encodes text in a way that is not supported.
        """

    @abstractmethod
    def latent_shape(self, pipe: Any) -> tuple[int, int, int]:
        """C, H and W of the latents that the pipeline generates from by default.

        Raises:
            NemoError: the denoiser needs more than latents, a timestep and a text embedding, or its configuration has
                no size.
        """

    @abstractmethod
    def noise_predictor(self, pipe: Any, num_inference_steps: int, step_index: int) -> NoisePredictor:
        """The denoiser's call at one step of the schedule. The pipeline and its scheduler stay as they are.

        Args:
            pipe: the pipeline.
            num_inference_steps: how many steps the schedule has.
            step_index: which of them, counted from 0.

        Raises:
            NemoError: the scheduler is not supported, the step's latents are noise alone, or the denoiser needs more
                than latents, a timestep and a text embedding.
        """

    @abstractmethod
    def sampling_scheduler(self, pipe: Any) -> Any:
        """A new scheduler that gives usable images in few steps, with the noise levels of the pipeline's scheduler."""

    def text_to_image(self, pipe: Any) -> Any:
        """A pipeline with the same models that generates from text alone; `pipe` itself if it does so."""
        return pipe

    def generation_arguments(self, pipe: Any) -> Mapping[str, Any]:
        """What the pipeline's `__call__` wants besides prompts, steps, guidance and generators."""
        return {}

    @abstractmethod
    def load(self, folder: Path, variant: str | None, size: tuple[int, int] | None) -> Any:
        """Load a saved pipeline from a local folder, from safetensors alone; the network is never used.

        Args:
            folder: the folder.
            variant: "fp16" if the weights are in `*.fp16.safetensors`, and so on; None for plain names.
            size: height and width of the latents that it generates from; None: those that the folder says.
        """


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and of data parallelism; it itself if there is none."""
    inside: Any = module
    while True:
        if hasattr(inside, "_orig_mod"):
            inside = inside._orig_mod
        elif isinstance(inside, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = inside.module
        else:
            found: nn.Module = inside
            return found
