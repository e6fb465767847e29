"""A regime as nara-check sees a training: the regime's own data and loss, judged on its own held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nara_diffusion.check.trials import CheckTask, published
from nara_diffusion.dllm.masking import MaskedBatch
from nara_diffusion.dreambooth.families.unets import SDXL
from nara_diffusion.dreambooth.objectives import squared_errors
from quality.images.held_out import BINS, HeldOut
from quality.regimes.images.objectives import LEVELS
from quality.regimes.methods import arm_arguments, build
from quality.regimes.runs import REGIMES, Cell
from quality.regimes.text.corruption import token_losses
from quality.regimes.text.denoising import Denoising
from quality.regimes.text.models import logits_of


class CheckLosses(NamedTuple):
    """The mean, and the losses (n,) and λ (n,) of samples."""

    loss: Tensor
    per_sample: Tensor
    noise_level: Tensor


Measured = Callable[[Any], CheckLosses]
"""The losses of a model on held-out samples."""


def check_task(cell: Cell, rates: dict[str, float], seed: int) -> CheckTask:
    """The training of a cell's NaRA, with `rates`."""
    regime = REGIMES[cell.regime]
    options = {"targets": cell.targets, "rank": cell.rank, "steps": cell.steps}
    args: Any = published(arm_arguments("nara", **options, seed=seed, backbone=regime.backbone, **rates))
    torch.manual_seed(seed)
    model = build("nara", args, regime.backbone).train()
    step = regime.loss(regime.backbone.controlled(model, None, seed), args)
    size = args.train_batch_size
    measured = [list(parts) for parts in _measured(cell.regime, size)]

    def loss(positions: Sequence[int]) -> CheckLosses:
        value = step(positions[0] // size)
        return CheckLosses(value, value[None], torch.zeros(1))

    def held_out(positions: Sequence[int]) -> CheckLosses:
        """A chunk of positions is a part of one bin of λ: of the next bin for the next chunk."""
        chunk = positions[0] // size
        parts = measured[chunk % BINS]
        return parts[chunk // BINS % len(parts)](model)

    return CheckTask(model, model.peft_config["default"], args, loss, held_out, size, size)


def _measured(name: str, size: int) -> list[Iterator[Measured]]:
    """The held-out samples of each bin of λ, in parts of `size`."""
    regime: Any = REGIMES[name]
    parts: Any = _text_parts if isinstance(regime, Denoising) else _image_parts
    return [parts(regime, batch, size) for batch in regime.held_out()]


def _image_parts(regime: Any, batch: HeldOut, size: int) -> Iterator[Measured]:
    count = max(1, len(batch.kinds) // size)
    for first in range(count):
        yield partial(_errors, batch.rows(slice(first, None, count)))


def _errors(rows: HeldOut, unet: Any) -> CheckLosses:
    losses = squared_errors(_predicted(unet, rows), rows.batch)
    return CheckLosses(losses.mean(), losses, rows.batch.timestep / LEVELS)


@torch.no_grad()
def _predicted(unet: Any, rows: HeldOut) -> Tensor:
    return SDXL.predict(unet, rows.batch.model_input, rows.batch.timestep, rows.time_ids, rows.embeddings)


def _text_parts(regime: Denoising, batch: MaskedBatch, size: int) -> Iterator[Measured]:
    count = max(1, len(batch.input_ids) // size)
    for first in range(count):
        chosen = {name: value if value is None else value[first::count] for name, value in vars(batch).items()}
        rows = MaskedBatch(**chosen)
        yield partial(_text_losses, regime, rows)


@torch.no_grad()
def _text_losses(regime: Denoising, rows: MaskedBatch, model: Any) -> CheckLosses:
    """The mean over the tokens that count; 0 where a sample has none."""
    counted = regime.corruption.counted(rows)
    losses = (token_losses(logits_of(model, rows), rows) * counted).sum(1) / counted.sum(1).clamp(min=1)  # (n,)
    return CheckLosses(losses.mean(), losses, rows.noise_level)
