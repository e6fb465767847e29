"""The kinds of text models. A new kind is a file here, a row in `KINDS`, and a row of `model_traits`."""

from __future__ import annotations

from ..models.backbone import Backbone
from .block_kind import BLOCKS
from .canvas_kind import CANVAS
from .masked_kind import MASKED
from .text_kind import TextKind

KINDS = (MASKED, BLOCKS, CANVAS)


def kind_of(backbone: Backbone) -> TextKind:
    """Return the kind of a language model."""
    return next(kind for kind in KINDS if kind.traits is backbone.traits)
