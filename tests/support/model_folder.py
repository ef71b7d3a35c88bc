"""Save a tiny model with a tokenizer as a Hugging Face folder, for the command line and the README."""

from __future__ import annotations

from pathlib import Path

import models
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast


def save_tiny_llama(path: Path) -> Path:
    """Save a Llama of 6 layers with one token a character: the id is the code minus 32, that of a line break is 95."""
    models.llama().save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """Save a tokenizer of one token a character: the id is the code minus 32, that of a line break is 95."""
    vocabulary = {chr(32 + i): i for i in range(95)} | {"\n": 95, "<unk>": 96}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
