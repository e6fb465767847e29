"""The kinds of text models. A new kind is a file here, a row in `KINDS`, and a row of `model_traits`."""

from __future__ import annotations

from nara_flags.text import TextFlags

from ..models.backbone import Backbone
from .block_kind import BLOCKS
from .canvas_kind import CANVAS
from .masked_kind import MASKED
from .preference_kind import on_pairs
from .text_kind import TextKind

KINDS = (MASKED, BLOCKS, CANVAS)


def kind_of(backbone: Backbone) -> TextKind:
    """Return the kind of a language model."""
    return next(kind for kind in KINDS if kind.traits is backbone.traits)


def kind_in_run(backbone: Backbone, flags: TextFlags) -> TextKind:
    """Return the kind of a language model, with the loss of preferences for objective dpo."""
    kind = kind_of(backbone)
    return on_pairs(kind, flags) if flags.objective == "dpo" else kind
