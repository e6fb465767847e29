"""Embeddings of prompts, computed once.

A family says how it encodes prompts (`nara_diffusion.dreambooth.families`); what it makes of one is an entry here. Rows
that differ in their number of tokens are padded with zeros where they are put together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from nara_diffusion.dreambooth.families.family import Embeddings, Family, stack_padded
from nara_diffusion.dreambooth.families.unet.clip import encode_prompts, tokenize_prompts

from .tensor_cache import Entry, TensorCache, fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextEncoding:
    """How a pipeline's text encoders read prompts.

    Attributes:
        encode: prompts → embeddings, each (b, …).
        parts: their names.
        key: prompt → what the encoders read of it.
        limit: how many tokens they read; None means what the tokenizer says.
    """

    encode: Callable[[list[str]], Embeddings]
    parts: tuple[str, ...]
    key: Callable[[str], str]
    limit: int | None = None


def family_cache(pipe: Any, family: Family, *, tell_of_cut: bool = True, **options: Any) -> PromptCache:
    """A cache for the prompts of a pipeline, encoded as its family does; `options` are those of `PromptCache`."""
    names = sorted(name for name in pipe.components if name.startswith("text_encoder"))
    encoders = [encoder for name in names if (encoder := getattr(pipe, name)) is not None]
    tokenizers, limit = reading_tokenizers(pipe, family), family.conditions.max_sequence_length

    def key(prompt: str) -> str:
        tokens = clip_key(tokenizers, prompt) if limit is None else f"{limit} tokens: {prompt}"
        return tokens if family.conditions.clip_skip is None else f"skip {family.conditions.clip_skip}: {tokens}"

    encoding = TextEncoding(lambda prompts: family.encode(pipe, prompts), family.parts, key, limit)
    return PromptCache(tokenizers, encoders, tell_of_cut=tell_of_cut, encoding=encoding, **options)


def reading_tokenizers(pipe: Any, family: Family) -> list[Any]:
    """The tokenizers that a family names, those that this pipeline has."""
    found = [getattr(pipe, name) for name in family.tokenizers]
    return [getattr(part, "tokenizer", part) for part in found if part is not None]  # a processor has one


def clip_key(tokenizers: Sequence[Any], prompt: str) -> str:
    """The tokens that CLIPs read of a prompt."""
    return " ".join(str(ids[0].tolist()) for ids in tokenize_prompts(tokenizers, [prompt]))


def _two_clips(tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> TextEncoding:
    return TextEncoding(
        encode=lambda prompts: encode_prompts(tokenizers, text_encoders, prompts),
        parts=("prompt_embeds", "pooled"),
        key=lambda prompt: clip_key(tokenizers, prompt),
    )


class PromptCache:
    """The embeddings of each distinct prompt, encoded once by frozen encoders.

    Args:
        tokenizers: of the pipeline; the first tells how long a prompt is.
        text_encoders: of the pipeline.
        memory_mib: bound on memory; a prompt of SDXL takes 620 KiB in float32.
        folder: a disk cache that later runs share (see `TensorCache`).
        tell_of_cut: log prompts that are longer than the encoders read.
        encoding: how they are read (`family_cache` has a family's); None reads two CLIPs as SDXL does.

    Raises:
        ValueError: a negative bound, or a folder that can't be written.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[Any],
        *,
        memory_mib: float | None = 1024.0,
        folder: str | Path | None = None,
        tell_of_cut: bool = True,
        encoding: TextEncoding | None = None,
    ) -> None:
        self.tokenizers, self.text_encoders = list(tokenizers), list(text_encoders)
        self.encoding = _two_clips(self.tokenizers, self.text_encoders) if encoding is None else encoding
        label = fingerprint(*text_encoders) if folder is not None else ""
        self.cache = TensorCache(memory_mib=memory_mib, folder=folder, label=label, what="prompt embeddings")
        self.tell_of_cut = tell_of_cut
        self._keys: dict[str, str] = {}

    def get(self, prompts: Sequence[str]) -> Embeddings:
        """What the encoding makes of b prompts, each part (b, …), on the CPU, in the encoders' dtype.

        Raises:
            ValueError: the encoders give NaN or infinity.
        """
        entries = [self.cache.get(self._key(prompt), lambda prompt=prompt: self._encode(prompt)) for prompt in prompts]
        return tuple(stack_padded([entry[part] for entry in entries]) for part in self.encoding.parts)

    def fill(self, prompts: Iterable[str], *, progress: bool = True) -> None:
        """Encodes all distinct `prompts` that aren't known; then the encoders may leave the device."""
        distinct = list(dict.fromkeys(prompts))
        for prompt in tqdm(distinct, desc="encode prompts", unit="prompt", disable=not progress or len(distinct) < 10):
            self.get([prompt])

    def _key(self, prompt: str) -> str:
        if prompt not in self._keys:
            self._keys[prompt] = self.encoding.key(prompt)
        return self._keys[prompt]

    @torch.no_grad()
    def _encode(self, prompt: str) -> Entry:
        """One prompt by itself: bits depend on the batch, and a resumed run meets prompts in other batches."""
        if self.tell_of_cut and self.tokenizers:
            warn_of_cut(self.tokenizers[0], prompt, self.encoding.limit)
        embeddings = self.encoding.encode([prompt])
        if not all(part.isfinite().all() for part in embeddings):
            raise ValueError(
                f"the text encoders give NaN or infinity for {prompt!r}, computing in {embeddings[0].dtype}: use "
                "--mixed_precision bf16 or no."
            )
        return {name: part[0] for name, part in zip(self.encoding.parts, embeddings, strict=True)}


def warn_of_cut(tokenizer: Any, prompt: str, limit: int | None = None) -> None:
    """Says so where a prompt is longer than the text encoders read, `limit` or what the tokenizer says."""
    length = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    read = tokenizer.model_max_length if limit is None else limit
    if length > read:
        logger.warning(
            "the prompt %r has %d tokens; the text encoders read %d, the rest is ignored", prompt, length, read
        )
