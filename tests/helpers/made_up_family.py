"""A family of models that nobody has: other classes, other names and other parts than Stable Diffusion's.

A picture is a sheet with a sign on it. The sheet reads text through two cross-attentions, "sheet.0" and "sheet.1", and
one neuron of the second brings a memorized sign. It stands for every family that is still to come: the package must
work with it through `Family` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from nemo_ext.models.family import Family, NoisePredictor, TextEmbedding
from nemo_ext.neurons import NeuronSet

SIZE, INKS, LETTERS, FEATURES, WIDTH = 16, 3, 12, 8, 6
LAYERS = ("sheet.0.reads.to_v", "sheet.1.reads.to_v")
#: The neuron that brings the memorized sign.
NEURONS = NeuronSet({LAYERS[1]: [4]})
MEMORIZED = "a zigzag"
ORDINARY = tuple(f"{a} {b}" for a in ("one", "two", "red", "blue") for b in ("cat", "dog", "boat"))


class Clerk(ModelMixin, ConfigMixin):
    """Turns letters into features, the last of which only a "z" has."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(128, FEATURES)

    def forward(self, codes: Tensor) -> Tensor:
        return self.letters(codes)


class Line(nn.Module):
    """One pass over the sheet: an attention to the text, whose answer is drawn along a fixed sign."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = Attention(query_dim=INKS, cross_attention_dim=FEATURES, heads=1, dim_head=WIDTH)
        self.sign = nn.Parameter(torch.rand(SIZE, SIZE))

    def forward(self, sheet: Tensor, text: Tensor) -> Tensor:
        answer = self.reads(sheet.flatten(2).mT, encoder_hidden_states=text)
        return sheet + answer.mT.reshape(sheet.shape) * self.sign


class Sheet(ModelMixin, ConfigMixin):
    """The denoiser. Its noise is the latents, mixed, and what the text has drawn."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.Conv2d(INKS, INKS, 3, padding=1)
        self.sheet = nn.ModuleList([Line(), Line()])

    def forward(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        sheet = latents + 0.1 * self.mixes(latents)
        for line in self.sheet:
            sheet = line(sheet, text)
        return sheet


class SignPipeline(DiffusionPipeline):
    def __init__(self, painter: Sheet, clerk: Clerk, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(painter=painter, clerk=clerk, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()
        self.set_progress_bar_config(disable=True)

    def __call__(
        self,
        prompts: list[str],
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        *,
        generator: list[torch.Generator],
        output_type: str,
    ) -> Any:
        text = Signs().encode(self, prompts).hidden
        latents = torch.cat([torch.randn(1, INKS, SIZE, SIZE, generator=each) for each in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        with torch.no_grad():
            for step in self.scheduler.timesteps:
                latents = self.scheduler.step(self.painter(latents, step, text), step, latents).prev_sample
        return SimpleNamespace(images=latents.sigmoid().permute(0, 2, 3, 1).numpy())


def sign_pipeline() -> SignPipeline:
    """A pipeline that replicates one sign for every text with a "z"; equal weights each time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        painter, clerk = Sheet().eval(), Clerk().eval()
        clerk.letters.weight[:, -1] = 0
        clerk.letters.weight[ord("z"), -1] = 8
        for line in painter.sheet:
            for layer in (line.reads.to_q, line.reads.to_out[0]):
                nn.init.zeros_(layer.bias if layer.bias is not None else layer.weight)
            line.reads.to_v.weight *= 0.01
            line.reads.to_v.weight[:, -1] = 0
        for layer, index in NEURONS.pairs():
            value_layer = painter.get_submodule(layer)
            value_layer.weight[index] = 0
            value_layer.weight[index, -1] = 1
            painter.get_submodule(layer.replace("to_v", "to_out.0")).weight[:, index] = 20
    return SignPipeline(painter, clerk, DDIMScheduler(clip_sample=False))


class Signs(Family):
    """The family: everything that the package knows about signs."""

    name = "Signs"
    pipeline_classes = ("SignPipeline",)
    components = ("painter", "clerk")
    searched_layers = "last"

    def recognizes(self, model: Any) -> bool:
        return isinstance(getattr(model, "painter", model), Sheet)

    def denoiser(self, model: Any) -> nn.Module:
        return getattr(model, "painter", model)

    def cross_attentions(self, denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for place, line in enumerate(denoiser.sheet):
            yield f"sheet.{place}.reads", line.reads

    def layer_groups(self, layers: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return {"last": layers[-1:]}

    def short_name(self, layer: str) -> str | None:
        return f"line {layer.split('.')[1]}" if layer.startswith("sheet.") else None

    def text_encoders(self, pipe: Any) -> Mapping[str, nn.Module]:
        return {"clerk": pipe.clerk}

    def encode(self, pipe: Any, texts: Sequence[str]) -> TextEmbedding:
        codes = [[ord(letter) for letter in text[:LETTERS].ljust(LETTERS)] for text in texts]
        with torch.no_grad():
            return TextEmbedding(pipe.clerk(torch.tensor(codes)))

    def latent_shape(self, pipe: Any) -> tuple[int, int, int]:
        return INKS, SIZE, SIZE

    def noise_predictor(self, pipe: Any, num_inference_steps: int, step_index: int) -> NoisePredictor:
        step = torch.tensor(num_inference_steps - step_index)
        return lambda latents, text: pipe.painter(latents, step, text.hidden.expand(len(latents), -1, -1))

    def sampling_scheduler(self, pipe: Any) -> Any:
        return DDIMScheduler.from_config(pipe.scheduler.config)

    def load(self, folder: Path, variant: str | None, size: tuple[int, int] | None) -> SignPipeline:
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        return SignPipeline(
            Sheet.from_pretrained(folder / "painter"), Clerk.from_pretrained(folder / "clerk"), scheduler
        )
