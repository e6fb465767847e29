"""Training on preferences: any kind of model with masks, with another loss on pairs of answers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from nara_flags.text import TextFlags

from ..preference_loss import preference_loss, repeated, without_adapter
from .text_kind import PlannedForward, TextKind, TextLoss


def on_pairs(kind: TextKind, flags: TextFlags) -> TextKind:
    """Return `kind` with the loss of preferences. Its curve is that of the chosen answers."""
    rows_per_pair = 2 * flags.dpo_draws

    def plan(model: nn.Module, flags: TextFlags, rows: dict[str, Any]) -> PlannedForward:
        forward = kind.plan(model, flags, repeated(rows, rows_per_pair))

        def loss() -> TextLoss:
            with torch.no_grad(), without_adapter(model):
                forward.loss()
            return forward.loss()

        return PlannedForward(loss, f"{forward.size}, and the reference's without gradients,")

    return replace(
        kind,
        loss=partial(preference_loss, beta=flags.dpo_beta, draws=flags.dpo_draws),
        curve=lambda model, rows, *args, **options: kind.curve(
            model, rows.remove_columns("rejected"), *args, **options
        ),
        plan=plan,
        figures=("margin", "accuracy"),
        note=" Preference accuracy is the share of pairs where the chosen answer gained more "
        "likelihood over the base than the rejected one; the curve is that of chosen answers.",
        rows_per_sample=rows_per_pair,
    )
