"""Every choice that a score, a threshold or a search depends on (docs/method.md, section 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_ext.errors import NemoError
from nemo_ext.reading import Count, PositiveCount, Seed, restored


@dataclass(frozen=True)
class Protocol:
    """Every choice that a score, a threshold or a search depends on, except for the number of seeds.

    `Protocol.paper()`, the default, follows the paper. `Protocol.published_code()` follows the scripts published with
    it, and the attributes below name its values where they differ. Every field can be changed, for example with
    `dataclasses.replace(Protocol.paper(), first_seed=7)`. docs/method.md, section 11, has both protocols in a table.

    Attributes:
        name: the protocol's name.
        num_inference_steps: the number of steps of the DDIM schedule from which the timestep is taken.
        step_index: the index of the timestep at which the noise is predicted, always with the initial latents.
            Published code: 1, the second timestep; it discards the output of the first U-Net call.
        seeds_share_generator: if False, seed s = 0, 1, … has a generator of its own, seeded with `first_seed` + s, so
            its latents are those of that seed in any diffusers pipeline. Published code: True; one generator, seeded
            with `first_seed`, draws the latents of all seeds at once.
        first_seed: the seed of the first generator, or of the only one.
        data_range: the range of values that the similarity assumes. Published code: None; the range is inferred at
            every scale from all maps of a call, so a score depends on the seeds that are compared together.
        window_sigma: the standard deviation σ of the similarity's Gaussian window, in latent pixels. The window is
            2⌊3.5 σ + 0.5⌋ + 1 wide, which is 11 for σ = 1.5. Latents smaller than 11×11 need a smaller σ.
        threshold_guidance: the scale g of classifier-free guidance in `memorization_threshold`; 0: no guidance.
            Published code: 7, with the conditional and unconditional predictions swapped, ε(y) + g (ε("") − ε(y)). It
            detects memorized prompts without guidance.
        first_theta, theta_step, last_theta: the first value, the step and the last value of θ, the threshold for
            z-scores in the initial selection.
        first_top_k: the first k of the initial selection; it is raised by 1 with every step of θ.
        tries_last_theta: whether the initial selection tries θ = `last_theta` before it raises τ. Published code:
            False; when θ reaches `last_theta`, it uses the selection of the step before.
        keeps_duplicates: if False, candidates are a set. Published code: True; a neuron selected by θ and by k occurs
            twice among the candidates, and it is on only after both have been switched on.
        measures_floor: whether the floor, the remaining memorization with all searched neurons off, is measured before
            the search, to find out whether τ can be reached (docs/method.md, section 7). Published code: False.
        raise_margin: if τ cannot be reached, it is raised to the reached similarity plus this margin, so that neurons
            without any effect are still switched on again. Published code: 0.
    """

    name: str = "paper"
    num_inference_steps: PositiveCount = 50
    step_index: Count = 0
    seeds_share_generator: bool = False
    first_seed: Seed = 1
    data_range: float | None = 1.0
    window_sigma: float = 1.5
    threshold_guidance: float = 0.0
    first_theta: float = 5.0
    theta_step: float = 0.25
    last_theta: float = 1.0
    first_top_k: Count = 0
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
        """The protocol of the paper, which is the default."""
        return cls()

    @classmethod
    def published_code(cls) -> Protocol:
        """The protocol of the scripts that were published with the paper."""
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
        """The protocol with a name, "paper" or "published-code".

        Raises:
            NemoError: there is no protocol with that name.
        """
        known = {protocol.name: protocol for protocol in (cls.paper(), cls.published_code())}
        if name not in known:
            raise NemoError(f"there is no protocol '{name}': wanted {' or '.join(known)}")
        return known[name]

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """Make a protocol from a dictionary of `to_dict`.

        Raises:
            NemoError: a field is unknown, or has a value of another type or out of range.
        """
        return restored(cls, values)
