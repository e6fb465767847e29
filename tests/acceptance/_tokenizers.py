"""A tokenizer of whole words, with a chat template or without."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] + ' <turn> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)
SPECIAL = ["<unk>", "<end>", "<pad>", "<user>", "<bot>", "<turn>"]
MASK = "<mask>"


def word_tokenizer(size: int, *, chat: bool) -> PreTrainedTokenizerBase:
    """Ids 0 to 5 are SPECIAL, the last is <mask>, and "w6", "w7", … lie between."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(6, size - 1)), MASK])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<pad>", "mask_token": MASK}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer
