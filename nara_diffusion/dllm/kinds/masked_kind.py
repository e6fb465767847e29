"""Models with masks that see the whole text: LLaDA, LLaDA-MoE, Dream, BERT, ….

A step masks whole answers, λ is the masked share of an answer, and all linear layers are adapted.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from nara_flags.text import TextFlags

from ..batches import AnswerCollator
from ..cached_sampler import CachedText
from ..decoding import Sampling
from ..loss import batch_loss, masked_diffusion_loss, noise_level_curve
from ..masked_sampler import Generation, State, WholeText
from ..masking import mask_answers
from ..models.backbone import Backbone
from ..models.model_classes import MASKED_MODEL
from .text_kind import PlannedForward, TextKind

CHAT_BLOCKS = {"llama": 32, "qwen3_moe": 32}
"""{model_type: the published block length for chats}, of LLaDA and LLaDA-MoE. Dream's chat uses a
single block."""


def _objective(flags: TextFlags) -> dict[str, Any]:
    if flags.objective == "dfactory":
        raise ValueError(
            f"objective is {flags.objective}, which is one of models with blocks (LLaDA2): leave it out."
        )
    return mask_options(flags)


def mask_options(flags: TextFlags) -> dict[str, Any]:
    """Return the options of masks. Raise ValueError for flags of an encoder."""
    is_changed = not flags.train_on_encoder or flags.encoder_loss_on != "answer"
    if is_changed or flags.encoder_loss_weight is not None:
        raise ValueError(
            "train_on_encoder, encoder_loss_weight and encoder_loss_on are options of DiffusionGemma, "
            "and this model has no encoder: leave them out."
        )
    return {"complementary": flags.complementary}


def plan(model: nn.Module, flags: TextFlags, rows: dict[str, Any]) -> PlannedForward:
    """Return the step with all tokens masked, or half of them with complementary masks."""
    masked = partial(
        mask_answers,
        **rows,
        mask_token_id=0,
        seed=0,
        noise_level=0.5 if flags.complementary else 1.0,
        complementary=flags.complementary,
        block_length=Backbone(model).block_length,
    )
    b, length = masked().input_ids.shape
    # the step makes the masks again, since those of blocks take memory
    return PlannedForward(lambda: batch_loss(model, masked()), f"{b} x {length} tokens")


def _sampling(backbone: Backbone, sampling: Sampling, chat: bool) -> Sampling:
    """Take the published block length for a chat, if it divides gen_length, and its blocks steps."""
    block = CHAT_BLOCKS.get(backbone.configured("model_type") or "")
    is_given = "block_length" in sampling.changed()
    if block is None or not chat or backbone.is_shifted or is_given:
        return sampling
    blocks, remainder = divmod(sampling.gen_length, block)
    if remainder or (sampling.steps or 0) % blocks:
        return sampling
    return replace(sampling, block_length=block)


def _generate(
    backbone: Backbone, sampling: Sampling, use_cache: bool | None, on_step_end: Any, **texts: Any
) -> Generation:
    if use_cache:
        raise ValueError(
            "use_cache=True, but this model also sees the masks of later blocks, so its keys and "
            "values change with each token and with λ: leave use_cache out; cache='dual' keeps some."
        )
    reader = WholeText() if sampling.cache is None else CachedText(backbone, sampling)
    state = State(backbone, sampling, **texts)
    state.fill(reader, on_step_end)
    return state.generation()


MASKED = TextKind(
    traits=MASKED_MODEL,
    loss=masked_diffusion_loss,
    curve=noise_level_curve,
    objective=_objective,
    collator=lambda backbone, flags, end: AnswerCollator(
        end, flags.trained_padding, flags.gen_length
    ),
    plan=plan,
    sampling=_sampling,
    generate=_generate,
    unit="nats per masked token",
    share="masked share of the answer",
)
