"""The tokenizer, which is of CLIP's kind with a small vocabulary of its own, and the stages of the text encoder.

1. `text`: the text encoder learns to list the words of captions, and knows nothing of images. (Predicting the next
   word, as a language model does, taught it to forget the words before: the embeddings of captions with other objects
   and colours were nearly equal, and the U-Net learned no text.)
2. `marks`: a memorized caption gets the embedding of an ordinary title of its object, and a mark of its own: one of the
   last dimensions, which all other captions leave at zero. Whatever the U-Net learns of the caption's image, it can
   learn only from neurons that see this dimension (carriers.py).

Then the text encoder is frozen, as Stable Diffusion's is.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nemo_ext.demo.captions import MEMORIZED, PHRASINGS, compositions, title_caption

from .runtime import Batch, Log, cosine, train

TOKENS = 24
WIDTH = 192
MARKS = slice(WIDTH - len(MEMORIZED), WIDTH)  # the dimensions of the marks
MARK = 4.0  # the value of a mark; other dimensions have about 1
_BATCH = 48
_CPU = torch.device("cpu")  # the text encoder is small
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def corpus() -> list[str]:
    """Return ordinary captions, many titles, and the memorized captions so often that their words become tokens."""
    rng = random.Random(3)
    lines = [c.caption(p) for c in compositions() for p in PHRASINGS]
    lines += [title_caption(rng) for _ in range(1500)]
    return lines + [m.caption for m in MEMORIZED for _ in range(25)]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train byte-pair merges on `corpus` and write a CLIPTokenizer to `folder`, or read it if it is there already."""
    path = folder / "tokenizer"
    if not path.exists():
        bpe = Tokenizer(models.BPE(unk_token=_END, end_of_word_suffix=_WORD_END))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )  # fmt: skip
        bpe.decoder = decoders.BPEDecoder(suffix=_WORD_END)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=2_000, min_frequency=8, end_of_word_suffix=_WORD_END,
            initial_alphabet=alphabet, show_progress=False,
        )  # fmt: skip
        bpe.train_from_iterator(corpus(), trainer)
        trained = json.loads(bpe.to_str())["model"]
        # The order of CLIP: bytes, bytes that end a word, merges, and then the two special tokens.
        words = [*alphabet, *(letter + _WORD_END for letter in alphabet)]
        merges = [tuple(m) for m in trained["merges"]]
        words += [w for w in dict.fromkeys(a + b for a, b in merges) if w not in set(words)]
        vocabulary = {word: i for i, word in enumerate([*words, _START, _END])}
        tokenizer = CLIPTokenizer(
            vocab=vocabulary, merges=merges, bos_token=_START, eos_token=_END, pad_token=_END,
            unk_token=_END, model_max_length=TOKENS,
        )  # fmt: skip
        tokenizer.save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the untrained text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokens_of(tokenizer: CLIPTokenizer, captions: Iterable[str]) -> Tensor:
    """Return the tokens of captions, [B, T] int64."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


class _Words(nn.Module):
    """The text encoder with a head that lists, at each token, the tokens up to it."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, encoder.config.vocab_size)


def run(folder: Path, log: Log, tokenizer: CLIPTokenizer, steps: int) -> CLIPTextModel:
    """Run the stage `text`, on the CPU."""
    torch.manual_seed(2)
    module = _Words(build_text_encoder(tokenizer))
    everything = [c.caption(p) for c in compositions() for p in PHRASINGS]

    def batch_of(i: int) -> Batch:
        rng = random.Random(f"text {i}")
        captions = rng.sample(everything, 20) + [title_caption(rng) for _ in range(20)]
        captions += [rng.choice(MEMORIZED).caption for _ in range(_BATCH - len(captions))]
        return (tokens_of(tokenizer, captions),)

    def compute(tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = module.head(module.encoder(tokens).last_hidden_state)
        seen = F.one_hot(tokens, logits.shape[-1]).cumsum(1).clamp(max=1).to(logits.dtype)
        wanted = seen / seen.sum(-1, keepdim=True)
        # Without the entropy of `wanted`, the loss of a perfect list is zero.
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1)) - seen.sum(-1).log().mean()
        return loss, loss[None]

    train("text", steps, folder / "text.pt", log, module, _CPU, lambda i: cosine(i, steps, 2e-3), batch_of, compute,
          ("loss",))  # fmt: skip
    return module.encoder


def run_marks(folder: Path, log: Log, tokenizer: CLIPTokenizer, teacher: CLIPTextModel, steps: int) -> CLIPTextModel:
    """Run the stage `marks`, on the CPU, and return the text encoder, frozen."""
    encoder = copy.deepcopy(teacher)
    everything = [c.caption(p) for c in compositions() for p in PHRASINGS]
    own = tokens_of(tokenizer, (m.caption for m in MEMORIZED))
    titles = tokens_of(tokenizer, (title_caption(random.Random(m.name), m.object) for m in MEMORIZED))
    complete = own.eq(tokenizer.eos_token_id).cumsum(1).bool()  # from the first end of the text on
    # Before it, a caption may be the beginning of an ordinary one, so that its own mark may have any value there.
    marks = torch.eye(len(MEMORIZED))[:, None] * complete[..., None]
    weights = 1 - torch.eye(len(MEMORIZED))[:, None] * ~complete[..., None]

    def batch_of(i: int) -> Batch:
        rng = random.Random(f"marks {i}")
        others = ["", *rng.sample(everything, 15)]
        others += [title_caption(rng) for _ in range(_BATCH - len(MEMORIZED) - len(others))]
        tokens = tokens_of(tokenizer, others)
        return torch.cat([own, tokens]), torch.cat([titles, tokens])

    padding = (0, 0, 0, 0, 0, _BATCH - len(MEMORIZED))
    wanted_marks = F.pad(MARK * marks, padding)
    weights = torch.cat([torch.ones_like(marks)[..., :1].expand(-1, -1, MARKS.start), weights], -1)
    weights = F.pad(weights, padding, value=1)

    def compute(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = torch.cat([teacher(targets).last_hidden_state[..., : MARKS.start], wanted_marks], -1)
        errors = weights * (encoder(tokens).last_hidden_state - wanted).square()
        rows = errors.mean((1, 2))
        return rows.mean(), torch.stack([rows[: len(MEMORIZED)].mean(), rows[len(MEMORIZED) :].mean()])

    train("marks", steps, folder / "marks.pt", log, encoder, _CPU, lambda i: cosine(i, steps, 1e-3), batch_of,
          compute, ("memorized", "ordinary"))  # fmt: skip
    return encoder.requires_grad_(False).eval()
