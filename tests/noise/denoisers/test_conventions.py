"""What a timestep means is declared for each class, saved with an adapter, and checked when one is loaded."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from nara_diffusion import TimestepNoise, noise_level, register_denoiser, set_noise_source
from nara_diffusion.noise.denoisers.lookup import denoiser_of
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.denoisers.adapted import TARGETS, UNET, WARNINGS_OF_DIFFUSERS, adapted_denoiser, run, told
from tests.helpers.denoisers.models import DENOISERS, denoiser, inputs_of

pytestmark = WARNINGS_OF_DIFFUSERS


class FlowUNet(UNet2DConditionModel):
    """A UNet whose timestep is the σ of a flow."""


def saved_adapter(folder: Any, config: Any) -> PeftModel:
    model = get_peft_model(denoiser(UNET), config)
    disturb(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.usefixtures("_registry")
def test_the_convention_is_saved_and_checked_on_load(tmp_path):
    model = saved_adapter(tmp_path, nara_config(target_modules=TARGETS))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["noise_convention"] == "timestep"
    loaded = PeftModel.from_pretrained(denoiser(UNET), tmp_path)
    inputs = inputs_of(UNET)
    assert torch.equal(run(loaded, inputs, 640), run(model, inputs, 640))
    register_denoiser("FlowUNet", "sigma")
    other = FlowUNet(**DENOISERS[UNET][0])
    with pytest.raises(ValueError, match="trained with λ defined as 'timestep', but the source of λ tells 'flow'"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="trained with λ defined as 'timestep', but the source of λ tells 'edm'"):
        set_noise_source(loaded, TimestepNoise("edm"))  # it says what it was trained with


def test_an_adapter_that_was_trained_in_edm_terms_reads_them(tmp_path):
    model = saved_adapter(tmp_path, nara_config(target_modules=TARGETS, noise_convention="edm"))
    inputs = inputs_of(UNET)
    loaded = PeftModel.from_pretrained(denoiser(UNET), tmp_path)
    assert told(loaded.base_model.model, lambda: run(loaded, inputs, 0.0)) == [0.5]
    assert torch.equal(run(loaded, inputs, -0.3), run(model, inputs, -0.3))
    discrete = get_peft_model(denoiser(UNET), nara_config(target_modules=TARGETS))
    with pytest.raises(ValueError, match="trained with λ defined as 'edm', but the source of λ tells 'timestep'"):
        discrete.load_adapter(str(tmp_path), "other")
    with pytest.raises(ValueError, match="'masked_share'"):
        adapted_denoiser(UNET, nara_config(target_modules=TARGETS, noise_convention="masked_share"))


def test_an_adapter_that_was_converted_to_a_flow_reads_its_timestep(tmp_path):
    model = saved_adapter(tmp_path, nara_config(target_modules=TARGETS, noise_convention="flow"))
    inputs = inputs_of(UNET)
    loaded = PeftModel.from_pretrained(denoiser(UNET), tmp_path)
    assert told(loaded.base_model.model, lambda: run(loaded, inputs, 250.0)) == [0.25]
    assert torch.equal(run(loaded, inputs, 1000.0), run(model, inputs, 1000.0))
    with pytest.raises(ValueError, match="as 'sigma_1000' is no λ"):
        run(loaded, inputs, 1200.0)
    discrete = get_peft_model(denoiser(UNET), nara_config(target_modules=TARGETS))
    with pytest.raises(ValueError, match="trained with λ defined as 'flow', but the source of λ tells 'timestep'"):
        discrete.load_adapter(str(tmp_path), "other")


def test_one_config_serves_models_of_different_conventions():
    config = nara_config(target_modules=TARGETS)
    unet, flux = adapted_denoiser(UNET, config), adapted_denoiser("FluxTransformer2DModel", config)
    assert config.noise_convention is None
    assert unet.peft_config["default"].noise_convention == "timestep"
    assert flux.peft_config["default"].noise_convention == "flow"


def test_diffusers_own_call_reads_the_timestep_too():
    model = denoiser(UNET)
    model.add_adapter(nara_config(target_modules=TARGETS))
    disturb(model)
    assert torch.equal(run(model, inputs_of(UNET), 640), run(adapted_denoiser(UNET), inputs_of(UNET), 640))


# ---------------------------------------------------------------------- classes that nobody declared


def undeclared() -> UNet2DModel:
    torch.manual_seed(9)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
    ).eval()


@pytest.mark.usefixtures("_registry")
def test_a_class_that_nobody_declared_raises_until_it_is_registered():
    sample = torch.randn(2, 3, 8, 8)
    model = undeclared()
    assert denoiser_of(model) is None
    inject_adapter_in_model(nara_config(target_modules=TARGETS), model)
    with pytest.raises(ValueError, match=r"register_denoiser\('UNet2DModel', meaning\) before adding adapters"):
        model(sample, 250)
    with noise_level(model, 0.3):
        model(sample, 250)
    register_denoiser("UNet2DModel")
    register_denoiser("UNet2DModel", "discrete")  # harmless
    with pytest.raises(ValueError, match=r"UNet2DModel is declared already, as Denoiser.*'discrete'"):
        register_denoiser("UNet2DModel", "sigma")
    with pytest.raises(ValueError, match="meaning is 'snr'"):
        register_denoiser("Another", "snr")
    model = undeclared()
    inject_adapter_in_model(nara_config(target_modules=TARGETS), model)
    disturb(model)
    assert told(model, lambda: model(sample, torch.tensor([250, 500]))) == [0.25, 0.5]
