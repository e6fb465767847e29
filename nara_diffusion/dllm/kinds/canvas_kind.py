"""DiffusionGemma: canvases of random tokens, filled by a decoder after an encoder has read the text.

A step changes tokens of one canvas, and λ is their share. The linear layers of the text part are
adapted, in the encoder and the decoder alike, but not the routers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from nara_flags.text import TextFlags

from ..batches import AnswerCollator
from ..canvas_loss import block_diffusion_loss, canvas_loss, corrupt_canvases
from ..canvas_sampler import fill_canvases
from ..decoding import Sampling
from ..loss import noise_level_curve
from ..models.backbone import Backbone
from ..models.model_classes import CANVAS_MODEL
from .text_kind import PlannedForward, TextKind

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of attention and of the dense MLP; routers and experts are never adapted."""
_REFUSED_SETTINGS = (
    "top_p",
    "cfg_scale",
    "remasking",
    "confidence_threshold",
    "factor",
    "logits_eos_inf",
    "confidence_eos_eot_inf",
    "cache",
)
"""The settings of `Sampling` that transformers' sampler doesn't have."""


def _objective(flags: TextFlags) -> dict[str, Any]:
    if flags.objective != "llada":
        raise ValueError(
            f"objective is {flags.objective}, and DiffusionGemma has its own: leave it out."
        )
    if flags.complementary:
        raise ValueError(
            "complementary needs masks, but DiffusionGemma has random tokens: leave it out."
        )
    weight = flags.encoder_loss_weight
    if weight and not flags.train_on_encoder:
        raise ValueError(
            f"encoder_loss_weight is {weight}, but train_on_encoder is False, so no trained weight "
            "changes the encoder's loss: leave one of them out."
        )
    if weight is None:
        weight = float(flags.train_on_encoder)
    predict_prompts = flags.encoder_loss_on == "text"
    if predict_prompts and not weight:
        raise ValueError(
            "encoder_loss_on is text, but the encoder's loss has no weight: leave it out."
        )
    return {"encoder_weight": weight, "predict_prompts": predict_prompts}


def _collator(backbone: Backbone, flags: TextFlags, end_token_id: int) -> AnswerCollator:
    """Return the collator that pads answers to the end of a canvas."""
    padding = 0 if flags.trained_padding == "gen_length" else flags.trained_padding
    canvas: Any = backbone.block_length
    return AnswerCollator(end_token_id, padding, flags.gen_length, multiple=canvas)


def _plan(model: nn.Module, flags: TextFlags, rows: dict[str, Any]) -> PlannedForward:
    canvas: Any = Backbone(model).block_length
    vocabulary = int(rows["input_ids"].max()) + 1
    options = _objective(flags)
    weight = options.pop("encoder_weight")
    batch = corrupt_canvases(**rows, **options, canvas_length=canvas, vocab_size=vocabulary, seed=0)
    b, length = batch.input_ids.shape
    loss = partial(canvas_loss, model, batch, weight)
    return PlannedForward(loss, f"{b} x {length} tokens and {canvas} of a canvas")


def _targets(flags: TextFlags) -> Mapping[str, Any]:
    names = _LINEAR if flags.target_modules == ["all-linear"] else flags.target_modules
    unknown = sorted(set(names) - set(_LINEAR))
    if unknown:
        raise ValueError(
            f"target_modules has {', '.join(unknown)}, but DiffusionGemma's adapters are on "
            f"{', '.join(_LINEAR)} of attention and the dense MLP, never routers or experts."
        )
    parts = r"(encoder\.language_model|decoder)" if flags.train_on_encoder else "decoder"
    layers = "|".join(map(re.escape, names))
    return {"target_modules": rf".*\.{parts}\.layers\.\d+\.(self_attn|mlp)\.({layers})"}


def _sampling(backbone: Backbone, sampling: Sampling, chat: bool) -> Sampling:
    canvas: Any = backbone.block_length
    return sampling.in_own_blocks(canvas, refused=_REFUSED_SETTINGS)


CANVAS = TextKind(
    traits=CANVAS_MODEL,
    loss=block_diffusion_loss,
    curve=partial(noise_level_curve, loss=partial(block_diffusion_loss, encoder_weight=0.0)),
    objective=_objective,
    collator=_collator,
    plan=_plan,
    sampling=_sampling,
    generate=fill_canvases,
    unit="nats per token",
    share="share of the canvas that is not accepted",
    merge_warning=(
        "Don't merge this adapter (`merge_and_unload`): the encoder and the decoder share each "
        "weight, so PEFT would add the updates of both to both, without an error."
    ),
    targets=_targets,
    refused_methods=("prompt", "full"),
    whole_because="DiffusionGemma's encoder and decoder share their weights",
)
