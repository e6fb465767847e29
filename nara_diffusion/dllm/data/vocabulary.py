"""Check that a tokenizer knows the words of the records.

Words that a vocabulary lacks become one token, [UNK], and a model learns nothing from what was one and is another's
too. Tokenizers of bytes have no such token; those of words, of characters and of other languages do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REFUSED, WARNED = 0.5, 0.01
"""The shares of unknown tokens, in questions or in outputs, from which on an error or a warning is due."""


def check_vocabulary(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, total: int | None = None
) -> None:
    """Refuse records if the tokenizer knows less than half of their tokens, and warn if it doesn't know 1 % of them.

    Args:
        records: with `instruction`, `input`, `output`.
        total: the number of all records, if `records` are a sample of them.

    Raises:
        ValueError: `REFUSED` of the tokens or more are unknown, in the questions or in the outputs; with an example.
    """
    unknown = _unknown_token(tokenizer)
    if unknown is None:
        return
    of = f"of {total} records, {len(records)} of which were looked at" if total else f"of {len(records)} records"
    questions = [f"{record['instruction']} {record['input']}".strip() for record in records]
    for what, texts in (("questions", questions), ("outputs", [record["output"] for record in records])):
        share, example = _unknown_share(texts, tokenizer, unknown)
        message = (
            f"{100 * share:.0f} % of the tokens of {what} are {unknown}, which stands for what the vocabulary lacks "
            f"({of}), such as of {example[:60]!r}"
        )
        if share >= REFUSED:
            raise ValueError(f"{message}: choose a model that knows their language, or texts that this one knows")
        if share >= WARNED:
            logger.warning("%s: nothing tells these words apart, and none of them can be written", message)


def _unknown_share(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, unknown: str) -> tuple[float, str]:
    """(share of unknown tokens in all texts, the text with the largest share)."""
    token = tokenizer.convert_tokens_to_ids(unknown)
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    counts = [(ids.count(token), len(ids)) for ids in encoded]
    worst = max(range(len(counts)), key=lambda i: counts[i][0] / max(counts[i][1], 1))
    return sum(count for count, _ in counts) / max(sum(length for _, length in counts), 1), texts[worst]


def _unknown_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The unknown token that the tokenizer, or the model inside it, names; None if there is none."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    named: Any = tokenizer.unk_token
    return named or getattr(getattr(backend, "model", None), "unk_token", None)
