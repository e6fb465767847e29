"""The arguments of how prompts are encoded and the denoiser is called, and what a family of models can't express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nara_diffusion.dreambooth.families.family import Family
from nara_diffusion.noise.prediction import FLOW
from nara_diffusion.training.arguments.checks import require
from nara_diffusion.training.arguments.cli import option


@dataclass
class ConditionArguments:
    """Prompts and guidance"""

    max_sequence_length: int | None = option(
        None,
        "Tokens of a prompt that are read, in families whose text encoders can read more or fewer; none means what the "
        "family's pipeline does.",
        unit="tokens",
    )
    training_guidance_scale: float | None = option(
        None, "What a denoiser with distilled guidance (FLUX) is told in training; none means its samples' default."
    )


def check_conditions(args: Any) -> None:
    """Raises ValueError for values that no run can use."""
    length, guidance = args.max_sequence_length, args.training_guidance_scale
    require(args, "max_sequence_length", length is None or length >= 0, "at least 0, or none")
    require(args, "training_guidance_scale", guidance is None or guidance >= 0, "at least 0, or none")


def check_family(args: Any, family: Family) -> None:
    """Raises ValueError for arguments that a family can't express, before its model is loaded."""
    for name, unset, why in _unread(args, family):
        value = getattr(args, name)
        if value != unset:
            raise ValueError(f"{name} is {value}, but {family.title} {why}: leave it out.")


def _unread(args: Any, family: Family) -> list[tuple[str, Any, str]]:
    """(argument, its value where it isn't set, why it can't be set)."""
    found: list[tuple[str, Any, str]] = []
    if not family.text_encoders:
        found.append(("train_text_encoder", False, "is trained with its text encoders as they are"))
    if family.max_sequence_length is None:
        found.append(("max_sequence_length", None, "reads the tokens that its CLIP has places for"))
    if family.guidance is None:
        found.append(("training_guidance_scale", None, "has no distilled guidance to be told"))
    if family.is_flow:
        flow = "is a rectified flow"
        return [
            *found,
            ("prediction_type", None, f"{flow}, and predicts its velocity already"),
            ("rescale_betas_zero_snr", False, f"{flow}, which ends in pure noise as it is"),
            ("snr_gamma", None, f"{flow}, whose weights are --weighting_scheme's"),
        ]
    if args.prediction_type != FLOW:
        why = f"is no rectified flow, unless --prediction_type is {FLOW}"
        found.append(("weighting_scheme", "none", why))
        found += [(name, None, why) for name in ("logit_mean", "logit_std", "mode_scale", "flow_shift")]
    return found
