"""Of NaRAs that are unloaded or deleted nothing is left, and what else is loaded stays as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from nara_diffusion.noise.level import find_holders
from tests.helpers.adapted import nara_config
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import State, alone, predict, trained

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


PLACES = {"a": ["to_q", "conv1"], "b": ["to_q", "to_v"], "c": ["to_q", "to_v", "conv1", "to_k"]}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NaRAs of different layers: "b" and "c" have a part for the text encoders."""
    root = tmp_path_factory.mktemp("places")
    for seed, (name, targets) in enumerate(PLACES.items()):
        trained(seed=seed, text=name != "a", target_modules=targets).save_nara_weights(root / name)
    return root


def activity(pipe) -> set[tuple[str, ...]]:
    """What is active, by all layers of all components and the holders."""
    models = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {tuple(layer.active_adapters) for layer in layers}


DELETE = {
    "pipeline": lambda pipe, names: pipe.delete_adapters(names),
    "UNet": lambda pipe, names: pipe.unet.delete_adapters(names),
}


@pytest.mark.parametrize("way", DELETE)
@pytest.mark.parametrize(("loaded", "gone", "stays"), [("abc", "c", "a"), ("bac", ["c", "a"], "b"), ("cba", "a", "b")])
def test_deleting_the_active_one_activates_one_other_in_all_layers(way, loaded, gone, stays, places):
    pipe, expected = small_sdxl(), small_sdxl()
    for name in loaded:
        pipe.load_nara_weights(places / name, adapter_name=name)
    expected.load_nara_weights(places / stays, adapter_name=stays)
    if way == "UNet":
        for each in (pipe, expected):
            each.text_encoder = each.text_encoder_2 = torch.nn.Identity()
    DELETE[way](pipe, gone)
    assert activity(pipe) == {(stays,)}
    assert torch.equal(predict(pipe), predict(expected))
    if way == "pipeline":
        assert torch.equal(pixels(pipe), pixels(expected))


@pytest.mark.parametrize("way", DELETE)
def test_of_several_active_ones_the_others_stay_active(way, places):
    pipe = small_sdxl()
    for name in PLACES:
        pipe.load_nara_weights(places / name, adapter_name=name)
    pipe.set_adapters(["c", "b"])
    DELETE[way](pipe, "c")
    expected = small_sdxl()
    expected.load_nara_weights(places / "b", adapter_name="b")
    assert {tuple(layer.active_adapters) for layer in pipe.unet.modules() if isinstance(layer, BaseTunerLayer)} == {
        ("b",)
    }
    assert torch.equal(predict(pipe), predict(expected))


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
