"""CLIP's tokenizer with a vocabulary trimmed to the words of tiny_drawings/scenes.py.

Byte-pair merges are learnt from the words alone until each is one token; the 256 bytes, inside a word and at its end,
are tokens too, so that any text can be written. "sks" is a word of the vocabulary that no caption has.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

from tiny_drawings.objects import COLOURS, KINDS
from tiny_drawings.places import PLACES
from tiny_drawings.scenes import BEGINNINGS, SIDES, SIZES, SUBJECT_WORD
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

MAX_TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def words() -> list[str]:
    """Every word of every caption, and the subject's."""
    phrases = [*BEGINNINGS, *SIZES, *SIDES, *PLACES, *KINDS, *COLOURS, "a", "an", "and", SUBJECT_WORD]
    return sorted({word for phrase in phrases for word in phrase.split()})


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until each text is one token; the lesser of two equals wins, so
    that they are always the same (those of ``tokenizers.trainers`` are not)."""
    pieces = [[*text[:-1], text[-1] + WORD_END] for text in texts]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        pieces = [_merged(word, merges[-1]) for word in pieces]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The word's pieces with every occurrence of ``pair`` made one."""
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which each of the words is one token."""
    merges = learn_merges(words())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + WORD_END for letter in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = {token: number for number, token in enumerate([*dict.fromkeys(tokens), START, END])}
    return CLIPTokenizer(vocabulary, merges, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes vocab.json and merges.txt, CLIP's own files, beside those of ``save_pretrained``."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
