"""The arguments of train_scripts/dreambooth.py, named as those of diffusers' own script where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nara_diffusion.dreambooth.conversion import check_conversion
from nara_diffusion.dreambooth.data.captions import check_prompt
from nara_diffusion.training.adapters.methods import METHODS, method_of
from nara_diffusion.training.arguments.checks import check_arguments, require
from nara_diffusion.training.arguments.common import OptimizationArguments, RunArguments
from nara_diffusion.training.arguments.window import WindowArguments, check_window

from .average import AverageArguments, check_average
from .conditions import ConditionArguments, check_conditions
from .data import CaptionArguments, DataArguments, PriorArguments, check_captions, check_data, check_prior
from .flow import FlowArguments, check_flow
from .foreign_flags import FOREIGN_FLAGS
from .loss import LossArguments, check_loss
from .model import DreamBoothAdapterArguments, ModelArguments
from .validation import ValidationArguments


@dataclass
class DreamBoothArguments(
    ModelArguments,
    DataArguments,
    CaptionArguments,
    ConditionArguments,
    PriorArguments,
    DreamBoothAdapterArguments,
    OptimizationArguments,
    AverageArguments,
    LossArguments,
    FlowArguments,
    WindowArguments,
    ValidationArguments,
    RunArguments,
):
    foreign_flags: ClassVar[Mapping[str, str]] = FOREIGN_FLAGS

    def __post_init__(self) -> None:
        check_arguments(self)
        require(self, "pretrained_model_name_or_path", self.pretrained_model_name_or_path != "", "given")
        _check_counts(self)
        check_data(self)
        check_captions(self)
        check_prior(self)
        check_average(self)
        check_conditions(self)
        check_loss(self)
        check_flow(self)
        check_window(self)
        check_conversion(self.prediction_type, self.rescale_betas_zero_snr)
        window = (self.min_noise_level, self.max_noise_level, self.hold_base_outside)
        if (self.prediction_type is not None or self.rescale_betas_zero_snr) and window != (None, None, None):
            raise ValueError(
                "a model that is converted at some noise levels alone predicts something else at the others: leave "
                "min_noise_level, max_noise_level and hold_base_outside out with prediction_type and "
                "rescale_betas_zero_snr."
            )
        if method_of(self).family == "prompt":
            having = ", ".join(name for name, method in METHODS.items() if method.family != "prompt")
            raise ValueError(
                f"adapter is {self.adapter!r}, whose virtual tokens stand before a language model's text, and a UNet "
                f"reads none: expected one of {having}."
            )
        if self.core_input != "noise_level":
            raise ValueError(f"core_input is {self.core_input!r}, but images have no masks: expected 'noise_level'.")

    @property
    def prompts(self) -> list[str]:
        """Return the prompts to sample, if any are named; otherwise the images' captions are sampled."""
        return self.validation_prompts or ([] if self.instance_prompt is None else [self.instance_prompt])


def _check_counts(args: Any) -> None:
    for name in ("num_validation_images", "num_inference_steps", "sample_batch_size", "curve_points", "repeats"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    require(args, "crops_per_image", args.crops_per_image is None or args.crops_per_image >= 1, "at least 1, or none")
    require(args, "resolution", args.resolution >= 8, "at least 8")
    require(
        args, "validation_epochs", args.validation_epochs is None or args.validation_epochs >= 1, "at least 1, or none"
    )
    decay = args.adam_weight_decay_text_encoder
    require(args, "adam_weight_decay_text_encoder", decay is None or decay >= 0, "at least 0, or none")
    rate = args.text_encoder_lr
    require(args, "text_encoder_lr", rate is None or rate > 0, "above 0, or none")
    for name in ("cache_memory", "prior_loss_weight", "guidance_scale"):
        require(args, name, getattr(args, name) >= 0, "at least 0")
    for prompt in args.validation_prompts or []:
        check_prompt(prompt, "a validation prompt")
