"""A converted model's adapter brings its scheduler, which follows the adapter through all that a pipeline offers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from nara_diffusion.loaders.schedulers import has_replaced_scheduler, scheduler_fields
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import State, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
SCHEDULERS = {
    "flow": (FLOW, "flow"),
    "v": (EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction"), "timestep"),
    "zero_snr": (
        EulerDiscreteScheduler(
            **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        "timestep",
    ),
}


def converted(kind: str, **changes: Any) -> Any:
    """A pipeline in memory with the adapter "default" and the scheduler that it was trained for."""
    scheduler, convention = SCHEDULERS[kind]
    pipe = trained(text=False, noise_convention=convention, scheduler=scheduler_fields(scheduler), **changes)
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    saved = {}
    for number, kind in enumerate(SCHEDULERS):
        saved[kind] = tmp_path_factory.mktemp(kind)
        converted(kind, seed=1 + number).save_nara_weights(saved[kind])
    return saved


@pytest.fixture
def flow(folders) -> Any:
    """A pipeline into which "flow" was loaded."""
    pipe = small_sdxl()
    pipe.load_nara_weights(folders["flow"], "flow")
    return pipe


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_load_sets_the_adapters_scheduler_and_unload_brings_back_the_old_one(kind, tmp_path, base_pixels):
    original = converted(kind)
    original.save_nara_weights(tmp_path)
    pipe = small_sdxl()
    assert torch.equal(pixels(pipe), base_pixels)
    old, attributes = pipe.scheduler, set(pipe.__dict__)
    pipe.load_nara_weights(tmp_path)
    assert type(pipe.scheduler) is type(SCHEDULERS[kind][0])
    expected = pixels(original)
    assert torch.equal(pixels(pipe), expected)
    assert not torch.allclose(expected, base_pixels, atol=1e-2)
    pipe.unload_nara_weights()
    assert pipe.scheduler is old
    assert torch.equal(pixels(pipe), base_pixels)
    assert set(pipe.__dict__) == attributes


def test_saving_a_loaded_adapter_keeps_its_scheduler(flow, tmp_path):
    flow.save_nara_weights(tmp_path)
    again = small_sdxl()
    again.load_nara_weights(tmp_path)
    assert scheduler_fields(again.scheduler) == scheduler_fields(FLOW)
    assert torch.equal(pixels(again), pixels(flow))


@pytest.mark.parametrize(
    "remove",
    [lambda pipe: pipe.delete_adapters("flow"), lambda pipe: pipe.unload_lora_weights()],
    ids=["delete_adapters", "unload_lora_weights"],
)
def test_removing_the_adapter_brings_back_the_old_scheduler(flow, remove: Callable[[Any], None], base_pixels):
    remove(flow)
    assert isinstance(flow.scheduler, EulerDiscreteScheduler)
    assert torch.equal(pixels(flow), base_pixels)


def test_deleting_it_from_the_model_leaves_the_scheduler_to_the_next_call_of_the_pipeline(flow, lora_folder):
    flow.unet.delete_adapters("flow")  # with the holder of the cores
    flow.load_lora_weights(lora_folder, adapter_name="static")
    assert isinstance(flow.scheduler, DPMSolverMultistepScheduler)
    flow.set_adapters("static")
    alone = small_sdxl()
    alone.load_lora_weights(lora_folder)
    assert torch.equal(pixels(flow), pixels(alone))
    assert not has_replaced_scheduler(flow)


def test_the_scheduler_follows_the_active_adapters(flow, lora_folder, base_pixels):
    expected = pixels(flow)
    flow.disable_lora()
    assert torch.equal(pixels(flow), base_pixels)
    flow.enable_lora()
    assert torch.equal(pixels(flow), expected)
    flow.load_lora_weights(lora_folder, adapter_name="static")  # which is then the only active one
    with pytest.raises(ValueError, match=r"the denoiser predicts epsilon, but .* takes it for flow_prediction"):
        pixels(flow)
    flow.set_adapters("static")
    alone = small_sdxl()
    alone.load_lora_weights(lora_folder)
    assert torch.equal(pixels(flow), pixels(alone))
    flow.set_adapters(["flow", "static"])
    assert isinstance(flow.scheduler, DPMSolverMultistepScheduler)
    assert not torch.allclose(pixels(flow), expected, atol=1e-3)
    flow.set_adapters("flow")
    assert torch.equal(pixels(flow), expected)
    flow.delete_adapters("flow")
    assert isinstance(flow.scheduler, EulerDiscreteScheduler)


def test_adapters_of_different_predictions_are_refused_together(folders):
    pipe = small_sdxl()
    pipe.load_nara_weights(folders["v"], "v")
    pipe.load_nara_weights(folders["zero_snr"], "zero")
    assert pipe.get_active_adapters() == ["zero"]
    assert pipe.scheduler.config.rescale_betas_zero_snr
    expected = pixels(pipe)
    with pytest.raises(ValueError, match="'v' for v_prediction, 'zero' for v_prediction on zero terminal SNR"):
        pipe.set_adapters(["v", "zero"])
    assert pipe.get_active_adapters() == ["zero"]
    assert torch.equal(pixels(pipe), expected)
    pipe.set_adapters("v")
    assert not pipe.scheduler.config.rescale_betas_zero_snr
    pipe.unload_nara_weights()
    assert pipe.scheduler.config.prediction_type == "epsilon"


def test_set_scheduler_false_leaves_it_and_says_which_to_set(folders, flow, caplog):
    pipe = small_sdxl()
    old = pipe.scheduler
    with caplog.at_level(logging.WARNING):
        pipe.load_nara_weights(folders["flow"], set_scheduler=False)
    line = "pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, "
    assert line + "prediction_type='flow_prediction', use_flow_sigmas=True" in caplog.text
    assert pipe.scheduler is old
    with pytest.raises(ValueError, match=r"predicts flow_prediction, but .* EulerDiscreteScheduler, takes it for eps"):
        pixels(pipe)
    pipe.scheduler = FLOW
    assert torch.equal(pixels(pipe), pixels(flow))
    pipe.unload_nara_weights()
    assert pipe.scheduler is FLOW  # whoever set it takes it back


def test_another_solver_of_the_same_prediction_stays_until_the_adapter_goes(flow, base_pixels):
    flow.scheduler = chosen = UniPCMultistepScheduler.from_config(flow.scheduler.config)
    first: Tensor = pixels(flow)
    flow.set_adapters("flow")
    assert flow.scheduler is chosen
    assert torch.equal(pixels(flow), first)
    flow.scheduler = DDIMScheduler(**BETAS)
    with pytest.raises(ValueError, match="DDIMScheduler, takes it for epsilon"):
        pixels(flow)
    flow.scheduler = chosen
    flow.unload_nara_weights()
    assert torch.equal(pixels(flow), base_pixels)


def test_a_pipeline_that_shares_the_denoiser_is_refused_until_its_scheduler_is_set(folders):
    pipe = small_sdxl()
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    pipe.load_nara_weights(folders["flow"])
    call = {"prompt": "a toy", "image": torch.rand(1, 3, 16, 16), "num_inference_steps": 4, "output_type": "np"}
    with pytest.raises(ValueError, match="takes it for epsilon"):
        other(**call)
    other.scheduler = pipe.scheduler
    assert other(**call).images.shape == (1, 16, 16, 3)


def test_hotswap_follows_the_new_adapters_scheduler(folders):
    pipe = small_sdxl()
    pipe.load_nara_weights(folders["v"], "x")
    pipe.load_nara_weights(folders["zero_snr"], "x", hotswap=True)
    alone = small_sdxl()
    alone.load_nara_weights(folders["zero_snr"])
    assert torch.equal(pixels(pipe), pixels(alone))


def test_a_fused_conversion_keeps_its_scheduler(tmp_path):
    converted("v", core_type="constant", core_init="kaiming").save_nara_weights(tmp_path)
    pipe = small_sdxl()
    pipe.load_nara_weights(tmp_path)
    expected = pixels(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(pixels(pipe), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "FlowOfTomorrowScheduler"}, r"FlowOfTomorrowScheduler, which diffusers .* doesn't have"),
        ({"_class_name": "UNet2DConditionModel"}, r"UNet2DConditionModel, which diffusers .* doesn't have"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "none", "prediction_type": "epsilon"},
            "DPMSolverMultistepScheduler refuses its configuration",
        ),
    ],
)
def test_a_scheduler_that_cannot_be_built_is_refused_and_nothing_is_loaded(fields, message, tmp_path):
    trained(text=False, scheduler=fields).save_nara_weights(tmp_path)
    pipe = small_sdxl()
    before = State(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.load_nara_weights(tmp_path)
    assert State(pipe) == before
    pipe.load_nara_weights(tmp_path, set_scheduler=False)
    assert pipe.get_active_adapters() == ["default_0"]


def test_a_configuration_without_a_class_is_no_scheduler():
    with pytest.raises(ValueError, match=r"scheduler is .*: pass the configuration of a scheduler of Diffusers, with"):
        trained(text=False, scheduler={"prediction_type": "v_prediction"})
