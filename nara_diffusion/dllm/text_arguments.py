"""The arguments of dllm/train.py, and the options of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from nara_diffusion.training.adapters import check_adapter
from nara_diffusion.training.arguments import (
    CONFIGS,
    check_arguments,
    method_of,
    shipped_settings,
    window_of,
)
from nara_flags.text import TextFlags

from .decoding import Sampling
from .kinds import kind_of
from .mask_draws import check_drawable
from .models.backbone import Backbone


@dataclass
class Arguments(TextFlags):
    """The flags, after the checks that need libraries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arguments(self)
        check_adapter(self)
        check_drawable(window_of(self), self.complementary)

    def sampling(self) -> Sampling:
        """Return the settings of generation."""
        names = {field.name for field in fields(Sampling)} - {"steps"}
        settings = {name: getattr(self, name) for name in names}
        return Sampling(steps=self.generation_steps, **settings)


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


def adapter_options(model: nn.Module, args: Arguments) -> Mapping[str, Any]:
    """Return the keyword arguments of `build_adapter` for this kind of model.

    Raises:
        ValueError: this kind of model can't have this adapter or these target modules.
    """
    kind = kind_of(Backbone(model))
    if method_of(args).family in kind.refused_methods:
        raise ValueError(
            f"adapter is {args.adapter}, but {kind.traits.title} is trained with adapters of its "
            "layers: give nara, lora or dora."
        )
    return {
        "noise_convention": kind.traits.noise_convention,
        "noise_level_per": kind.traits.noise_level_per,
        **kind.targets(args),
    }
