"""A conversion that is fused into the base weights: the scheduler stays with it until it is taken out."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nara_diffusion import noise_level
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import save_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),  # PEFT, at layers that unfuse_lora has nothing to do for
]


@pytest.fixture
def constant(folders) -> Any:
    """A pipeline into which a conversion that needs no λ was loaded."""
    pipe = small_sdxl()
    pipe.load_nara_weights(folders["constant"], "constant")
    return pipe


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_it_samples_while_it_is_fused_and_after_unfusing(constant):
    expected = pixels(constant)
    constant.fuse_lora()
    close(pixels(constant), expected)
    constant.unfuse_lora(components=["unet"])
    close(pixels(constant), expected)


def test_it_samples_while_it_is_fused_at_one_level(flow, base_pixels):
    with noise_level(flow.unet, 0.5):
        expected = pixels(flow)
        flow.fuse_lora()
    close(pixels(flow), expected)


def test_it_keeps_its_scheduler_when_it_is_unloaded(constant, caplog):
    expected = pixels(constant)
    constant.fuse_lora()
    with caplog.at_level(logging.WARNING):
        constant.unload_lora_weights()
    assert "predicts" not in caplog.text
    assert constant.scheduler.config.prediction_type == "v_prediction"
    close(pixels(constant), expected)
    constant.unload_nara_weights()
    close(pixels(constant), expected)


def test_disabling_takes_it_out_of_the_weights_and_the_scheduler_with_it(constant, base_pixels):
    expected = pixels(constant)
    constant.fuse_lora()
    constant.disable_lora()
    close(pixels(constant), base_pixels)
    constant.enable_lora()
    close(pixels(constant), expected)


def test_disabled_and_unloaded_before_a_step_it_is_in_the_weights(constant):
    expected = pixels(constant)
    constant.fuse_lora()
    constant.disable_lora()
    constant.unload_lora_weights()
    assert constant.scheduler.config.prediction_type == "v_prediction"
    close(pixels(constant), expected)


def test_a_scheduler_that_is_the_users_stays_theirs(folders):
    pipe = small_sdxl()
    own = pipe.scheduler
    pipe.load_nara_weights(folders["constant"], "constant", set_scheduler=False)
    pipe.fuse_lora()
    pipe.unload_nara_weights()
    assert pipe.scheduler is own


def test_another_adapter_is_deleted_meanwhile(constant, lora_folder, base_pixels):
    constant.load_lora_weights(lora_folder, adapter_name="static")
    constant.set_adapters("constant")
    constant.fuse_lora()
    constant.delete_adapters("static")
    constant.unfuse_lora(components=["unet"])
    constant.unload_nara_weights()
    assert constant.scheduler.config.prediction_type == "epsilon"
    close(pixels(constant), base_pixels)


def test_unfusing_it_while_another_adapter_is_active_sets_the_scheduler_of_that_one(constant, tmp_path):
    """… which is active in other layers: in those into which it is fused it would have no effect."""
    save_lora(tmp_path, target_modules=["proj_out"])
    constant.load_lora_weights(tmp_path, adapter_name="static")
    constant.set_adapters("constant")
    constant.fuse_lora()
    constant.set_adapters("static")
    assert constant.scheduler.config.prediction_type == "v_prediction"
    constant.unfuse_lora(components=["unet"])
    alone = small_sdxl()
    alone.load_lora_weights(tmp_path)
    close(pixels(constant), pixels(alone))


def test_another_adapter_of_its_layers_is_refused_until_it_is_unfused(constant, lora_folder):
    expected = pixels(constant)
    constant.load_lora_weights(lora_folder, adapter_name="static")
    constant.set_adapters("constant")
    constant.fuse_lora()
    with pytest.raises(ValueError, match="adapter 'static' would have no effect beside the fused 'constant'"):
        constant.set_adapters("static")
    close(pixels(constant), expected)
    constant.unfuse_lora(components=["unet"])
    constant.set_adapters("static")
    alone = small_sdxl()
    alone.load_lora_weights(lora_folder)
    close(pixels(constant), pixels(alone))


def test_deleted_while_it_is_fused_it_is_what_the_base_predicts(constant, folders):
    expected = pixels(constant)
    constant.load_nara_weights(folders["zero_snr"], "zero")
    constant.set_adapters("constant")
    constant.fuse_lora()
    constant.delete_adapters("constant")
    with pytest.raises(ValueError, match="adapter 'zero' would have no effect beside the fused 'constant'"):
        constant.set_adapters("zero")
    constant.disable_lora()
    close(pixels(constant), expected)
