"""Every choice that a score, a threshold or a search depends on (docs/method.md, section 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nemo_ext.errors import NemoError


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
    def paper(cls) -> Protocol:
        """The paper's method; the default."""
        return cls()

    @classmethod
    def published_code(cls) -> Protocol:
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
    def from_name(cls, name: str) -> Protocol:
        """The protocol called "paper" or "published-code"."""
        known = {protocol.name: protocol for protocol in (cls.paper(), cls.published_code())}
        if name not in known:
            raise NemoError(f"there is no protocol '{name}': wanted {' or '.join(known)}")
        return known[name]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """The protocol that `to_dict` wrote.

        Raises:
            NemoError: an unknown field.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise NemoError(f"a protocol has no field {', '.join(sorted(unknown))}")
        return cls(**values)
