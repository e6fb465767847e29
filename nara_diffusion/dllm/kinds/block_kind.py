"""LLaDA2: masks, and attention by blocks.

A step masks one block of each answer, and λ is the masked share of the answer in that block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from nara_flags.text import TextFlags

from ..block_filling import fill_blocks
from ..decoding import CONFIDENT, Sampling
from ..models.backbone import Backbone
from ..models.model_traits import BLOCK_MODEL
from ..sampling_state import Generation, Request, State
from .masked_kind import MASKED, plan
from .text_kind import PlannedForward

CHAT_THRESHOLD = 0.95
"""The published confidence_threshold for chats."""


def _configure(model: PreTrainedModel, flags: TextFlags) -> None:
    if flags.block_length:
        model.config.block_length = flags.block_length


def _configuring_lines(flags: TextFlags) -> list[str]:
    if flags.block_length:
        return [f"model.config.block_length = {flags.block_length}"]
    return []


def _plan(model: nn.Module, flags: TextFlags, rows: dict[str, Any]) -> PlannedForward:
    """Return the step that trains the last block of each row."""
    b, length = rows["input_ids"].shape
    block: Any = Backbone(model).block_length
    start = (length - 1) // block * block
    last = {"prompt_lengths": [start] * b, "answer_lengths": [length - start] * b}
    return plan(model, flags, rows | last)


def _sampling(backbone: Backbone, sampling: Sampling, chat: bool) -> Sampling:
    block: Any = backbone.block_length
    sampling = sampling.in_own_blocks(block, refused=("cfg_scale",))
    if chat and not sampling.rules and sampling.remasking in CONFIDENT:
        return replace(sampling, confidence_threshold=CHAT_THRESHOLD)
    return sampling


def _generate(request: Request) -> Generation:
    state = State.of(request)
    fill_blocks(state, request.on_step_end, request.use_cache is not False)
    return state.generation()


BLOCKS = replace(
    MASKED,
    traits=BLOCK_MODEL,
    plan=_plan,
    sampling=_sampling,
    generate=_generate,
    share="masked share of the answer in each block",
    configure=_configure,
    configuring_lines=_configuring_lines,
)
