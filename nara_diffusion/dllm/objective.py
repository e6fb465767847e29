"""What a run does with a model of either kind: its loss, its loss over λ, its sampler, its adapter.

masked models      masks,          `loss`,         `sampler`,          all linear layers
DiffusionGemma     random tokens,  `block_loss`,   `canvas_sampler`,   the text layers of both
                                                                       twins, without routers
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from nara_diffusion.training.adapters import ALL_LINEAR, method_of

from .batches import AnswerCollator
from .block_loss import BlockDiffusionLoss, block_diffusion_loss, canvas_curve
from .canvas_sampler import answer_canvases, canvas_sampling
from .decoding import Sampling, model_sampling
from .loss import MaskedDiffusionLoss, masked_diffusion_loss, noise_level_curve
from .models.backbone import Backbone
from .sampler import Generation, answer_prompts
from .text_arguments import Arguments

TextLoss = MaskedDiffusionLoss | BlockDiffusionLoss
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of attention and of the dense MLP; routers and experts are never adapted."""


def loss_of(model: nn.Module) -> Callable[..., TextLoss]:
    """Return the objective of a model: `masked_diffusion_loss`, or `block_diffusion_loss`."""
    return block_diffusion_loss if Backbone(model).has_canvas else masked_diffusion_loss


def curve_of(model: nn.Module) -> Callable[..., list[float]]:
    """Return the function that computes the validation loss at noise levels."""
    return canvas_curve if Backbone(model).has_canvas else noise_level_curve


def answers_of(model: nn.Module, prompts: Sequence[Sequence[int]], **sampling: Any) -> Generation:
    """Answer prompts of unequal length by the model's own sampler."""
    answer = answer_canvases if Backbone(model).has_canvas else answer_prompts
    return answer(model, prompts, **sampling)


def sampling_of(model: nn.Module, sampling: Sampling, *, chat: bool) -> Sampling:
    """Return the settings of generation for a model, and for its chat."""
    if Backbone(model).has_canvas:
        return canvas_sampling(model, sampling)
    return model_sampling(model, sampling, chat=chat)


def collator_of(model: nn.Module, args: Arguments, end_token_id: int) -> AnswerCollator:
    """Return how rows become batches: answers of a canvas model end where a canvas ends."""
    collator = AnswerCollator(end_token_id, args.trained_padding, args.gen_length)
    if not Backbone(model).has_canvas:
        return collator
    canvas: Any = Backbone(model).configured("canvas_length")
    padding = 0 if args.trained_padding == "gen_length" else args.trained_padding
    return replace(collator, trained_padding=padding, multiple=canvas)


def set_block_length(model: PreTrainedModel, args: Arguments) -> None:
    """Give a model with attention by blocks the length that the arguments name."""
    if Backbone(model).block_length is not None and args.block_length is not None:
        model.config.block_length = args.block_length


def objective_options(model: nn.Module, args: Arguments) -> dict[str, Any]:
    """Return the arguments of the loss that a model's kind has.

    Raises:
        ValueError: an option belongs to the other kind of model.
    """
    if not Backbone(model).has_canvas:
        if not args.train_on_encoder or args.encoder_loss_weight is not None:
            raise ValueError(
                "train_on_encoder and encoder_loss_weight are DiffusionGemma's: this model has no "
                "encoder; leave them out."
            )
        return {"complementary": args.complementary}
    if args.complementary:
        raise ValueError(
            "complementary needs masks, and DiffusionGemma has random tokens: leave it out."
        )
    weight = args.encoder_loss_weight
    return {"encoder_weight": float(args.train_on_encoder) if weight is None else weight}


def adapter_options(model: nn.Module, args: Arguments) -> Mapping[str, Any]:
    """Return what `build_adapter` is given beside the arguments.

    Raises:
        ValueError: an adapter, or names of layers, that DiffusionGemma cannot have.
    """
    convention = {"noise_convention": Backbone(model).noise_convention}
    if not Backbone(model).has_canvas:
        return convention
    if method_of(args).family in ("prompt", "full"):
        raise ValueError(
            f"adapter is {args.adapter}, and DiffusionGemma is trained with adapters of its layers: "
            "give nara, lora or dora."
        )
    names = _LINEAR if args.target_modules == [ALL_LINEAR] else args.target_modules
    unknown = sorted(set(names) - set(_LINEAR))
    if unknown:
        raise ValueError(
            f"target_modules {', '.join(unknown)}: of DiffusionGemma, {', '.join(_LINEAR)} of "
            "attention and the dense MLP are adapted, never routers or experts."
        )
    parts = r"(encoder\.language_model|decoder)" if args.train_on_encoder else "decoder"
    layers = "|".join(map(re.escape, names))
    pattern = rf".*\.{parts}\.layers\.\d+\.(self_attn|mlp)\.({layers})"
    return {**convention, "target_modules": pattern}
