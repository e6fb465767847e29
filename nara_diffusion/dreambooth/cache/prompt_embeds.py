"""Prompt embeddings of SDXL's two text encoders, and their cache.

    prompt_embeds (b, 77, d_1 + d_2): the hidden states before the last layer of both encoders, side by side
    pooled (b, p): the projected end-of-text state of the second

as `StableDiffusionXLPipeline.encode_prompt` makes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .tensor_cache import Entry, TensorCache, fingerprint

logger = logging.getLogger(__name__)


def tokenize_prompts(tokenizers: Sequence[Any], prompts: Sequence[str]) -> list[torch.Tensor]:
    """Token ids (b, 77) of each tokenizer, padded and cut as SDXL's pipeline does."""
    return [
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in tokenizers
    ]


def encode_tokens(text_encoders: Sequence[Any], token_ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt_embeds (b, 77, d_1 + d_2), pooled (b, p)) of each encoder's own ids (b, 77), with gradients where they
    have any, on the encoders' device.
    """
    states, pooled = [], None
    for encoder, ids in zip(text_encoders, token_ids, strict=True):
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]  # of the last encoder: text_embeds
    assert pooled is not None
    return torch.cat(states, dim=-1), pooled


def encode_prompts(
    tokenizers: Sequence[Any], text_encoders: Sequence[Any], prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode_tokens` of prompts (b)."""
    return encode_tokens(text_encoders, tokenize_prompts(tokenizers, prompts))


class PromptCache:
    """The embeddings of each distinct prompt, encoded once by frozen encoders.

    Args:
        tokenizers: SDXL's two.
        text_encoders: SDXL's two.
        memory_mib: bound on memory; a prompt of SDXL takes 620 KiB in float32.
        folder: a disk cache that later runs share (see `TensorCache`).
        tell_of_cut: log prompts that are longer than the encoders read.

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
    ) -> None:
        self.tokenizers, self.text_encoders = list(tokenizers), list(text_encoders)
        label = fingerprint(*text_encoders) if folder is not None else ""
        self.cache = TensorCache(memory_mib=memory_mib, folder=folder, label=label, what="prompt embeddings")
        self.tell_of_cut = tell_of_cut
        self._keys: dict[str, str] = {}

    def get(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(prompt_embeds (b, 77, d_1 + d_2), pooled (b, p)) on the CPU, in the encoders' dtype.

        Raises:
            ValueError: the encoders give NaN or infinity.
        """
        entries = [self.cache.get(self._key(prompt), lambda prompt=prompt: self._encode(prompt)) for prompt in prompts]
        return torch.stack([e["prompt_embeds"] for e in entries]), torch.stack([e["pooled"] for e in entries])

    def fill(self, prompts: Iterable[str], *, progress: bool = True) -> None:
        """Encodes all distinct `prompts` that aren't known; then the encoders may leave the device."""
        distinct = list(dict.fromkeys(prompts))
        for prompt in tqdm(distinct, desc="encode prompts", unit="prompt", disable=not progress or len(distinct) < 10):
            self.get([prompt])

    def _key(self, prompt: str) -> str:
        """What the encoders read."""
        if prompt not in self._keys:
            self._keys[prompt] = " ".join(str(ids[0].tolist()) for ids in tokenize_prompts(self.tokenizers, [prompt]))
        return self._keys[prompt]

    @torch.no_grad()
    def _encode(self, prompt: str) -> Entry:
        """One prompt by itself: bits depend on the batch, and a resumed run meets prompts in other batches."""
        if self.tell_of_cut:
            warn_of_cut(self.tokenizers[0], prompt)
        embeds, pooled = encode_prompts(self.tokenizers, self.text_encoders, [prompt])
        if not (embeds.isfinite().all() and pooled.isfinite().all()):
            raise ValueError(
                f"the text encoders give NaN or infinity for {prompt!r}, computing in {embeds.dtype}: use "
                "--mixed_precision bf16 or no."
            )
        return {"prompt_embeds": embeds[0], "pooled": pooled[0]}


def warn_of_cut(tokenizer: Any, prompt: str) -> None:
    """Says so where a prompt is longer than the text encoders read."""
    length = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    if length > tokenizer.model_max_length:
        logger.warning(
            "the prompt %r has %d tokens; the text encoders read %d, the rest is ignored",
            prompt, length, tokenizer.model_max_length,
        )  # fmt: skip
