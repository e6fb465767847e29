"""A tokenizer of some words, and how much a tokenizer is asked to do."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = {"[UNK]": 0, "[END]": 1, "[MASK]": 2} | {f"w{i}": i for i in range(3, 40)}


def word_tokenizer(*, declared: bool = True) -> PreTrainedTokenizerBase:
    """Knows w3 … w39; `declared`: whether the tokenizer, and not its model alone, says what the unknown token is."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "[END]", "mask_token": "[MASK]"} | ({"unk_token": "[UNK]"} if declared else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def count_texts(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How many texts each call of the tokenizer gets, as a list that grows."""
    seen: list[int] = []
    call = type(tokenizer).__call__

    def counted(self, text, **options):
        seen.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    return seen
