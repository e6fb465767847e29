"""Of NaRAs that are unloaded or deleted nothing is left, and what else is loaded stays as it was."""

from __future__ import annotations

import re

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from nara_diffusion.runtime.modules import find_holders
from tests.helpers.adapted import nara_config
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import State, alone

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # PEFT, at Diffusers' second LoRA
    pytest.mark.filterwarnings("ignore:Already unmerged"),  # PEFT, at layers that unfuse_lora has nothing to do for
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),  # PEFT's delete_adapter
]


WAYS = {
    "unload_nara_weights": lambda pipe: pipe.unload_nara_weights(),
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "delete_adapters": lambda pipe: pipe.delete_adapters("x"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("disabled", [False, True])
def test_nothing_is_left_of_the_last_adapter(way, disabled, nara_folder, base_pixels):
    pipe = small_sdxl()
    assert torch.equal(pixels(pipe), base_pixels)
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    before = State(pipe)
    pipe.load_nara_weights(nara_folder, adapter_name="x")
    pixels(pipe)
    if disabled:
        pipe.disable_lora()
    WAYS[way](pipe)
    assert before == State(pipe)
    assert torch.equal(pixels(pipe), base_pixels)
    pipe.load_nara_weights(nara_folder, adapter_name="x")  # and on again
    assert not torch.allclose(pixels(pipe), base_pixels, atol=1e-2)


def test_a_source_of_lambda_goes_with_the_adapters_that_it_was_for(base_pixels):
    pipe = small_sdxl()
    for convention, expected in (("edm", "edm"), (None, "timestep")):
        pipe.unet.add_adapter(nara_config(target_modules=["to_q"], noise_convention=convention))
        assert find_holders(pipe.unet)[0].conventions.source.convention == expected
        assert pipe.unet.peft_config["default"].noise_convention == expected
        pipe.delete_adapters("default")
        assert not find_holders(pipe.unet)
    assert torch.equal(pixels(pipe), base_pixels)


def test_deleting_one_keeps_the_others(pipe, other_folder, lora_folder):
    pipe.set_adapters("b")
    pipe.delete_adapters("a")
    assert pipe.get_list_adapters() == {"unet": ["b", "static"]}
    assert torch.equal(pixels(pipe), pixels(alone(other_folder)))
    assert not any(".a." in key for key in pipe.unet.state_dict())
    assert not any(isinstance(module, BaseTunerLayer) for module in pipe.text_encoder.modules())
    pipe.delete_adapters(["b"])
    assert not find_holders(pipe.unet)  # the LoRA needs none
    assert torch.equal(pixels(pipe), pixels(alone(lora_folder, lora=True)))


@pytest.mark.parametrize("active", [["a", "static"], ["static"], ["a"]])
def test_unloading_naras_keeps_loras_as_they_are(active, pipe, lora_folder, base_pixels):
    pipe.set_adapters(active, 0.5)
    pipe.unload_nara_weights()
    assert pipe.get_list_adapters() == {"unet": ["static"]}
    assert pipe.get_active_adapters() == [name for name in active if name == "static"]
    assert not find_holders(pipe.unet)
    lora = alone(lora_folder, lora=True)
    assert {name for name, _ in pipe.unet.named_modules()} == {
        re.sub(r"(lora_\w+)\.x\b", r"\1.static", name) for name, _ in lora.unet.named_modules()
    }
    lora.set_adapters("x", 0.5)
    assert torch.equal(pixels(pipe), pixels(lora) if "static" in active else base_pixels)
    pipe.unload_nara_weights()  # harmless
    assert pipe.get_list_adapters() == {"unet": ["static"]}
