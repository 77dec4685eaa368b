"""Measuring memorization: noise differences, their similarity, scores, the threshold (docs/method.md, sections 3 to 7).

Every U-Net evaluation of the package's searches goes through `NoiseProbe`, which counts them.
"""

import json
import math
import os
import typing
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nemo_ext.atomic import replacing
from nemo_ext.errors import NemoError
from nemo_ext.layers import evaluating, model_fingerprint, value_layers
from nemo_ext.memory import free_bytes, rows_that_fit
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching import patched, patched_rows, scaled_rows
from nemo_ext.progress import ProgressLike, open_progress
from nemo_ext.stages import WHOLE, Row, Stages, is_compiled
from nemo_ext.statistics import check_prompts, encode_prompts, name_of_model

DEFAULT_BATCH_SIZE = 10

#: The most memory for what earlier runs of the U-Net left, in bytes: some 40 latents of Stable Diffusion 1 in float32.
HELD_BYTES = 4 << 30
#: And the most of the memory that is free when a prompt is begun.
HELD_SHARE = 0.25

# The protocol's fields that scores must share to be compared; seeds may be others, of the same number.
_SCALE_OF_A_SCORE = ("num_inference_steps", "step_index", "data_range", "window_sigma", "threshold_guidance")


@dataclass(frozen=True)
class Protocol:
    """Every choice that a score, a threshold or a search depends on, besides the number of seeds.

    `Protocol.paper()`, the default, follows the paper. `Protocol.published_code()` follows the
    scripts published with it, whose habits it names. Any field can be set:
    `dataclasses.replace(Protocol.paper(), first_seed=7)`.

    Attributes:
        name: what to call the protocol.
        num_inference_steps: steps of the DDIM schedule that the timestep is taken from.
        step_index: which of its timesteps the noise is predicted at, always with the initial
            latents. Published code: 1, the second; it throws the first U-Net call's output away.
        seeds_share_generator: False: seed s = 0, 1, … has its own generator, `first_seed` + s, and
            so the latents of that seed in any diffusers pipeline. Published code: True, one
            generator seeded with `first_seed` draws all latents at once.
        first_seed: seed of the first, or only, generator.
        data_range: range of the values that the similarity is to assume. Published code: None,
            inferred anew at every scale from all maps of a call, so that a score depends on which
            seeds are compared together.
        window_sigma: standard deviation, in latent pixels, of the similarity's Gaussian window,
            2⌊3.5 σ + 0.5⌋ + 1 wide: 11 for 1.5. Latents below 11×11 need a smaller one.
        threshold_guidance: classifier-free guidance g in `memorization_threshold`; 0: none.
            Published code: 7, with the halves swapped, ε(y) + g (ε("") − ε(y)), although detection
            runs without guidance.
        first_theta, theta_step, last_theta: the z-score threshold θ of the initial selection.
        first_top_k: the k of the initial selection; it grows by 1 with every step of θ.
        tries_last_theta: whether the selection at `last_theta` is tried before giving up. Published
            code: False, it gives up on reaching it, with the selection of the step before.
        keeps_duplicates: False: candidates are a set. Published code: True, a neuron chosen by θ
            and by k stands twice among them, and only switching on both has an effect.
        measures_floor: whether the remaining memorization with all searched neurons off is measured
            first, one evaluation, to tell whether the threshold can be reached at all. Published
            code: False.
        raise_margin: where the threshold can't be reached, it is raised to this much above what
            was, so that neurons without any effect still drop out. Published code: 0.
    """

    name: str = "paper"
    num_inference_steps: int = 50
    step_index: int = 0
    seeds_share_generator: bool = False
    first_seed: int = 1
    data_range: float | None = 1.0
    window_sigma: float = 1.5
    threshold_guidance: float = 0.0
    first_theta: float = 5.0
    theta_step: float = 0.25
    last_theta: float = 1.0
    first_top_k: int = 0
    tries_last_theta: bool = True
    keeps_duplicates: bool = False
    measures_floor: bool = True
    raise_margin: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.step_index < self.num_inference_steps:
            raise NemoError(
                f"step_index must be from 0 to num_inference_steps - 1 = {self.num_inference_steps - 1}, "
                f"got {self.step_index}"
            )
        if self.data_range is not None and not self.data_range > 0:
            raise NemoError(f"data_range must be above 0, or None to infer it, got {self.data_range}")
        if not self.window_sigma > 0:
            raise NemoError(f"window_sigma must be above 0, got {self.window_sigma}")
        if not self.theta_step > 0:
            raise NemoError(f"theta_step must be above 0, got {self.theta_step}")

    @classmethod
    def paper(cls) -> "Protocol":
        """The paper's method; the default."""
        return cls()

    @classmethod
    def published_code(cls) -> "Protocol":
        """What the scripts published with the paper do."""
        return cls(
            name="published-code",
            step_index=1,
            seeds_share_generator=True,
            data_range=None,
            threshold_guidance=7.0,
            tries_last_theta=False,
            keeps_duplicates=True,
            measures_floor=False,
            raise_margin=0.0,
        )

    @classmethod
    def from_name(cls, name: str) -> "Protocol":
        """The protocol called "paper" or "published-code"."""
        known = {protocol.name: protocol for protocol in (cls.paper(), cls.published_code())}
        if name not in known:
            raise NemoError(f"there is no protocol '{name}': wanted {' or '.join(known)}")
        return known[name]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Protocol":
        """The protocol that `to_dict` wrote.

        Raises:
            NemoError: an unknown field.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise NemoError(f"a protocol has no field {', '.join(sorted(unknown))}")
        return cls(**values)


# Noise differences


def check_unet(unet: Any) -> None:
    """Refuse a U-Net whose noise can't be predicted from latents, a timestep and a text embedding alone.

    Raises:
        NemoError: inpainting and SDXL, for example.
    """
    config = unet.config
    if config.out_channels != config.in_channels:
        raise NemoError(
            f"the U-Net takes {config.in_channels} channels and predicts {config.out_channels}: wanted a "
            "text-to-image model, not inpainting or the like"
        )
    if getattr(config, "addition_embed_type", None) is not None:
        raise NemoError(
            "the U-Net wants more than a text embedding "
            f"(addition_embed_type '{config.addition_embed_type}', as in SDXL): SD1 and SD2 are supported"
        )


def initial_latents(pipe: Any, seeds: int, protocol: Protocol) -> Tensor:
    """x_T of every seed, drawn on the CPU so that a seed means the same on every device.

    Args:
        pipe: a pipeline; its U-Net says C, H and W.
        seeds: S, how many.
        protocol: `first_seed` and `seeds_share_generator`.

    Returns:
        [S, C, H, W] float32 on the CPU.
    """
    config = pipe.unet.config
    check_unet(pipe.unet)
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (config.in_channels, height, width)
    if protocol.seeds_share_generator:
        generator = torch.Generator("cpu").manual_seed(protocol.first_seed)
        return torch.randn(seeds, *shape, generator=generator)
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator("cpu").manual_seed(protocol.first_seed + s))
            for s in range(seeds)
        ]
    )


def noise_differences(
    pipe: Any,
    hidden: Tensor,
    latents: Tensor,
    protocol: Protocol,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    guidance: tuple[float, Tensor] | None = None,
    differentiable: bool = False,
) -> Tensor:
    """δ = ε(x_T, T, y) − x_T, scaled to [0, 1] per sample and channel (docs/method.md, section 3).

    The pipeline is evaluated as it is, with the neurons that are off now, and left as it was.

    Args:
        pipe: a pipeline; its scheduler's configuration gives the DDIM timestep, and epsilon or
            v-prediction.
        hidden: the prompt's text embedding, [1, T, K].
        latents: x_T, [S, C, H, W].
        protocol: `num_inference_steps` and `step_index`.
        batch_size: latents in one U-Net call; changes the result by rounding only. A compiled U-Net always gets as
            many.
        guidance: (g, embedding of the empty prompt [1, T, K]) for ε(y) + g (ε("") − ε(y)), which
            takes two U-Net samples for each latent; None: none.
        differentiable: whether autograd is to follow.

    Returns:
        [S, C, H, W] float32 on the U-Net's device; a channel without any difference is 0.

    Raises:
        NemoError: a scheduler or U-Net that isn't supported, or noise that isn't finite.
    """
    unet, device = pipe.unet, pipe.unet.device
    check_unet(unet)
    if batch_size < 1:
        raise NemoError(f"batch_size must be 1 or more, got {batch_size}")
    scheduler = _ddim(pipe, protocol)
    timestep = scheduler.timesteps[protocol.step_index].to(device)
    x = (latents.float() * scheduler.init_noise_sigma).to(device)

    # torch.compile compiles anew for another number of rows: there the last part is filled up.
    compiled = is_compiled(unet)

    def predicted(embedding: Tensor, part: Tensor) -> Tensor:
        sample = scheduler.scale_model_input(part, timestep).to(unet.dtype)
        if compiled:
            sample = functional.pad(sample, (0, 0) * 3 + (0, batch_size - len(part)))
        texts = embedding.to(device, unet.dtype).expand(len(sample), -1, -1).contiguous()
        output: Tensor = unet(sample, timestep, encoder_hidden_states=texts, return_dict=False)[0][: len(part)]
        if scheduler.config.prediction_type == "epsilon":
            return output.float()
        alpha = scheduler.alphas_cumprod[int(timestep)].to(device)
        return alpha.sqrt() * output.float() + (1 - alpha).sqrt() * part

    parts = []
    with evaluating(pipe), torch.set_grad_enabled(differentiable):
        for part in x.split(batch_size):
            noise = predicted(hidden, part)
            if guidance is not None:
                noise = noise + guidance[0] * (predicted(guidance[1], part) - noise)
            parts.append(noise - part)
    difference = torch.cat(parts)
    if not difference.isfinite().all():
        bad = (~difference.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise NemoError(
            f"the U-Net's noise for seed {', '.join(map(str, bad))} (counted from 0) is not finite: "
            f"use float32 or bfloat16 instead of {unet.dtype}"
        )
    low = difference.amin(dim=(2, 3), keepdim=True)
    span = difference.amax(dim=(2, 3), keepdim=True) - low
    return torch.where(span > 0, (difference - low) / span.where(span > 0, 1.0), 0.0)


def _ddim(pipe: Any, protocol: Protocol) -> Any:
    from diffusers import DDIMScheduler

    # A scheduler of our own: set_timesteps would change the pipeline's.
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise NemoError(
            f"the scheduler's prediction_type must be epsilon or v_prediction, got {scheduler.config.prediction_type}"
        )
    scheduler.set_timesteps(protocol.num_inference_steps)
    return scheduler


# Similarity


def similarity_scales(height: int, width: int, window_sigma: float = 1.5) -> int:
    """M ≤ 3, the number of scales that the similarity has on maps of a size (docs/method.md, section 4).

    The largest with ⌊size / 2^(M−1)⌋ at least as wide as the window: 3 from 44 pixels on, 2 from
    22, 1 from 11 (for an 11-wide window).

    Raises:
        NemoError: the window does not fit at all.
    """
    window = _window_width(window_sigma)
    scales = [m for m in (1, 2, 3) if min(height, width) // 2 ** (m - 1) >= window]
    if not scales:
        raise NemoError(
            f"latents of {height}x{width} are smaller than the similarity's window of {window}x{window}: "
            "choose a smaller Protocol.window_sigma"
        )
    return scales[-1]


def similarity(a: Tensor, b: Tensor, protocol: Protocol) -> Tensor:
    """Structural similarity of pairs of maps: MS-SSIM with `similarity_scales` scales, SSIM for one.

    Weights are 0.33 each for three scales, else 1/M; K1 = 0.01, K2 = 0.03; negative factors count
    as 0 where there are several scales. Only whole windows count (the border is left out), which is
    what torchmetrics did up to 1.3, the version behind the published numbers, and later ones no
    longer do.

    Args:
        a, b: [P, C, H, W] float32, in [0, 1].
        protocol: `data_range` and `window_sigma`. An inferred range is the largest of a's and b's
            over all P pairs, at every scale.

    Returns:
        [P] float32: 1 for equal maps. Deterministic on the CPU.
    """
    scales = similarity_scales(a.shape[-2], a.shape[-1], protocol.window_sigma)
    window = _gaussian_window(protocol.window_sigma, a)
    if scales == 1:
        return _ssim_terms(a, b, window, protocol.data_range)[0]
    weight = 0.33 if scales == 3 else 1 / scales
    product = torch.ones(len(a), dtype=a.dtype, device=a.device)
    for scale in range(scales):
        ssim, contrast = _ssim_terms(a, b, window, protocol.data_range)
        factor = ssim if scale == scales - 1 else contrast
        product = product * factor.relu() ** weight
        a, b = functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)
    return product


def _window_width(sigma: float) -> int:
    return 2 * int(3.5 * sigma + 0.5) + 1


def _gaussian_window(sigma: float, like: Tensor) -> Tensor:
    half = _window_width(sigma) // 2
    offsets = torch.arange(-half, half + 1, dtype=like.dtype, device=like.device)
    window = torch.exp(-((offsets / sigma) ** 2) / 2)
    return window / window.sum()


def _ssim_terms(a: Tensor, b: Tensor, window: Tensor, data_range: float | None) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure factor, both [P]: means over channels and whole windows."""
    if data_range is None:
        # Clamped so that all-constant maps compare as equal instead of as 0 / 0.
        span = torch.maximum(a.max() - a.min(), b.max() - b.min()).clamp_min(1e-12)
    else:
        span = torch.tensor(data_range, dtype=a.dtype, device=a.device)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    maps = torch.cat((a, b, a * a, b * b, a * b))
    planes = maps.reshape(-1, 1, *maps.shape[2:])
    planes = functional.conv2d(planes, window.view(1, 1, 1, -1))
    planes = functional.conv2d(planes, window.view(1, 1, -1, 1))
    mean_a, mean_b, aa, bb, ab = planes.reshape(5, len(a), -1).unbind()
    variance_a = (aa - mean_a**2).clamp_min(0)
    variance_b = (bb - mean_b**2).clamp_min(0)
    contrast = (2 * (ab - mean_a * mean_b) + c2) / (variance_a + variance_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * contrast).mean(1), contrast.mean(1)


