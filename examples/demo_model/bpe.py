"""A byte-level BPE tokenizer for Python source."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# Merges stay within these pieces: a line break with the following indentation (so that it is one token a line), a word
# with the preceding blank or dot, a single digit, a run of punctuation, other white space.
_PIECES = r"(?:\r?\n)+[ \t]*|[ .]?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a BPE of `vocab_size` entries, including the 256 bytes and one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer for transformers. Encoding adds no special token, and decoding restores the exact text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Return the tokens of each text, uint16, each array beginning with the separator."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return [np.array([tokenizer.bos_token_id, *e.ids], dtype=np.uint16) for e in encoded]


def load_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Read a `tokenizer.json`."""
    return wrap_tokenizer(Tokenizer.from_file(str(file)))
