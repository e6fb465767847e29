"""Compute the attention mask and λ of texts that are generated block by block.

The positions of a sequence, prompt included, are divided into blocks of B:

    position i sees position j    if  ⌊i / B⌋ ≥ ⌊j / B⌋
    λ of a block                  = its masked tokens / its tokens that belong to the answer

The prompt, earlier blocks and padding are clean (λ = 0). The keys and values of finished blocks
therefore never change, and a cache of them is exact.

Training reads [noisy | clean], all blocks of the answers beside clean copies of all but the last
block. The copies have the same positions. There, position i sees position j

    noisy i:  if j is noisy and ⌊i / B⌋ = ⌊j / B⌋, or j is clean and ⌊i / B⌋ > ⌊j / B⌋
    clean i:  if j is clean and ⌊i / B⌋ ≥ ⌊j / B⌋
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .level import arguments_of
from .sources import BLOCK_SHARE

LLADA2 = "llada2_moe"
"""LLaDA2's `model_type`."""


def block_mask(
    real: Tensor, block_length: int, queries: int | None = None, noisy: int = 0
) -> Tensor:
    """Return the attention mask (b, 1, q, l) bool, True where a query position sees a key position.

    Each position sees itself, so no row is empty.

    Args:
        real: (b, l) bool or int, False on padding.
        block_length: B, the number of positions in a block.
        queries: q. The mask has rows for the last q positions only, or for all l if this is None.
        noisy: n, the number of noisy positions, which come before their clean copies.
    """
    places = torch.arange(real.shape[1], device=real.device)
    of_query = places[-queries:] if queries else places
    block = paired_positions(len(places), block_length, noisy, real.device) // block_length
    is_clean = places >= noisy
    end = block + is_clean  # of the clean blocks that a position sees
    seen = is_clean & (block < end[of_query, None])  # (q, l)
    if noisy:
        seen[:noisy, :noisy] = block[:noisy, None] == block[:noisy]
    is_own = of_query[:, None] == places
    return ((seen & real.bool()[:, None]) | is_own)[:, None]


def paired_positions(
    length: int, block_length: int, noisy: int, device: torch.device | None = None
) -> Tensor:
    """Return the position of each token of [noisy | clean] in its text: (l,).

    Args:
        noisy: n, the number of noisy positions; they end a block after the clean ones.
    """
    places = torch.arange(length, device=device)
    start = length - 2 * noisy + block_length if noisy else 0  # of the noisy blocks
    return torch.where(places < noisy, places + start, places - noisy)


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


@dataclass(frozen=True)
class _Run:
    """A run of LLaDA2Pipeline.

    Attributes:
        schedule: the scheduler's `_transfer_schedule`, which adds up to B.
        block_length: B, which the host reads once.
        real: the attention mask of the first forward.
        width: how many positions the first forward has.
        mask: the mask token.
        answer: (B,) bool, the columns of the first block after the prompt.
    """

    schedule: Tensor
    block_length: int
    real: Tensor
    width: int
    mask: Tensor
    answer: Tensor


class BlockNoise:
    """Compute λ (b, k) for the k blocks that Diffusers' LLaDA2Pipeline passes to its model.

    The last block is the active one. The scheduler knows the block length. Positions that the
    pipeline's attention mask hides do not count. Before the first forward of a run, the pipeline
    fills every position after the prompt with the mask token. The last token of that first forward
    is therefore the mask token, and the first mask in its last block is where the answer begins.

    Each run makes a new schedule, and all its forwards get views of one attention mask. Runs that
    share a model may therefore take turns, but must not begin at the same time.

    Args:
        schedulers: returns the current schedulers of the pipelines that loaded adapters.
    """

    convention = BLOCK_SHARE

    def __init__(self, schedulers: Callable[[], Sequence[Any]]) -> None:
        self.schedulers = schedulers
        self._known: dict[int, Tensor] = {}  # the schedules of all runs up to now
        self._runs: list[_Run] = []

    def ignore_past_runs(self) -> None:
        """Take no schedule that exists now for that of a new run."""
        self._known = self._schedules()

    def _schedules(self) -> dict[int, Tensor]:
        """Return the present schedules by their `id`, since equal schedules belong to different runs."""
        schedules = [getattr(one, "_transfer_schedule", None) for one in self.schedulers()]
        return {id(schedule): schedule for schedule in schedules if schedule is not None}

    def _of_run(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Run, Tensor, Tensor] | None:
        """Return the run, the tokens and the mask (b, l) of a forward; None outside of a run."""
        real = kwargs.get("attention_mask")
        input_ids = arguments_of(module, args, kwargs).get("input_ids")
        if not isinstance(real, Tensor) or real.dim() != 2 or input_ids is None:
            return None
        if kwargs.get("position_ids") is None or kwargs.get("use_cache"):
            return None
        present = self._schedules()
        self._runs = [run for run in self._runs if id(run.schedule) in present]
        for run in self._runs:
            if run.real.untyped_storage().data_ptr() == real.untyped_storage().data_ptr():
                return run, input_ids, real
        new = [present[key] for key in present.keys() - self._known.keys()]
        self._known = present
        if len(new) != 1:
            return None
        length = int(new[0].sum())
        block = input_ids[:, -length:]  # (b, B)
        mask = block[0, -1].clone()
        answer = (block == mask).any(0).cumsum(0) > 0  # (B,)
        run = _Run(new[0], length, real, input_ids.shape[1], mask, answer)
        self._runs.append(run)
        return run, input_ids, real

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return λ (b, k) for a forward of `module`.

        Raises:
            ValueError: the forward does not belong to a run of LLaDA2Pipeline.
        """
        forward = self._of_run(module, args, kwargs)
        if forward is None:
            raise ValueError(
                "λ of the blocks isn't known outside a run of LLaDA2Pipeline with a "
                "BlockRefinementScheduler: use noise_level(model, λ of each block)."
            )
        run, input_ids, real = forward
        length, width = run.block_length, input_ids.shape[1]
        block = input_ids[:, -length:]  # (b, B)
        answer = real[:, -length:].bool()
        if width == run.width:
            answer = answer & run.answer
        masked = answer & (block == run.mask)
        shape = (len(block), width // length)
        levels = torch.zeros(shape, dtype=torch.float32, device=block.device)
        levels[:, -1] = masked.sum(1).float() / answer.sum(1).clamp(min=1)
        return levels

    @torch.compiler.disable(recursive=True)
    def with_block_mask(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments with the block mask in place of the pipeline's mask (b, l), or None.

        Under the pipeline's mask, earlier blocks would see later ones. For a forward outside of the
        pipeline's run, such as one of `generate` or of a loss, the result is None, and the caller
        keeps the arguments unchanged.
        """
        forward = self._of_run(module, args, kwargs)
        if forward is None:
            return None
        run, _, real = forward
        implementation = getattr(module.config, "_attn_implementation", None)
        dtype = next(module.parameters()).dtype
        mask = attention_argument(block_mask(real, run.block_length), implementation, dtype)
        return args, {**kwargs, "attention_mask": mask}
