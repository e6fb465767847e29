"""Options that a family can't express are refused by name, before its model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.arguments.conditions import check_family
from nara_diffusion.dreambooth.families.table import FAMILIES, family_named
from nara_diffusion.dreambooth.setup import run_family
from tests.helpers.small_pipelines import small_sdxl

GIVEN = {"pretrained_model_name_or_path": "x", "instance_data_dir": "x", "instance_prompt": "x"}
FLOWS = [family for family in FAMILIES if family.is_flow]
OTHERS = [family for family in FAMILIES if not family.is_flow]


def checked(family: Any, **changes: Any) -> None:
    check_family(DreamBoothArguments(**GIVEN, **changes), family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_defaults_of_a_family_can_be_expressed_by_it(family) -> None:
    checked(family, **{"target_modules": list(family.targets), **family.defaults})
    assert {"resolution", "guidance_scale"} <= family.defaults.keys() or family.name == "sdxl"


@pytest.mark.parametrize("family", FLOWS, ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_text_encoder": True}, "train_text_encoder is True, but {} is trained with its text encoders as they"),
        ({"prediction_type": "v_prediction"}, "prediction_type is v_prediction, but {} is a rectified flow"),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "but {} is a rectified flow, .*: leave it out",
        ),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, but {} is a rectified flow, which ends"),
        ({"snr_gamma": 5.0}, "snr_gamma is 5.0, but {} is a rectified flow, whose weights are --weighting_scheme's"),
        ({"do_edm_style_training": True}, "do_edm_style_training is True, but {} is a rectified flow"),
    ],
    ids=str,
)
def test_flows_refuse_what_belongs_to_schedules_of_betas(family, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.format(family.title.replace("(", r"\(").replace(")", r"\)"))):
        checked(family, **changes)


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
@pytest.mark.parametrize(
    "changes",
    [
        {"weighting_scheme": "logit_normal"},
        {"weighting_scheme": "cosmap"},
        {"flow_shift": 3.0},
        {"training_guidance_scale": 1.0},
    ],
    ids=str,
)
def test_schedules_of_betas_refuse_what_belongs_to_flows(family, changes: dict[str, Any]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"{name} is {value}, but {family.title} .*: leave it out"):
        checked(family, **changes)


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_prompts_of_clip_are_read_in_chunks_of_75_tokens(family) -> None:
    for length in (77, 152, 227, 302):
        checked(family, max_sequence_length=length)
    for length, nearest in ((0, "77"), (76, "77"), (78, "77 and 152"), (150, "77 and 152"), (225, "152 and 227")):
        message = rf"max_sequence_length is {length}, but {family.title} reads .* expected 77 .*; nearest: {nearest}\."
        with pytest.raises(ValueError, match=message):
            checked(family, max_sequence_length=length)
    checked(family, max_sequence_length=77, train_text_encoder=True)
    with pytest.raises(ValueError, match=r"max_sequence_length is 152, but text encoders that are trained read 77 tok"):
        checked(family, max_sequence_length=152, train_text_encoder=True)


def test_chunks_are_for_clips_of_77_places() -> None:
    with pytest.raises(ValueError, match=r"max_sequence_length is 152, but this model's CLIP reads 12 tokens"):
        run_family(DreamBoothArguments(**GIVEN, max_sequence_length=152), small_sdxl())


@pytest.mark.parametrize("pipeline", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_lengths_of_t5_are_no_chunks(pipeline: str) -> None:
    checked(family_named(pipeline), max_sequence_length=100)


def test_a_model_that_is_converted_to_a_flow_has_a_flow_s_options() -> None:
    changes = {"weighting_scheme": "logit_normal", "logit_mean": 0.5, "flow_shift": 3.0}
    checked(family_named("StableDiffusionXLPipeline"), prediction_type="flow_prediction", **changes)


def test_guidance_is_told_to_denoisers_that_are_distilled_for_it() -> None:
    checked(family_named("FluxPipeline"), training_guidance_scale=1.0)
    with pytest.raises(ValueError, match=r"training_guidance_scale is 1.0, but Z-Image has no distilled guidance"):
        checked(family_named("ZImagePipeline"), training_guidance_scale=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_mean": 1.0}, "logit_mean is 1.0, which weighting_scheme none doesn't read: give logit_normal"),
        ({"weighting_scheme": "mode", "logit_std": 1.0}, "logit_std is 1.0, which weighting_scheme mode doesn't read"),
        ({"weighting_scheme": "logit_normal", "mode_scale": 1.0}, "mode_scale is 1.0, .*: give mode, or"),
        ({"weighting_scheme": "mode", "mode_scale": 2.0}, r"mode_scale must be between -1 and 1.752, or none, got 2.0"),
        ({"weighting_scheme": "logit_normal", "logit_std": 0.0}, "logit_std must be above 0"),
        ({"weighting_scheme": "uniform"}, "weighting_scheme must be one of none, logit_normal"),
        ({"flow_shift": 0.0}, "flow_shift must be above 0"),
        ({"max_sequence_length": -1}, "max_sequence_length must be at least 0"),
        ({"clip_skip": 0}, "clip_skip must be at least 1, or none, got 0"),
        ({"clip_skip": 1, "train_text_encoder": True}, "clip_skip is 1, with which layers of a trained text encoder"),
        ({"training_guidance_scale": -1.0}, "training_guidance_scale must be at least 0"),
    ],
    ids=str,
)
def test_values_that_no_run_can_use_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DreamBoothArguments(**GIVEN, **changes)


def test_layers_of_clip_are_left_out_where_there_is_a_clip() -> None:
    checked(family_named("StableDiffusion3Pipeline"), clip_skip=1)
    with pytest.raises(ValueError, match=r"clip_skip is 1, but FLUX.1 reads no CLIP of which layers could be left out"):
        checked(family_named("FluxPipeline"), clip_skip=1)
    with pytest.raises(ValueError, match=r"clip_skip is 2, but at most 1 layers of this model's CLIP can be skipped"):
        run_family(DreamBoothArguments(**GIVEN, clip_skip=2), small_sdxl())
    with pytest.raises(ValueError, match=r"clip_skip is 1, but Stable Diffusion 1 and 2 can't be sampled so: its pipe"):
        checked(family_named("StableDiffusionPipeline"), clip_skip=1)


def test_a_class_of_no_family_is_refused_with_the_list_of_them() -> None:
    with pytest.raises(ValueError, match=r"LuminaPipeline is no class .* expected Stable Diffusion 1 .*Wan \(one fra"):
        family_named("LuminaPipeline")


@pytest.mark.parametrize("scheme", ["cosmap", "sigma_sqrt"])
def test_two_weights_of_errors_are_refused(scheme: str) -> None:
    flow = {"prediction_type": "flow_prediction", "weighting_scheme": scheme}
    with pytest.raises(
        ValueError, match=f"weighting_scheme '{scheme}' weights the errors, and so does snr_gamma: leave"
    ):
        DreamBoothArguments(**GIVEN, **flow, snr_gamma=5.0)
    DreamBoothArguments(**GIVEN, **flow)
    DreamBoothArguments(**GIVEN, **flow | {"weighting_scheme": "logit_normal"}, snr_gamma=5.0)
