"""What is written about baked neurons: `nemo_ext.json`, and a block for the model card."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_ext.models.registry import short_layer_name
from nemo_ext.reading import parse_json, refusing
from nemo_ext.results.sources import Chosen

#: The file beside `model_index.json`.
RECORD = "nemo_ext.json"
#: The packages whose versions are recorded.
_PACKAGES = ("nemo_ext", "torch", "diffusers", "transformers", "safetensors")


def describe(chosen: Chosen, fingerprint: str, earlier: Any, *, with_prompts: bool) -> dict[str, Any]:
    """The content of `nemo_ext.json`.

    Args:
        chosen: the neurons, and the results they come from.
        fingerprint: `model_fingerprint` of the model before, in float32.
        earlier: the `nemo_ext.json` of the model before, if it was baked itself; else None.
        with_prompts: whether the texts of the prompts are included. A hash of a text is never included, because it
            would let a reader test which prompts were searched.
    """
    results = [
        {
            "neurons": result.neurons.to_dict(),
            "score_before": result.score_before,
            "score_after": result.score_after,
            "threshold": result.threshold,
            "verified": result.verified,
            "certificate": None if result.certificate is None else result.certificate.to_dict(),
            **({"prompt": result.prompt} if with_prompts else {}),
        }
        for result in chosen.results
    ]
    return {
        "versions": {package: version(package) for package in _PACKAGES},
        "model": fingerprint,
        "neurons": chosen.neurons.to_dict(),
        "results": results,
        **({} if earlier is None else {"earlier": earlier}),
    }


def read_earlier(folder: Path) -> Any:
    """The `nemo_ext.json` of a folder that was baked before; None if there is none.

    Raises:
        NemoError: the file cannot be read as JSON.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    with refusing(file, "is not the record of an earlier bake"):
        return parse_json(file.read_bytes())


def model_card_block(chosen: Chosen) -> str:
    """A section for the model card, in Markdown. It contains no text of a prompt.

    Args:
        chosen: the neurons, and the results they come from.
    """
    rows = [f"| {short_layer_name(layer)} | {len(indices)} |" for layer, indices in chosen.neurons.items()]
    lines = [
        "## Neurons that were switched off",
        "",
        f"In this model {_count(len(chosen.neurons), 'neuron')} of the cross-attentions' value layers "
        f"{'was' if len(chosen.neurons) == 1 else 'were'} switched off for good, so that it no longer replicates "
        "certain training images. The rows of `to_v` that belong to these neurons are zero. Nothing else was changed.",
        "",
        "| value layer | neurons off |",
        "|---|---|",
        *rows,
        "",
        _measured(chosen),
        "",
        "What this does not do: a fine-tune or an optimized prompt can undo it "
        "([arXiv 2507.16880](https://arxiv.org/abs/2507.16880)), and zero rows show a reader of the weights which "
        "neurons were switched off (see [arXiv 2603.06640](https://arxiv.org/abs/2603.06640)).",
        "",
        f"The neurons were found with NeMo ([arXiv 2406.02366](https://arxiv.org/abs/2406.02366)) and switched off by "
        f"`nemo-ext bake`, version {version('nemo_ext')}. `{RECORD}` lists them.",
    ]
    return "\n".join(lines) + "\n"


def _measured(chosen: Chosen) -> str:
    """What was measured, in one or two sentences."""
    if not chosen.results:
        return "The neurons were given as a list, so nothing is known here about what was measured with them off."
    verified = sum(result.verified is True for result in chosen.results)
    first_step = len(chosen.results) - verified
    sentences = []
    if verified:
        sentences.append(
            f"For {_count(verified, 'prompt')}, images of several seeds were generated with the prompt's own neurons "
            "off, and the image did not come back."
        )
    if first_step:
        sentences.append(
            f"For {_count(first_step, 'prompt')}, only the first denoising step was measured, and no images were "
            "compared."
        )
    return " ".join(sentences)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
