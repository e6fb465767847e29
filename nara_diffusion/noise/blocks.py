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

    Each run makes a new schedule, so the newest schedule is that of the current run. A forward of
    the run has the pipeline's arguments, and as many positions as the forward before it, or B more.

    Args:
        schedulers: returns the current schedulers of the pipelines that loaded adapters.
    """

    convention = BLOCK_SHARE

    def __init__(self, schedulers: Callable[[], Sequence[Any]]) -> None:
        self.schedulers = schedulers
        self._known: list[Tensor] = []  # the schedules of all runs up to now
        self._schedule: Tensor | None = None  # of the current run
        self._length = 0  # B
        self._width = 0  # positions of the run's last forward; 0 before its first
        self._first = 0  # positions of the run's first forward
        self._mask = torch.zeros(())  # the mask token
        self._answer = torch.ones(0)  # (B,) bool, columns of its first block after the prompt

    def ignore_past_runs(self) -> None:
        """Take no schedule that exists now for that of a new run."""
        self._known = self._schedules()

    def _schedules(self) -> list[Tensor]:
        found = [getattr(each, "_transfer_schedule", None) for each in self.schedulers()]
        return [schedule for schedule in found if schedule is not None]

    def _follow_run(self) -> None:
        """Find the current run: the one with the newest schedule."""
        present = self._schedules()
        for schedule in present:
            if not any(schedule is one for one in self._known):
                self._schedule, self._length = schedule, int(schedule.sum())
                self._width = 0
        self._known = present
        if not any(self._schedule is one for one in present):
            self._schedule = None

    def _of_run(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Return the tokens and the mask (b, l) of a forward of the current run, otherwise None."""
        self._follow_run()
        real = kwargs.get("attention_mask")
        if self._schedule is None or not isinstance(real, Tensor) or real.dim() != 2:
            return None
        input_ids = arguments_of(module, args, kwargs).get("input_ids")
        if input_ids is None or kwargs.get("position_ids") is None or kwargs.get("use_cache"):
            return None
        width = input_ids.shape[1]
        if self._width == 0:
            block = input_ids[:, -self._length :]  # (b, B)
            self._mask, self._first = block[0, -1].clone(), width
            self._answer = (block == self._mask).any(0).cumsum(0) > 0
        elif width not in (self._width, self._width + self._length):
            return None
        self._width = width
        return input_ids, real

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return λ (b, k) for a forward of `module`.

        Raises:
            ValueError: the forward does not belong to a run of LLaDA2Pipeline.
        """
        found = self._of_run(module, args, kwargs)
        if found is None:
            raise ValueError(
                "λ of the blocks isn't known outside a run of LLaDA2Pipeline with a "
                "BlockRefinementScheduler: use noise_level(model, λ of each block)."
            )
        input_ids, real = found
        length, width = self._length, input_ids.shape[1]
        block = input_ids[:, -length:]  # (b, B)
        answer = real[:, -length:].bool()
        if width == self._first:
            answer = answer & self._answer
        masked = answer & (block == self._mask)
        shape = (len(block), width // length)
        levels = torch.zeros(shape, dtype=torch.float32, device=block.device)
        levels[:, -1] = masked.sum(1).float() / answer.sum(1).clamp(min=1)
        return levels

    def with_block_mask(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Return the arguments with the block mask in place of the pipeline's mask (b, l), or None.

        Under the pipeline's mask, earlier blocks would see later ones. For a forward outside of the
        pipeline's run, such as one of `generate` or of a loss, the result is None, and the caller
        keeps the arguments unchanged.
        """
        found = self._of_run(module, args, kwargs)
        if found is None:
            return None
        implementation = getattr(module.config, "_attn_implementation", None)
        dtype = next(module.parameters()).dtype
        mask = attention_argument(block_mask(found[1], self._length), implementation, dtype)
        return {**kwargs, "attention_mask": mask}
