"""What the class of a language model fixes: its masks, its blocks, and its definition of λ.

`dllm/kinds` has the training and the sampling of each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import DiffusionGemmaForBlockDiffusion

from nara_diffusion.noise.sources import BLOCK_SHARE, CORRUPTED_SHARE, MASKED_SHARE

from .block_causal import BlockCausalLM


@dataclass(frozen=True)
class ModelTraits:
    """The facts about the models of one class.

    Attributes:
        title: the name of these models in messages.
        model_class: their class; a subclass counts too.
        noise_convention: the name of λ's definition in training and sampling.
        noise_level_per: whether they have one λ for each sample, or for each block of a sample.
        block_field: the field of their configuration with the length of the blocks that generation
            goes by; "" if they have none.
        has_masks: False if random tokens take the place of masks.
        attends_by_blocks: True if a position sees its own block and earlier ones; False if it sees
            the whole text.
    """

    title: str
    model_class: type[nn.Module]
    noise_convention: str = MASKED_SHARE
    noise_level_per: Literal["sample", "part"] = "sample"
    block_field: str = ""
    has_masks: bool = True
    attends_by_blocks: bool = False


CANVAS_MODEL = ModelTraits(
    "DiffusionGemma",
    DiffusionGemmaForBlockDiffusion,
    noise_convention=CORRUPTED_SHARE,
    block_field="canvas_length",
    has_masks=False,
)
BLOCK_MODEL = ModelTraits(
    "a model with attention by blocks",
    BlockCausalLM,
    noise_convention=BLOCK_SHARE,
    noise_level_per="part",
    block_field="block_length",
    attends_by_blocks=True,
)
MASKED_MODEL = ModelTraits("a masked language model", nn.Module)


def traits_of(model: nn.Module | None) -> ModelTraits:
    """Return the facts about a language model; those of a masked one for any other model."""
    for traits in (CANVAS_MODEL, BLOCK_MODEL):
        if isinstance(model, traits.model_class):
            return traits
    return MASKED_MODEL
