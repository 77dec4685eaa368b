"""Detectors of memorized prompts: what each one computes, and where it comes from.

| symbol | meaning |
|---|---|
| e, e_∅ | text embedding of the prompt, and of the empty prompt |
| x_T | initial latents of a seed |
| T | the timestep of the protocol: the first of 50 DDIM steps, unless the protocol says otherwise |
| t | a late timestep: the third last of the protocol's schedule |
| γ₁, γ₂ | weights: 1 and 2 |

All scores but NeMo's and the z-score are means over the seeds. For all of them, higher means memorized.

- **NeMo's score** is the highest similarity of two seeds' noise differences (docs/method.md, section 5).
- **Magnitude, first step** is ‖ε(x_T, T, e) − ε(x_T, T, e_∅)‖₂. Wen et al. use 50 DDIM steps and four seeds.
- **Magnitude, all steps** is the mean of ‖ε(x, e) − ε(x, e_∅)‖₂ over all steps of a guided generation from x_T.
- **Attention entropy, fourth layer** is E = −Σ p̄ ln p̄ over the tokens. p̄ is the attention that a token gets in the
  call with the embedding of the prompt, at the fourth cross-attention in network order, averaged over heads and latent
  positions. This is mode "E" of detect.py, which Ren et al. have published. Ren et al. report the *higher* entropy for
  memorized prompts of Stable Diffusion. Those of the first bundled model (docs/method.md) had the lower one. Mode
  "D" of that script needs the last ten steps of a whole generation, and is not measured here.
- **Attention entropy, all layers** is the same, with p̄ averaged over all cross-attentions as well. Mode "D" averages
  in this way, at the last steps. Taking the first step, which needs no generation, is our choice.
- **Z-score** is the largest |a − μ| / σ of all neurons in the layers of the statistics (docs/method.md, section 8). It
  is ours. It depends on the text alone.
- **Guidance alignment** is cos(ε(x_T, t, e_∅), ε(x_T, t, e) − ε(x_T, t, e_∅)) over the channels of each latent
  position, averaged over positions. The latents are pure noise, although t is a step of little noise.
- **Anisotropy** is γ₁ · magnitude at the first step + γ₂ · guidance alignment, of Asthana and Belagiannis. Both follow
  the code that they have published (detect_mem.py in mode "x,c|x", and detect_eval.py). We have not compared them with
  the equations of the paper. The γ are those of that code for Stable Diffusion 1.4, for which they were tuned. Latents
  of another size have other magnitudes, so there the sum weighs its parts differently. For a model with v-prediction,
  that code has another γ₂, the magnitude of scores and the cosine of v. Here it is ε for all models.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The cross-attention of `LAYER_ENTROPY`, counted from 0.
PUBLISHED_LAYER = 3
#: The late step of `GUIDANCE_ALIGNMENT`, counted from the end: 1 is the last one.
LATE_STEP = 3
#: γ₁ and γ₂.
NORM_WEIGHT, ALIGNMENT_WEIGHT = 1.0, 2.0


@dataclass(frozen=True)
class Detector:
    """A number that says how likely a prompt is memorized.

    Attributes:
        name: a short name, for options and JSON.
        title: what is measured, for tables.
        citation: where it comes from.
        higher_is_memorized: the direction: whether memorized prompts have the higher scores.
    """

    name: str
    title: str
    citation: str
    higher_is_memorized: bool = True


_WEN = "Wen et al., ICLR 2024, openreview.net/forum?id=84n3UwkH7b"
_REN = "Ren et al., ECCV 2024, arXiv 2403.11052"
_ASTHANA = "Asthana and Belagiannis, ICLR 2026, arXiv 2601.20642"

NEMO = Detector("nemo", "NeMo's score", "Hintersdorf et al., NeurIPS 2024, arXiv 2406.02366")
FIRST_MAGNITUDE = Detector("magnitude-first-step", "magnitude, first step", _WEN)
MEAN_MAGNITUDE = Detector("magnitude-all-steps", "magnitude, all steps", _WEN)
LAYER_ENTROPY = Detector("attention-entropy-fourth-layer", "attention entropy, fourth layer", _REN)
MEAN_ENTROPY = Detector("attention-entropy-all-layers", "attention entropy, all layers", _REN)
Z_SCORE = Detector("z-score", "largest z-score", "this package")
ANISOTROPY = Detector("anisotropy", "anisotropy", _ASTHANA)
GUIDANCE_ALIGNMENT = Detector("guidance-alignment", "guidance alignment, late step", _ASTHANA)

#: All detectors, in the order of tables.
DETECTORS = (
    NEMO, FIRST_MAGNITUDE, MEAN_MAGNITUDE, LAYER_ENTROPY, MEAN_ENTROPY, ANISOTROPY, GUIDANCE_ALIGNMENT, Z_SCORE,
)  # fmt: skip
