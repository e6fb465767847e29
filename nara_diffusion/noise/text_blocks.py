"""λ of language models that denoise a text block by block, inside Diffusers' LLaDA2Pipeline and DiffusionGemmaPipeline.

    block_masked_share    masks of the active block / masks with which it began, of each sample
    corrupted_share       tokens of the canvas that are random / all of its tokens, of each sample

The first is counted where the model sees it; tokens that a scheduler edits later are no masks, and count as text.
Random tokens look like any others, so that the second comes from the scheduler:

    a canvas begins                 1
    BlockRefinementScheduler        tokens that it has not committed; it draws those anew
    EntropyBoundScheduler           tokens that it has not accepted in the step before; it draws those anew
    DiscreteDDIMScheduler           1 − k / N in step k of N, by its schedule; correctors have the λ of the next step
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .signals import NoiseSignals, arguments_of

BLOCK_MASKED_SHARE = "block_masked_share"
CORRUPTED_SHARE = "corrupted_share"


class BlockMasks:
    """A source of λ: "block_masked_share" of the last `block_length` tokens of `input_ids`, for one call of a pipeline.

    Args:
        mask_token_id: the token that counts. block_length: tokens of a block; the last block is the active one.
    """

    convention = BLOCK_MASKED_SHARE

    def __init__(self, mask_token_id: int, block_length: int) -> None:
        self.mask_token_id = mask_token_id
        self.block_length = block_length
        self._width = 0
        self._first = torch.zeros(0)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
        """λ (b,). Raises ValueError: the forward has no `input_ids` (b, l) of at least a block."""
        tokens = arguments_of(module, args, kwargs).get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < self.block_length:
            raise ValueError(
                f"λ can't be counted: this forward of {type(module).__name__} has no input_ids (batch, length) of "
                f"{self.block_length} tokens or more."
            )
        masks = (tokens[:, -self.block_length :] == self.mask_token_id).sum(1)  # (b,)
        if tokens.shape[1] != self._width:  # blocks follow each other, each as masks, behind what is written
            self._width, self._first = tokens.shape[1], masks
        return NoiseSignals(masks.float() / self._first.clamp(min=1))


class CanvasNoise:
    """A source of λ: "corrupted_share" of a canvas, for one call of a pipeline, which tells it each step."""

    convention = CORRUPTED_SHARE

    def __init__(self) -> None:
        self._level: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
        """λ (b,), or (1,) where a canvas begins. Raises ValueError: no scheduler's step came before."""
        arguments = arguments_of(module, args, kwargs)
        if arguments.get("decoder_input_ids") is None:
            raise ValueError(f"λ can't be told: this forward of {type(module).__name__} has no decoder_input_ids.")
        if arguments.get("self_conditioning_logits") is None:  # what the step before has predicted
            return NoiseSignals(torch.ones(1, dtype=torch.float32, device=module.device))  # type: ignore[arg-type]
        if self._level is None:
            raise ValueError("λ can't be told: the canvas was changed by no step of the scheduler.")
        return NoiseSignals(self._level)

    def stepped(self, scheduler: Any, timestep: Any, output: Any) -> None:
        """Tell it what `scheduler.step(…, timestep)` gave."""
        self._level = _LEVELS[type(scheduler).__name__](scheduler, int(timestep), output)


def _of_committed(scheduler: Any, timestep: int, output: Any) -> Tensor:
    return 1 - scheduler._committed.float().mean(1)


def _of_accepted(scheduler: Any, timestep: int, output: Any) -> Tensor:
    return 1 - output.accepted_index.float().mean(1)


def _of_schedule(scheduler: Any, timestep: int, output: Any) -> Tensor:
    level = 1 - (timestep + 1) / scheduler.num_inference_steps
    return torch.full((1,), level, dtype=torch.float32, device=output.prev_sample.device)


_LEVELS = {
    "BlockRefinementScheduler": _of_committed,
    "EntropyBoundScheduler": _of_accepted,
    "DiscreteDDIMScheduler": _of_schedule,
}
CANVAS_SCHEDULERS = tuple(_LEVELS)
