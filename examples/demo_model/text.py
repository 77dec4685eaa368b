"""The tokenizer, which is of CLIP's kind with a small vocabulary of its own, and the untrained text encoder."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nemo_ext.demo.captions import MEMORIZED, PHRASINGS, compositions, title_caption

TOKENS = 24
WIDTH = 128
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
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
