"""LLaDA2: masks, and attention by blocks.

A step masks all blocks of each answer, and λ is the masked share of the answer in a block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from nara_diffusion.noise.level import NoiseWindow
from nara_flags.text import TextFlags

from ..block_filling import fill_blocks
from ..decoding import CONFIDENT, Sampling
from ..models.backbone import Backbone
from ..models.model_classes import BLOCK_MODEL
from .masked_kind import MASKED, mask_options, plan
from .text_kind import PlannedForward

CHAT_THRESHOLD = 0.95
"""The published confidence_threshold for chats."""
DFACTORY_WINDOW = NoiseWindow(0.3, 0.8)
"""The noise levels of dFactory's configurations."""


def _objective(flags: TextFlags) -> dict[str, Any]:
    """Return the arguments of LLaDA's objective, or of dFactory's."""
    options = mask_options(flags)
    if flags.objective != "dfactory":
        return options
    if flags.complementary:
        raise ValueError(
            "objective dfactory draws levels from 0.3 to 0.8, and complementary masks need 1 - λ "
            "beside each λ: leave one of them out."
        )
    options |= {"flat": True, "one_level": True}
    if flags.min_noise_level is None and flags.max_noise_level is None:
        options["window"] = DFACTORY_WINDOW
    return options


def _changed_fields(flags: TextFlags) -> dict[str, Any]:
    return {"block_length": flags.block_length} if flags.block_length else {}


def _plan(model: nn.Module, flags: TextFlags, rows: dict[str, Any]) -> PlannedForward:
    """Return the step with a first row that has no prompt, so the step has all blocks twice."""
    length = rows["input_ids"].shape[1]
    prompts, answers = rows["prompt_lengths"], rows["answer_lengths"]
    lengths = {"prompt_lengths": [0, *prompts[1:]], "answer_lengths": [length, *answers[1:]]}
    return plan(model, flags, rows | lengths)


def _sampling(backbone: Backbone, sampling: Sampling, chat: bool) -> Sampling:
    block: Any = backbone.block_length
    sampling = sampling.in_own_blocks(block, refused=("cfg_scale", "cache"))
    if chat and not sampling.rules and sampling.remasking in CONFIDENT:
        return replace(sampling, confidence_threshold=CHAT_THRESHOLD)
    return sampling


BLOCKS = replace(
    MASKED,
    traits=BLOCK_MODEL,
    objective=_objective,
    plan=_plan,
    sampling=_sampling,
    generate=fill_blocks,
    share="masked share of the answer in each block",
    changed_fields=_changed_fields,
)
