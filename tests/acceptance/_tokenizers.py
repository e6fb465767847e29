"""A tokenizer of whole words, with a chat template or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] + ' <turn> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)
SPECIAL = ["<unk>", "<end>", "<pad>", "<user>", "<bot>", "<turn>"]
MASK = "<mask>"


def word_tokenizer(size: int, *, chat: bool, words: Sequence[str] | None = None) -> PreTrainedTokenizerBase:
    """Ids 0 to 5 are SPECIAL, the last is <mask>, and "w6", "w7", …, or the given `words`, lie between."""
    between = [f"w{i}" for i in range(6, size - 1)] if words is None else words
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *between, MASK])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<pad>", "mask_token": MASK}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_tokenizer(folder: Path, size: int, *, chat: bool = True) -> None:
    word_tokenizer(size, chat=chat).save_pretrained(folder)
