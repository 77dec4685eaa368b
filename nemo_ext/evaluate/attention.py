"""How the cross-attentions divide their attention among the tokens of a text, observed in a call of the denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nemo_ext.forwards import Forward, replaced_forwards
from nemo_ext.models.registry import denoiser_of, family_of
from nemo_ext.models.state import is_compiled


def attention_entropy(attention: Tensor) -> Tensor:
    """Compute E = −Σ_t p̄_t ln p̄_t, the entropy of attention over tokens, in nats.

    E is 0 if one token gets all attention, and ln T if all tokens get the same.

    Args:
        attention: p̄, [..., T], with a sum of 1 over the tokens. 0 · ln 0 counts as 0.

    Returns:
        E, [...], in the same dtype.
    """
    entropy: Tensor = torch.special.entr(attention).sum(-1)
    return entropy


def token_attention(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Compute p̄, the attention that each token gets: softmax(scale · q kᵀ), averaged over heads and latent positions.

    Args:
        query: q of all heads, [B, P, heads · D], for P latent positions.
        key: k of all heads, [B, T, heads · D], for T tokens.
        heads: the number of heads.
        scale: the factor before the softmax, usually 1 / √D.

    Returns:
        p̄, [B, T] float32; each row has a sum of 1.
    """
    query, key = (values.float().unflatten(-1, (heads, -1)).transpose(1, 2) for values in (query, key))
    # One row after another, because the probabilities of a whole batch would take more memory than the denoiser does.
    rows = [(scale * q @ k.mT).softmax(-1).mean((0, 1)) for q, k in zip(query, key, strict=True)]
    return torch.stack(rows)


def cross_attention_names(pipe: Any) -> tuple[str, ...]:
    """The names of all cross-attentions of a pipeline's denoiser, in network order."""
    return tuple(name for name, _ in family_of(pipe).cross_attentions(denoiser_of(pipe)))


@contextmanager
def recorded_attention(pipe: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Record `token_attention` of every cross-attention in all calls of the denoiser, for the length of a block.

    The queries and keys are the outputs of `to_q` and `to_k`. The attention processors stay in place, so the denoiser
    returns what it returns without the recording. After the block, or after an exception in it, all modules are as they
    were before.

    Not recorded are cross-attentions with a mask over the tokens, with normalized queries or keys, and those that do
    not call `to_q` and `to_k` (fused projections). They are absent in the result. A compiled denoiser runs eagerly in
    the block.

    Args:
        pipe: a pipeline.

    Yields:
        Name of the cross-attention -> p̄ of each call, [B, T] float32. It is filled while the denoiser runs.
    """
    attentions = dict(family_of(pipe).cross_attentions(denoiser_of(pipe)))
    projections = {
        f"{name}.{projection}": module
        for name, attention in attentions.items()
        for projection in ("to_q", "to_k")
        for module in (getattr(attention, projection, None),)
        if isinstance(module, nn.Module)
    }
    latest: dict[str, Tensor] = {}
    recorded: dict[str, list[Tensor]] = {}

    def projecting(name: str, forward: Forward) -> Forward:
        def project(*arguments: Any, **options: Any) -> Tensor:
            latest[name] = forward(*arguments, **options)
            return latest[name]

        return project

    def attending(name: str, forward: Forward) -> Forward:
        attention: Any = attentions[name]

        def attend(*arguments: Any, **options: Any) -> Any:
            output = forward(*arguments, **options)
            query, key = (latest.pop(f"{name}.{projection}", None) for projection in ("to_q", "to_k"))
            if query is not None and key is not None and _is_plain(attention, options):
                p = token_attention(query, key, attention.heads, attention.scale)
                recorded.setdefault(name, []).append(p)
            return output

        return attend

    # With other forwards, torch.compile would compile the denoiser a second time.
    compiled = is_compiled(family_of(pipe).denoiser(pipe))
    eagerly = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with eagerly, replaced_forwards(projections, projecting), replaced_forwards(attentions, attending):
        yield recorded


def _is_plain(attention: Any, options: dict[str, Any]) -> bool:
    normalizes = any(getattr(attention, norm, None) is not None for norm in ("norm_q", "norm_k"))
    return not normalizes and hasattr(attention, "heads") and options.get("attention_mask") is None
