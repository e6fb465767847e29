"""The kinds of text models. A new kind is a file here, a row in `KINDS`, and a row of `model_classes`."""

from __future__ import annotations

from nara_flags.text import TextFlags

from ..models.backbone import Backbone
from .block_kind import BLOCKS
from .canvas_kind import CANVAS
from .masked_kind import MASKED
from .preference_kind import on_pairs
from .text_kind import TextKind

KINDS = (MASKED, BLOCKS, CANVAS)


def kind_of(backbone: Backbone, flags: TextFlags | None = None) -> TextKind:
    """Return the kind of a language model, with the loss of preferences if `flags` ask for it."""
    kind = next(kind for kind in KINDS if kind.traits is backbone.traits)
    return on_pairs(kind, flags) if flags is not None and flags.objective == "dpo" else kind
