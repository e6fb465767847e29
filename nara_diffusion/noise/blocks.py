"""Compute the attention mask and λ of texts that are generated block by block.

The positions of a sequence, prompt included, are divided into blocks of B:

    position i sees position j    if  ⌊i / B⌋ ≥ ⌊j / B⌋
    λ of a block                  = its masked tokens / its tokens that belong to the answer

The prompt, earlier blocks and padding are clean (λ = 0). The keys and values of finished blocks
therefore never change, and a cache of them is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .level import BLOCK_SHARE, arguments_of

LLADA2 = "llada2_moe"
"""LLaDA2's `model_type`."""


def block_mask(real: Tensor, block_length: int, queries: int | None = None) -> Tensor:
    """Return the attention mask (b, 1, q, l) bool, True where a query position sees a key position.

    Each position sees itself, so no row is empty.

    Args:
        real: (b, l) bool or int, False on padding.
        block_length: B, the number of positions in a block.
        queries: q. The mask has rows for the last q positions only, or for all l if this is None.
    """
    places = torch.arange(real.shape[1], device=real.device)
    of_query = places[-queries:] if queries else places
    block = places // block_length
    seen = (of_query // block_length)[:, None] >= block  # (q, l)
    is_own = of_query[:, None] == places
    return ((seen & real.bool()[:, None]) | is_own)[:, None]


def attention_argument(mask: Tensor, implementation: str | None, dtype: torch.dtype) -> Tensor:
    """Return a mask (b, 1, q, l) bool in the form that transformers' attention function takes.

    Raises:
        ValueError: the attention function does not support such a mask.
    """
    if implementation == "sdpa":
        return mask
    if implementation == "eager":
        hidden = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(mask, hidden, torch.finfo(dtype).min)
    raise ValueError(
        f"attn_implementation is {implementation!r}, which takes no block mask: load the model with "
        "attn_implementation='sdpa'"
    )


class BlockNoise:
    """Compute λ (b, k) for the k blocks that Diffusers' LLaDA2Pipeline passes to its model.

    The last block is the active one. The scheduler knows the block length. Positions that the
    pipeline's attention mask hides do not count. Before the first forward of a run, the pipeline
    fills every position after the prompt with the mask token. The last token of that first forward
    is therefore the mask token, and the first mask in its last block is where the answer begins.

    Args:
        schedulers: returns the current schedulers of the pipelines that loaded adapters.
    """

    convention = BLOCK_SHARE

    def __init__(self, schedulers: Callable[[], Sequence[Any]]) -> None:
        self.schedulers = schedulers
        self._schedule: Tensor | None = None  # the pipeline makes a new one in each run
        self._length = 0
        self._mask: Tensor | None = None  # (), the mask token
        self._first = 0  # the sequence length in the run's first forward
        self._answer: Tensor | None = None  # (B,) bool, columns of its last block after the prompt

    def block_length(self) -> int | None:
        """Return the block length of the current run, or None before the first run."""
        for scheduler in self.schedulers():
            schedule = getattr(scheduler, "_transfer_schedule", None)
            if schedule is None:
                continue
            if schedule is not self._schedule:
                self._schedule, self._mask = schedule, None
                self._length = int(schedule.sum())
            return self._length
        return None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return λ (b, k) for a forward of `module`.

        Raises:
            ValueError: no pipeline with a block scheduler is running.
        """
        arguments = arguments_of(module, args, kwargs)
        input_ids, real = arguments["input_ids"], arguments.get("attention_mask")
        length, b = self.block_length(), len(input_ids)
        if length is None:
            raise ValueError(
                "λ of the blocks isn't known outside a run of LLaDA2Pipeline with a "
                "BlockRefinementScheduler: use noise_level(model, λ of each block)."
            )
        block = input_ids[:, -length:]  # (b, B)
        if self._mask is None:
            self._mask, self._first = block[0, -1].clone(), input_ids.shape[1]
            self._answer = (block == self._mask).any(0).cumsum(0) > 0
        answer = torch.ones_like(block, dtype=torch.bool)
        if isinstance(real, Tensor) and real.dim() == 2:
            answer = real[:, -length:].bool()
        if input_ids.shape[1] == self._first and self._answer is not None:
            answer = answer & self._answer
        masked = answer & (block == self._mask)
        levels = torch.zeros(b, input_ids.shape[1] // length, device=block.device)
        levels[:, -1] = masked.sum(1) / answer.sum(1).clamp(min=1)
        return levels

    def with_block_mask(self, module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the arguments with the block mask in place of the pipeline's mask (b, l), or None.

        Under the pipeline's mask, earlier blocks would see later ones. A call by the pipeline passes
        position ids and uses no cache. For any other forward, such as one of `generate` or of a
        loss, the result is None, and the caller keeps the arguments unchanged.
        """
        real, length = kwargs.get("attention_mask"), self.block_length()
        if length is None or not isinstance(real, Tensor) or real.dim() != 2:
            return None
        if kwargs.get("position_ids") is None or kwargs.get("use_cache"):
            return None
        implementation = getattr(module.config, "_attn_implementation", None)
        dtype = next(module.parameters()).dtype
        mask = attention_argument(block_mask(real, length), implementation, dtype)
        return {**kwargs, "attention_mask": mask}
