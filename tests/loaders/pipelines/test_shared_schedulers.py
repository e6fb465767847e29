"""Pipelines that share a denoiser, or even the scheduler that an adapter brought: none samples by the wrong one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, UniPCMultistepScheduler
from torch import Tensor

from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import State

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]

LEFT = r"scheduler, .*, is for flow_prediction, .* pipe\.unload_nara_weights\(\) brings"


def img2img(pipe: Any) -> Any:
    """Another pipeline of the same components, as `from_pipe` makes it."""
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def image(pipe: Any) -> Tensor:
    """What such a pipeline makes of a fixed image."""
    given = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    call = {"prompt": "a toy", "image": given, "num_inference_steps": 4, "output_type": "np"}
    return torch.tensor(pipe(**call, generator=torch.Generator().manual_seed(4)).images)


@pytest.fixture(scope="module")
def base_image() -> Tensor:
    return image(img2img(small_sdxl()))


REMOVALS = {
    "unload_nara_weights": lambda pipe: pipe.unload_nara_weights(),
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "delete_adapters": lambda pipe: pipe.delete_adapters("flow"),
    "unload_lora of the UNet": lambda pipe: pipe.unet.unload_lora(),
    "delete_adapters of the UNet": lambda pipe: pipe.unet.delete_adapters("flow"),
}


@pytest.mark.parametrize("called_before", [True, False])
@pytest.mark.parametrize("remove", REMOVALS.values(), ids=REMOVALS)
def test_removal_elsewhere_is_an_error_until_the_own_scheduler_is_brought_back(
    remove: Callable[[Any], None], called_before, flow, base_image
):
    other = img2img(flow)
    if called_before:
        assert not torch.allclose(image(other), base_image, atol=1e-2)
    remove(flow)
    with pytest.raises(ValueError, match=LEFT):
        image(other)
    other.unload_nara_weights()
    assert isinstance(other.scheduler, EulerDiscreteScheduler)
    assert torch.equal(image(other), base_image)


@pytest.mark.parametrize("name", ["unload_lora_weights", "disable_lora", "enable_lora"])
def test_each_method_of_adapters_brings_back_the_own_scheduler(name, flow, base_image):
    other = img2img(flow)
    flow.unload_nara_weights()
    getattr(other, name)()
    assert torch.equal(image(other), base_image)


def test_activating_a_lora_instead_brings_back_the_own_scheduler(flow, lora_folder):
    other = img2img(flow)
    flow.unload_nara_weights()
    flow.load_lora_weights(lora_folder, adapter_name="static")
    other.set_adapters("static")
    alone = small_sdxl()
    alone.load_lora_weights(lora_folder)
    assert torch.equal(image(other), image(img2img(alone)))


def test_the_second_pipeline_removes_and_the_first_is_put_right(flow, base_image, base_pixels):
    other = img2img(flow)
    own = other.scheduler
    other.unload_nara_weights()
    assert other.scheduler is not own
    assert torch.equal(image(other), base_image)
    with pytest.raises(ValueError, match=LEFT):
        pixels(flow)
    flow.unload_nara_weights()
    assert torch.equal(pixels(flow), base_pixels)
    assert flow.scheduler is other.scheduler


def test_each_pipeline_disables_and_enables(flow, base_image, base_pixels):
    other = img2img(flow)
    first, second = pixels(flow), image(other)
    flow.disable_lora()
    assert torch.equal(pixels(flow), base_pixels)
    with pytest.raises(ValueError, match=r"predicts epsilon, but .* takes it for flow_prediction"):
        image(other)
    other.disable_lora()
    assert torch.equal(image(other), base_image)
    other.enable_lora()
    assert torch.equal(image(other), second)
    with pytest.raises(ValueError, match=r"predicts flow_prediction, but .* takes it for epsilon"):
        pixels(flow)
    flow.enable_lora()
    assert torch.equal(pixels(flow), first)
    other.unload_nara_weights()
    flow.unload_nara_weights()
    assert torch.equal(image(other), base_image)
    assert torch.equal(pixels(flow), base_pixels)


@pytest.mark.parametrize("made", ["before it was loaded", "while it was disabled"])
def test_a_pipeline_with_its_own_scheduler_follows_as_soon_as_it_is_told(made, folders, base_image):
    pipe = small_sdxl()
    other = img2img(pipe)
    pipe.load_nara_weights(folders["flow"], "flow")
    expected = image(img2img(pipe))
    if made != "before it was loaded":
        pipe.disable_lora()
        other = img2img(pipe)
        pipe.enable_lora()
    own = other.scheduler
    with pytest.raises(ValueError, match="takes it for epsilon"):
        image(other)
    other.set_adapters("flow")
    assert torch.equal(image(other), expected)
    other.unload_nara_weights()
    assert other.scheduler is own
    assert torch.equal(image(other), base_image)


def test_a_scheduler_taken_from_the_other_pipeline_serves(folders):
    pipe = small_sdxl()
    other = img2img(pipe)
    pipe.load_nara_weights(folders["flow"])
    other.scheduler = pipe.scheduler
    assert torch.equal(image(other), image(img2img(pipe)))


def test_another_solver_that_both_share_is_no_less_guarded(flow, base_image):
    flow.scheduler = UniPCMultistepScheduler.from_config(flow.scheduler.config)
    other = img2img(flow)
    flow.unload_nara_weights()
    with pytest.raises(ValueError, match=LEFT):
        image(other)
    other.unload_nara_weights()
    assert torch.equal(image(other), base_image)


def test_an_adapter_that_is_loaded_in_the_second_pipeline_does_not_hide_the_own_scheduler(folders, base_image):
    pipe = small_sdxl()
    pipe.load_nara_weights(folders["v"], "v")
    other = img2img(pipe)
    other.load_nara_weights(folders["zero_snr"], "zero")
    assert other.scheduler.config.rescale_betas_zero_snr
    other.disable_lora()
    assert torch.equal(image(other), base_image)
    other.enable_lora()
    other.unload_nara_weights()
    assert torch.equal(image(other), base_image)


def test_nothing_stays_on_the_denoiser_once_no_pipeline_has_the_adapters_scheduler(folders):
    pipe = small_sdxl()
    pixels(pipe)
    pipe.unet.requires_grad_(False)  # as loading leaves it, a LoRA too
    before = State(pipe)
    pipe.load_nara_weights(folders["flow"], "flow")
    for _ in range(3):
        pixels(pipe)
        pipe.disable_lora()
        pipe.enable_lora()
    other = img2img(pipe)
    pipe.unload_nara_weights()
    assert len(pipe.unet._forward_pre_hooks) == 1
    del other
    gc.collect()
    assert State(pipe) == before


def test_a_copy_of_a_pipeline_is_on_its_own(flow, base_pixels):
    expected = pixels(flow)
    other = copy.deepcopy(flow)
    other.unload_nara_weights()
    assert torch.equal(pixels(other), base_pixels)
    assert torch.equal(pixels(flow), expected)
    shallow = copy.copy(flow)
    flow.unload_nara_weights()
    assert torch.equal(pixels(flow), base_pixels)
    with pytest.raises(ValueError, match=LEFT):
        pixels(shallow)


def test_a_model_that_does_predict_it_is_sampled_by_a_scheduler_of_ones_own(flow, folders):
    """The way out that the error names, for weights that were converted without an adapter."""
    other = img2img(flow)
    flow.unload_nara_weights()
    with pytest.raises(ValueError, match=r"pipe\.scheduler = type\(pipe\.scheduler\)\.from_config"):
        image(other)
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config)
    assert image(other).shape == (1, 16, 16, 3)
