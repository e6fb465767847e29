"""The kinds of text models, and training on preferences, which any kind with masks allows.

A new kind is a file here, a row in `KINDS`, and a row of `model_classes`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from nara_flags.text import TextFlags

from ..models.backbone import Backbone
from ..preference_loss import preference_loss, repeated, without_adapter
from .block_kind import BLOCKS
from .canvas_kind import CANVAS
from .masked_kind import MASKED
from .text_kind import PlannedForward, TextKind, TextLoss

KINDS = (MASKED, BLOCKS, CANVAS)


def kind_of(backbone: Backbone, flags: TextFlags | None = None) -> TextKind:
    """Return the kind of a language model, with the loss of preferences if `flags` ask for it."""
    kind = next(kind for kind in KINDS if kind.traits is backbone.traits)
    return _on_pairs(kind, flags) if flags is not None and flags.objective == "dpo" else kind


def _on_pairs(kind: TextKind, flags: TextFlags) -> TextKind:
    """Return `kind` with the loss of pairs of answers. Its curve is that of the chosen answers."""
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
