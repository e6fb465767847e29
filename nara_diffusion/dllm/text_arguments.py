"""The arguments of dllm/train.py, the records that they select, and the two kinds of models.

Each kind of model has its own corruption, loss, sampler and layers to adapt:

    masked models      masks,          `loss`,         `sampler`,          all linear layers
    DiffusionGemma     random tokens,  `canvas_loss`,   `canvas_sampler`,   the text layers of both
                                                                           twins, without routers
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from nara_diffusion.training.adapters import ALL_LINEAR, check_adapter, method_of
from nara_diffusion.training.arguments import (
    CONFIGS,
    check_arguments,
    shipped_settings,
    window_of,
)
from nara_flags.text import TextFlags

from .batches import AnswerCollator
from .canvas_loss import BlockDiffusionLoss, block_diffusion_loss
from .decoding import Sampling
from .held_out import hold_out
from .loss import MaskedDiffusionLoss, masked_diffusion_loss, noise_level_curve
from .mask_draws import check_drawable
from .models.backbone import Backbone
from .record_forms import FIELDS
from .records import read_records, saved_parts, with_column

if TYPE_CHECKING:
    from datasets import Dataset

TextLoss = MaskedDiffusionLoss | BlockDiffusionLoss
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of attention and of the dense MLP; routers and experts are never adapted."""


@dataclass
class Arguments(TextFlags):
    """The flags, after the checks that need libraries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arguments(self)
        check_adapter(self)
        check_drawable(window_of(self), self.complementary)
        source = self.dataset_name or self.train_file
        parts = [] if source is None else saved_parts(source)
        if "validation" in parts and self.validation_samples is None:
            self.validation_file = self.validation_file or f"{source}:validation"
        if "test" in parts:
            self.test_file = self.test_file or f"{source}:test"

    def sampling(self) -> Sampling:
        """Return the settings of generation."""
        settings: dict[str, Any] = {"steps": self.generation_steps}
        for field in fields(Sampling):
            if field.name != "steps":
                settings[field.name] = getattr(self, field.name)
        return Sampling(**settings)


def shipped_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the shipped run if no model is `given`.

    If other data are given, the shipped data aren't used.
    """
    if "pretrained_model_name_or_path" in given:
        return {}
    source = "dataset_name" if "dataset_name" in given else "train_file"
    return shipped_settings(
        CONFIGS / "llada_tiny.yaml",
        given,
        (source, "train_file", "validation_file", "test_file"),
        toy="a toy of 64 positions (5 of them a message, and one a letter)",
        shown="max_train_steps train_batch_size learning_rate gen_length checkpointing_steps",
        advice="LLaDA-8B add --pretrained_model_name_or_path GSAI-ML/LLaDA-8B-Instruct",
    )


def load_records(args: Arguments) -> tuple[Dataset, Dataset, Dataset]:
    """Return the (training, validation, test) records that a run's arguments name.

    Raises:
        ValueError: see `read_records` and `hold_out`.
    """
    fields: dict[str, str] = {}
    for what in FIELDS:
        name = getattr(args, f"{what}_field")
        if name is not None:
            fields[what] = name
    config, source = args.dataset_config_name, args.dataset_name or args.train_file
    assert source is not None  # the arguments' own check
    records = read_records(source, fields, config=config, limit=args.max_train_samples)
    records = with_column(records, "number", range(len(records)))
    if args.validation_file is None:
        records, validation = hold_out(records, args.validation_samples, args.seed)
    else:
        validation = read_records(args.validation_file, fields, config=config)
    test = validation
    if args.test_file is not None:
        test = read_records(args.test_file, fields, config=config)
    if args.test_samples is not None:
        test = test.select(range(min(len(test), args.test_samples)))
    return records, validation, test


# ---------------------------------------------------------------- what a model's kind needs


def loss_of(model: nn.Module) -> Callable[..., TextLoss]:
    """Return the objective of a model: `masked_diffusion_loss`, or `block_diffusion_loss`."""
    return block_diffusion_loss if Backbone(model).has_canvas else masked_diffusion_loss


def curve_of(model: nn.Module) -> Callable[..., list[float]]:
    """Return the function that computes the validation loss at noise levels."""
    if not Backbone(model).has_canvas:
        return noise_level_curve
    return partial(noise_level_curve, loss=partial(block_diffusion_loss, encoder_weight=0.0))


def collator_of(model: nn.Module, args: Arguments, end_token_id: int) -> AnswerCollator:
    """Return the collator. Answers for a canvas model are padded to the end of a canvas."""
    collator = AnswerCollator(end_token_id, args.trained_padding, args.gen_length)
    if not Backbone(model).has_canvas:
        return collator
    canvas: Any = Backbone(model).configured("canvas_length")
    padding = 0 if args.trained_padding == "gen_length" else args.trained_padding
    return replace(collator, trained_padding=padding, multiple=canvas)


def set_block_length(model: PreTrainedModel, args: Arguments) -> None:
    """Give a model with attention by blocks the block length that the arguments name."""
    if Backbone(model).block_length is not None and args.block_length is not None:
        model.config.block_length = args.block_length


def objective_options(model: nn.Module, args: Arguments) -> dict[str, Any]:
    """Return the arguments of the loss for this kind of model.

    Raises:
        ValueError: an option is for the other kind of model, or has no effect.
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
            "complementary needs masks, but DiffusionGemma has random tokens: leave it out."
        )
    weight = args.encoder_loss_weight
    if weight and not args.train_on_encoder:
        raise ValueError(
            f"encoder_loss_weight is {weight}, but train_on_encoder is False, so no trained weight "
            "changes the encoder's loss: leave one of them out."
        )
    return {"encoder_weight": float(args.train_on_encoder) if weight is None else weight}


def adapter_options(model: nn.Module, args: Arguments) -> Mapping[str, Any]:
    """Return the keyword arguments of `build_adapter` for this kind of model.

    Raises:
        ValueError: DiffusionGemma can't have this adapter or these target modules.
    """
    backbone = Backbone(model)
    of_noise = {
        "noise_convention": backbone.noise_convention,
        "noise_level_per": backbone.noise_level_per,
    }
    if not backbone.has_canvas:
        return of_noise
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
    return {**of_noise, "target_modules": pattern}