# Scores


@dataclass(frozen=True, eq=False)
class MemorizationScore:
    """How alike a prompt's noise differences are across seeds (docs/method.md, section 5).

    Attributes:
        pairs: [S, S] float64, similarity of every two seeds' δ; 1 on the diagonal.
        per_seed: S numbers, each seed's highest similarity with another seed.
        max: the highest of them, the prompt's score.
    """

    pairs: Tensor

    @property
    def per_seed(self) -> tuple[float, ...]:
        others = self.pairs.clone().fill_diagonal_(-math.inf)
        return tuple(others.amax(1).tolist())

    @property
    def max(self) -> float:
        return max(self.per_seed)


class Probe(typing.Protocol):
    """What the searches need to know of a model: one number for a set of neurons."""

    def remaining(
        self,
        neurons: NeuronSet,
        enough: float | None = None,
        seeds: Sequence[int] | None = None,
        ahead: Iterable[NeuronSet] = (),
    ) -> float:
        """The remaining memorization with these neurons off, and no others; of these seeds, or of all that are kept.

        Where `enough` is given and the remaining memorization is above it, any number above it that is not above the
        remaining memorization will do. The sets `ahead` will probably be asked for next, the likeliest first; they are
        a hint that changes no result.
        """

    def likeliest(self, besides: Sequence[int] = ()) -> tuple[int, ...]:
        """Seeds to try a set on first: one besides those given, or all where a seed by itself says nothing."""


