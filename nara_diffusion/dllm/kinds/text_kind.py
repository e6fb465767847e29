"""All that differs between the kinds of text models in training, sampling and reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from nara_flags.text import TextFlags

from ..batches import AnswerCollator
from ..canvas_loss import BlockDiffusionLoss
from ..decoding import Sampling
from ..loss import MaskedDiffusionLoss
from ..masked_sampler import Generation
from ..models.backbone import Backbone
from ..models.model_classes import ModelTraits
from ..preference_loss import PreferenceLoss

TextLoss = MaskedDiffusionLoss | BlockDiffusionLoss | PreferenceLoss
"""The loss of a batch. It has the scalar to differentiate, the loss of each row, and λ: (b,), or (b, k)
if a model with blocks drew one for each block."""


class PlannedForward(NamedTuple):
    """The step that `--plan` measures: its loss, and the size of its forward in words."""

    loss: Callable[[], TextLoss]
    size: str


@dataclass(frozen=True)
class TextKind:
    """A kind of text models."""

    traits: ModelTraits

    # training
    # (model, **batch, **objective, seed, …) → loss; it corrupts the batch
    loss: Callable[..., TextLoss]
    # the validation loss at noise levels, as `noise_level_curve`
    curve: Callable[..., list[float]]
    # flags → arguments of `loss`; ValueError for flags that have no effect
    objective: Callable[[TextFlags], dict[str, Any]]
    # (backbone, flags, end token) → collator
    collator: Callable[[Backbone, TextFlags, int], AnswerCollator]
    # (adapted model, flags, the longest batch from the collator) → the step of `--plan`
    plan: Callable[[nn.Module, TextFlags, dict[str, Any]], PlannedForward]

    # sampling
    # (backbone, settings, whether a chat template made the prompts) → settings with the model's own
    sampling: Callable[[Backbone, Sampling, bool], Sampling]
    # (backbone, settings, **the other arguments of `generate`) → answers
    generate: Callable[..., Generation]

    # words of the card
    unit: str  # of the losses
    share: str  # λ during sampling
    merge_warning: str = ""  # about merging an adapter that doesn't depend on λ

    # what only some kinds have
    # flags → the fields of the model's configuration that they change, with their values
    changed_fields: Callable[[TextFlags], dict[str, Any]] = lambda flags: {}
    # flags → arguments of `build_adapter`; ValueError for layers that can't be adapted
    targets: Callable[[TextFlags], Mapping[str, Any]] = lambda flags: {}
    refused_methods: tuple[str, ...] = ()  # families of `training.adapters.Method`
    note: str = ""  # about the figures
    figures: tuple[str, ...] = ()  # attributes (b,) of the loss that are logged beside it
    rows_per_sample: int = 1  # in a forward of the loss
    whole_because: str = ""  # the reason why engines can't shard the model; "" if they can
