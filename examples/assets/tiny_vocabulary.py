"""CLIP's tokenizer with a vocabulary trimmed to the words of tiny_scenes.py.

Byte-pair merges are learnt from the words alone until each is one token; the 256 bytes, inside a word and at its end,
are tokens too, so that any text can be written. "sks" is a word of the vocabulary that no caption has.
"""

from __future__ import annotations

import json
from pathlib import Path

from tiny_objects import COLOURS, KINDS
from tiny_places import PLACES
from tiny_scenes import BEGINNINGS, SIDES, SIZES, SUBJECT_WORD
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def words() -> list[str]:
    """Every word of every caption, and the subject's."""
    phrases = [*BEGINNINGS, *SIZES, *SIDES, *PLACES, *KINDS, *COLOURS, "a", "an", "and", SUBJECT_WORD]
    return sorted({word for phrase in phrases for word in phrase.split()})


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which each of the words is one token."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, end_of_word_suffix=WORD_END, show_progress=False)
    learner.train_from_iterator([" ".join(words())], trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + WORD_END for letter in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = {token: number for number, token in enumerate([*dict.fromkeys(tokens), START, END])}
    return CLIPTokenizer(vocabulary, merges, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes vocab.json and merges.txt, CLIP's own files, beside those of ``save_pretrained``."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
