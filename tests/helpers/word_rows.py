"""Records of whole words as rows of tokens: ids 0 to 5 are special, "w6", "w7", … are 6, 7, …."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from nara_diffusion.dllm import encode_records
from nara_diffusion.dllm.records import normalized
from tests.acceptance._text import SPECIAL, word_tokenizer

END, PAD, USER, BOT, TURN = (SPECIAL.index(f"<{name}>") for name in ("end", "pad", "user", "bot", "turn"))
TOKENIZER, PLAIN = word_tokenizer(40, chat=True), word_tokenizer(40, chat=False)


def pairs(*texts: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"instruction": question, "output": answer} for question, answer in texts]


def chat(*texts: str, system: str | None = None) -> dict[str, Any]:
    """Turns of user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns if system is None else [{"role": "system", "content": system}, *turns]}


def encoded(records: list[dict[str, Any]], tokenizer: Any = TOKENIZER, max_length: int = 64, **options: Any) -> Dataset:
    return encode_records(normalized(records, source="test"), tokenizer, max_length=max_length, **options).rows
