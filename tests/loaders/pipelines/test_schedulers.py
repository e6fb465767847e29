"""A converted model's adapter brings its scheduler, which follows the adapter through all that a pipeline offers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from nara_diffusion.loaders.schedulers import has_replaced_scheduler, scheduler_fields
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import State, save_lora, trained
from tests.loaders.pipelines.converted import BETAS, FLOW, SCHEDULERS, converted

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


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


def test_the_scheduler_is_that_of_the_adapter_which_a_deletion_activates(folders, tmp_path):
    pipe = small_sdxl()
    for name, seed in (("a", 5), ("z", 6)):
        save_lora(tmp_path / name, seed=seed)
    pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
    pipe.load_nara_weights(folders["flow"], "flow")
    pipe.load_lora_weights(tmp_path / "z", adapter_name="z")
    pipe.delete_adapters("z")
    assert pipe.unet.nara_core.active_adapters == pipe.get_active_adapters() == ["a"]
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    alone = small_sdxl()
    alone.load_lora_weights(tmp_path / "a")
    assert torch.equal(pixels(pipe), pixels(alone))
    pipe.delete_adapters("a")
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    alone = small_sdxl()
    alone.load_nara_weights(folders["flow"])
    assert torch.equal(pixels(pipe), pixels(alone))


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


def test_a_scheduler_that_is_set_while_the_adapter_is_disabled_is_the_pipelines_own_from_then_on(flow):
    expected = pixels(flow)
    flow.disable_lora()
    flow.scheduler = chosen = DDIMScheduler(**BETAS)
    first = pixels(flow)
    flow.enable_lora()
    assert torch.equal(pixels(flow), expected)
    flow.disable_lora()
    assert flow.scheduler is chosen
    flow.enable_lora()
    flow.unload_nara_weights()
    assert flow.scheduler is chosen
    assert torch.equal(pixels(flow), first)


@pytest.mark.parametrize("remove", ["disable_lora", "unload_nara_weights", "unload_lora_weights", "delete_adapters"])
def test_a_scheduler_that_was_set_before_the_adapter_stays_and_a_warning_names_it(remove, folders, caplog):
    pipe = small_sdxl()
    pipe.scheduler = FLOW
    with caplog.at_level(logging.WARNING):
        pipe.load_nara_weights(folders["flow"], "flow")
    assert not [record for record in caplog.records if record.name.startswith("nara")]
    with caplog.at_level(logging.WARNING):
        getattr(pipe, remove)(*["flow"] * (remove == "delete_adapters"))
    assert "no active adapter predicts flow_prediction now, which the pipeline's scheduler expects. It" in caplog.text
    assert pipe.scheduler is FLOW


def test_a_hotswap_to_an_adapter_that_converts_nothing_brings_back_the_old_scheduler(flow, tmp_path):
    trained(text=False, seed=9, noise_convention="flow").save_nara_weights(tmp_path)
    old = small_sdxl().scheduler
    flow.load_nara_weights(tmp_path, "flow", hotswap=True)
    assert type(flow.scheduler) is type(old)
    assert flow.scheduler.config == old.config
    assert not has_replaced_scheduler(flow)


def test_hotswap_follows_the_new_adapters_scheduler(folders):
    pipe = small_sdxl()
    pipe.load_nara_weights(folders["v"], "x")
    pipe.load_nara_weights(folders["zero_snr"], "x", hotswap=True)
    alone = small_sdxl()
    alone.load_nara_weights(folders["zero_snr"])
    assert torch.equal(pixels(pipe), pixels(alone))


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
    with pytest.raises(ValueError, match=r"scheduler is .*: pass a scheduler's configuration with its _class_name"):
        trained(text=False, scheduler={"prediction_type": "v_prediction"})