#: A seed, and the neurons that are off.
_Trial = tuple[int, NeuronSet]


def fitting_batch_size(pipe: Any, hidden: Tensor) -> int:
    """Latents in one U-Net call where nobody said how many: what there is memory for, or ten if that can't be watched.

    Args:
        pipe: a pipeline.
        hidden: any text embedding, [1, T, K].
    """
    if is_compiled(pipe.unet):
        return DEFAULT_BATCH_SIZE
    with evaluating(pipe):
        return rows_that_fit(pipe.unet, hidden)


class NoiseProbe:
    """One prompt on one pipeline: its score, and the remaining memorization of sets of neurons.

    The one place where searches evaluate the U-Net, and where evaluations are counted. Results are
    remembered: asking for a set again costs nothing. The same seeds give the same numbers on any batch size but for
    rounding; a larger one has room for more trials ahead of their turn, some of them in vain.

    Args:
        pipe: a pipeline, left as it is after every call. Many calls are cheaper within
            `patched(pipe)`, and a compiled U-Net isn't compiled again there.
        hidden: the prompt's text embedding, [1, T, K].
        seeds: S ≥ 2.
        protocol: how to measure.
        batch_size: latents in one U-Net call, at most `seeds`. None: as many as `memory.rows_that_fit` has room for, of
            a compiled U-Net ten. A compiled U-Net always gets calls of one size, filled up with latents whose noise is
            thrown away.
        guidance: as for `noise_differences`.
        stages: where the U-Net can be entered; then no neuron may be off outside `remaining`. None: all of it runs in
            every call.

    Attributes:
        unet_samples: latents that the U-Net has evaluated so far; one that went through a part of it counts as that
            part's share of FLOPs.
        kept_seeds: the seeds that `remaining` compares, counted from 0; all of them at first.
        scales: M, the number of scales of the similarity.
    """

    def __init__(
        self,
        pipe: Any,
        hidden: Tensor,
        *,
        seeds: int = 10,
        protocol: Protocol,
        batch_size: int | None = None,
        guidance: tuple[float, Tensor] | None = None,
        stages: Stages | None = None,
    ) -> None:
        if seeds < 2:
            raise NemoError(f"a score compares seeds: wanted 2 or more, got {seeds}")
        self.pipe = pipe
        self.hidden = hidden
        self.protocol = protocol
        self.guidance = guidance
        self.latents = initial_latents(pipe, seeds, protocol)
        height, width = self.latents.shape[-2:]
        # Known before anything is evaluated: latents can be too small for the window.
        self.scales = similarity_scales(height, width, protocol.window_sigma)
        self.batch_size = min(seeds, fitting_batch_size(pipe, hidden) if batch_size is None else batch_size)
        self.kept_seeds = tuple(range(seeds))
        self.unet_samples = 0.0
        self._untouched: Tensor | None = None
        self._likeliest_first = list(self.kept_seeds)
        self._remembered: dict[NeuronSet, dict[int, float]] = {}
        self._held = _HeldRows(stages, seeds, min(HELD_BYTES, int(HELD_SHARE * free_bytes(pipe.unet.device))))

    @property
    def untouched(self) -> Tensor:
        """δ of every seed on the pipeline as it was at the first use, [S, C, H, W]."""
        if self._untouched is None:
            parts = []
            for seeds in torch.arange(len(self.latents)).split(self.batch_size):
                found, rows = self._run(seeds.tolist(), WHOLE, [{}] * len(seeds))
                parts.append(found)
                for seed, row in zip(seeds.tolist(), rows, strict=True):
                    self._held.keep(seed, NeuronSet(), row)
            self._untouched = torch.cat(parts)
        return self._untouched

    def score(self) -> MemorizationScore:
        """Similarity of every two seeds' untouched δ, in one call (an inferred range sees them all)."""
        seeds = len(self.latents)
        first, second = torch.combinations(torch.arange(seeds)).unbind(1)
        values = similarity(self.untouched[first], self.untouched[second], self.protocol).double().cpu()
        pairs = torch.eye(seeds, dtype=torch.float64)
        pairs[first, second] = values
        pairs[second, first] = values
        return MemorizationScore(pairs)

    def keep_above(self, threshold: float) -> tuple[int, ...]:
        """Compare from now on only seeds whose score is above the threshold; give their numbers."""
        per_seed = self.score().per_seed
        self.kept_seeds = tuple(s for s, score in enumerate(per_seed) if score > threshold)
        self._likeliest_first = sorted(self.kept_seeds, key=lambda s: -per_seed[s])
        self._remembered.clear()
        return self.kept_seeds

    def likeliest(self, besides: Sequence[int] = ()) -> tuple[int, ...]:
        """The kept seed that was highest last, but for some; all where a seed's similarity depends on the others."""
        others = tuple(seed for seed in self._likeliest_first if seed not in besides)
        return others if self.protocol.data_range is None else others[:1]

    def remaining(
        self,
        neurons: NeuronSet,
        enough: float | None = None,
        seeds: Sequence[int] | None = None,
        ahead: Iterable[NeuronSet] = (),
    ) -> float:
        """The highest similarity, over kept seeds, of δ with these neurons off and untouched δ (3.6).

        Args:
            neurons: what to switch off, and nothing else; none: 1 without an evaluation.
            enough: a number above which any will do. A seed, the one that was highest last, is evaluated first, and the
                others only if it is not above; the highest found is returned. Where an inferred data range makes a
                seed's similarity depend on the others all are evaluated, and so they are on a compiled U-Net.
            seeds: kept seeds to look at instead of all.
            ahead: sets that will probably be asked for next. Where a batch has room, the seed that was highest last is
                evaluated with them as well.

        Raises:
            NemoError: no seed is kept, or noise that isn't finite.
        """
        if not self.kept_seeds:
            raise NemoError("no seed is kept: the prompt isn't memorized, nothing can remain")
        if len(neurons) == 0:
            return 1.0
        limit = math.inf if enough is None else enough
        order = [seed for seed in self._likeliest_first if seeds is None or seed in seeds]
        known = self._remembered.setdefault(neurons, {})
        together = self.protocol.data_range is None or is_compiled(self.pipe.unet)
        # More than a batch has no room.
        others = [] if together else list(dict.fromkeys(islice(ahead, self.batch_size)))
        later = [(order[0], other) for other in others if other != neurons and len(other) > 0]
        # Nobody first: what is known already may be enough. A seed known from a trial ahead stands for the likeliest.
        alone = not (together or enough is None or any(seed in known for seed in order))
        for group in ([], order[:1] if alone else [], order):
            wanted = [(seed, neurons) for seed in group if seed not in known]
            if wanted:
                self._evaluate(wanted, [trial for trial in later if not self._is_known(*trial)], limit)
            highest = max((seed for seed in order if seed in known), key=lambda seed: known[seed], default=None)
            if highest is not None and known[highest] > limit:
                self._likeliest_first.remove(highest)
                self._likeliest_first.insert(0, highest)
                return known[highest]
        if seeds is None:
            self._likeliest_first.sort(key=lambda seed: -known[seed])
        return max(known[seed] for seed in order)

    def effects(self, layers: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
        """How much each neuron of some layers takes away from the remaining memorization, to first order.

        The derivative of these seeds' similarities with respect to each neuron's scale, with all of them at ½: at 1 a
        similarity has its maximum and no slope, and at 0 nothing may be left that could change. Each latent goes
        forward, and back, which counts as two more.

        Args:
            layers: names of value layers.
            seeds: some of the seeds.

        Returns:
            Layer name -> [N] float32: the larger, the more is gained by switching the neuron off.
        """
        modules = value_layers(self.pipe, layers)
        total = {layer: torch.zeros(module.out_features) for layer, module in modules.items()}
        for seed in seeds:
            untouched = self.untouched[[seed]]
            scales = {
                layer: module.weight.new_full((1, module.out_features), 0.5, dtype=torch.float32).requires_grad_()
                for layer, module in modules.items()
            }
            start, row = self._held.entry_before(seed, layers)
            # For a compiled U-Net a backward pass would be another compilation.
            with patched(self.pipe), torch.compiler.set_stance("force_eager"):
                with scaled_rows(self.pipe, scales), self._held.running(start, [row]):
                    difference = noise_differences(
                        self.pipe, self.hidden, self.latents[[seed]], self.protocol, batch_size=1, differentiable=True
                    )
                value = similarity(untouched, difference, self.protocol)
                gradients = torch.autograd.grad(value.sum(), list(scales.values()))
            self.unet_samples += 3 * self._held.share(start)
            for layer, gradient in zip(scales, gradients, strict=True):
                total[layer] += gradient[0].cpu()
        return total

    def _evaluate(self, wanted: Sequence[_Trial], ahead: Sequence[_Trial], limit: float) -> None:
        """Add to what is remembered the similarity of each trial's δ and its seed's untouched δ.

        Args:
            wanted: seeds, with the neurons that are off.
            ahead: further ones, of which those are evaluated that enter the U-Net where some of `wanted` do.
            limit: a similarity above it shows that a set fails.
        """
        untouched = self.untouched  # before anything is off
        differences, rows = self._differences(wanted, ahead)
        values = similarity(untouched[[seed for seed, _ in rows]], differences, self.protocol).tolist()
        for (trial, row), value in zip(rows.items(), values, strict=True):
            seed, neurons = trial
            self._remembered.setdefault(neurons, {})[seed] = value
            # A set that fails is not tried again, and the next one differs from what it was made from.
            if value <= limit:
                self._held.keep(seed, neurons, row)

    def _is_known(self, seed: int, neurons: NeuronSet) -> bool:
        return seed in self._remembered.get(neurons, {})

    def _differences(self, wanted: Sequence[_Trial], ahead: Sequence[_Trial]) -> tuple[Tensor, dict[_Trial, Row]]:
        """δ of some trials, each from where the U-Net can be entered, and what was noted, in the same order."""
        entries = {trial: self._held.entry(*trial) for trial in (*wanted, *ahead)}
        differences: list[Tensor] = []
        rows: dict[_Trial, Row] = {}
        for start in {entries[trial][0] for trial in wanted}:
            entering = [trial for trial in wanted if entries[trial][0] == start]
            also = [trial for trial in ahead if entries[trial][0] == start]
            entering += also[: -len(entering) % self.batch_size]
            for first in range(0, len(entering), self.batch_size):
                batch = entering[first : first + self.batch_size]
                with patched_rows(self.pipe, [neurons for _, neurons in batch]):
                    found, noted = self._run([seed for seed, _ in batch], start, [entries[trial][1] for trial in batch])
                differences.append(found)
                rows |= zip(batch, noted, strict=True)
        return torch.cat(differences), rows

    def _run(self, seeds: Sequence[int], start: int, entering: Sequence[Row]) -> tuple[Tensor, list[Row]]:
        """δ of some seeds on the pipeline as it is now, in one call, and what it left."""
        with self._held.running(start, entering) as noted:
            differences = self._noise_differences(self.latents[list(seeds)], self._held.share(start))
        return differences, noted

    def _noise_differences(self, latents: Tensor, share: float) -> Tensor:
        """One U-Net call, or two with guidance, counted."""
        rows = self.batch_size if is_compiled(self.pipe.unet) else len(latents)
        self.unet_samples += rows * share * (1 if self.guidance is None else 2)
        return noise_differences(
            self.pipe, self.hidden, latents, self.protocol, batch_size=rows, guidance=self.guidance
        )


class _HeldRows:
    """What earlier runs left of each seed, to enter the U-Net with; the sets used last, as far as memory allows.

    Args:
        stages: where the U-Net can be entered; None: nowhere, and nothing is held.
        seeds: S.
        memory: bytes to hold them in.
    """

    def __init__(self, stages: Stages | None, seeds: int, memory: int) -> None:
        self._stages = stages
        self._rows: list[OrderedDict[NeuronSet, Row]] = [OrderedDict() for _ in range(seeds)]
        self._sets = 0 if stages is None else memory // max(stages.row_bytes * seeds, 1)

    def entry(self, seed: int, neurons: NeuronSet) -> tuple[int, Row]:
        """The last place before which nothing differs from a held set, with its row; else `WHOLE`."""
        if self._stages is None or not self._can_hold(neurons):
            return WHOLE, {}
        start, held = WHOLE, None
        for other in self._rows[seed]:
            differ = (neurons.get(layer, ()) != other.get(layer, ()) for layer in self._stages.layers)
            first = next((place for place, differs in enumerate(differ) if differs), len(self._stages.layers) - 1)
            if first >= start:
                start, held = first, other
        if held is None:
            return WHOLE, {}
        self._rows[seed].move_to_end(held)
        return start, self._rows[seed][held]

    def entry_before(self, seed: int, layers: Sequence[str]) -> tuple[int, Row]:
        """The first of some layers as a place to enter, with a row for it, while no neuron is off."""
        start, row = self.entry(seed, NeuronSet())
        if self._stages is None or start == WHOLE:
            return WHOLE, {}
        return min(start, *(place for place, layer in enumerate(self._stages.layers) if layer in layers)), row

    def keep(self, seed: int, neurons: NeuronSet, row: Row) -> None:
        """Hold a row."""
        if self._can_hold(neurons):
            self._rows[seed][neurons] = row
            while len(self._rows[seed]) > self._sets:
                self._rows[seed].popitem(last=False)

    def _can_hold(self, neurons: NeuronSet) -> bool:
        """A set with neurons in layers that are no entries may differ from another one before the entry."""
        return self._stages is not None and set(neurons) <= set(self._stages.layers)

    def share(self, start: int) -> float:
        """The share of a whole call's FLOPs."""
        return 1.0 if self._stages is None or start == WHOLE else self._stages.shares[start]

    @contextmanager
    def running(self, start: int, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """`Stages.replaying`, or a plain block where the U-Net can't be entered."""
        if self._stages is None:
            yield [{} for _ in rows]
        else:
            with self._stages.replaying(start, rows) as noted:
                yield noted


def memorization_score(
    pipe: Any,
    prompt: str,
    *,
    seeds: int = 10,
    protocol: Protocol | None = None,
    batch_size: int | None = None,
) -> MemorizationScore:
    """How much a prompt is memorized: similarity of its δ across seeds (docs/method.md, section 5).

    The pipeline is measured as it is: inside `patched(pipe, neurons)`, with these neurons off.

    Args:
        pipe: a pipeline (SD1, SD2).
        prompt: the text.
        seeds: S ≥ 2.
        protocol: None: `Protocol.paper()`.
        batch_size: latents in one U-Net call; changes the result by rounding only. None: as for `NoiseProbe`.
    """
    hidden = encode_prompts(pipe, [prompt])
    protocol = protocol or Protocol.paper()
    return NoiseProbe(pipe, hidden, seeds=seeds, protocol=protocol, batch_size=batch_size).score()


@dataclass(frozen=True)
class Threshold:
    """The memorization threshold τ of a model, and what it was computed from; `float(threshold)` is τ.

    Attributes:
        value: τ = mean + std.
        mean, std: of the scores; std is unbiased.
        scores: highest pairwise similarity of each unmemorized prompt.
        seeds: S, of each prompt.
        protocol: how the scores were measured.
        fingerprint: `model_fingerprint` of the model, over all its value layers.
        model_name: what the model was loaded from.
    """

    value: float
    mean: float
    std: float
    scores: tuple[float, ...]
    seeds: int
    protocol: Protocol
    fingerprint: str
    model_name: str

    def __float__(self) -> float:
        return self.value

    def check(self, pipe: Any, protocol: Protocol, seeds: int) -> None:
        """Make sure that scores of this pipeline, protocol and number of seeds compare to τ.

        Raises:
            NemoError: one of them is another; `float(threshold)` says that you know better.
        """
        choices = [("seeds", self.seeds, seeds)]
        choices += [(name, getattr(self.protocol, name), getattr(protocol, name)) for name in _SCALE_OF_A_SCORE]
        for name, measured_with, asked_for in choices:
            if measured_with != asked_for:
                raise NemoError(
                    f"the threshold was measured with {name} {measured_with}, got {asked_for}: "
                    "measure it again, or give it as a number"
                )
        actual = model_fingerprint(pipe, "all")
        if actual != self.fingerprint:
            raise NemoError(
                "the threshold was measured on another model or in another dtype: "
                f"'{self.model_name}' ({self.fingerprint[:12]}…), this pipeline is "
                f"'{name_of_model(pipe)}' ({actual[:12]}…): measure it again, or give it as a number"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON, at once or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Threshold":
        """Read what `save` wrote.

        Raises:
            NemoError: not a threshold.
        """
        try:
            values = json.loads(Path(path).read_text())
            values["protocol"] = Protocol.from_dict(values["protocol"])
            values["scores"] = tuple(values["scores"])
            return cls(**values)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise NemoError(f"{path} does not hold a threshold: {error}") from error


def memorization_threshold(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: int = 10,
    protocol: Protocol | None = None,
    batch_size: int | None = None,
    progress: ProgressLike = None,
) -> Threshold:
    """τ, the mean plus one std of unmemorized prompts' scores (docs/method.md, section 6).

    Args:
        pipe: a pipeline (SD1, SD2).
        prompts: two texts or more that the model has not memorized.
        seeds: S ≥ 2, as many as τ will be used with.
        protocol: None: `Protocol.paper()`.
        batch_size: latents in one U-Net call; changes the result by rounding only. None: as for `NoiseProbe`.
        progress: see `nemo_ext.progress`.

    Raises:
        NemoError: fewer than two prompts, or what `noise_differences` refuses.
    """
    texts = check_prompts(prompts)
    if len(texts) < 2:
        raise NemoError(f"a standard deviation needs two prompts or more, got {len(texts)}")
    protocol = protocol or Protocol.paper()
    guidance = None
    if protocol.threshold_guidance != 0:
        guidance = (protocol.threshold_guidance, encode_prompts(pipe, [""]))
    scores = []
    with open_progress(progress) as bars, bars.task("threshold", len(texts)) as advance:
        for text in texts:
            probe = NoiseProbe(
                pipe,
                encode_prompts(pipe, [text]),
                seeds=seeds,
                protocol=protocol,
                batch_size=batch_size,
                guidance=guidance,
            )
            batch_size = probe.batch_size  # the next prompts' is the same
            scores.append(probe.score().max)
            advance(1)
    values = torch.tensor(scores, dtype=torch.float64)
    mean, std = values.mean().item(), values.std().item()
    return Threshold(
        value=mean + std,
        mean=mean,
        std=std,
        scores=tuple(scores),
        seeds=seeds,
        protocol=protocol,
        fingerprint=model_fingerprint(pipe, "all"),
        model_name=name_of_model(pipe),
    )
