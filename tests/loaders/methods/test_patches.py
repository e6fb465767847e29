"""What Diffusers offers after loading, on NaRAs as on LoRAs, alone and mixed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import nara_diffusion
from nara_diffusion import noise_level
from nara_diffusion.noise.level import find_holders
from nara_diffusion.noise.needs import is_noise_aware
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import FILE, State, alone, predict, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # PEFT, at Diffusers' second LoRA
    pytest.mark.filterwarnings("ignore:Already unmerged"),  # PEFT, at layers that unfuse_lora has nothing to do for
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),  # PEFT's delete_adapter
]


def adapter_parameters(pipe: Any) -> dict[str, nn.Parameter]:
    return {
        f"{part}.{name}": parameter
        for part in ("unet", "text_encoder", "text_encoder_2")
        for name, parameter in getattr(pipe, part).named_parameters()
        if "lora_" in name or "nara_core" in name
    }


def test_adapters_are_listed_and_chosen_by_name(pipe, nara_folder, other_folder, lora_folder, base_pixels):
    assert pipe.get_list_adapters() == {
        "unet": ["a", "b", "static"],
        "text_encoder": ["a"],
        "text_encoder_2": ["a"],
    }
    for name, folder in (("a", nara_folder), ("b", other_folder), ("static", lora_folder)):
        pipe.set_adapters(name)
        assert pipe.get_active_adapters() == [name]
        expected = pixels(alone(folder, lora=name == "static"))
        assert torch.equal(pixels(pipe), expected)
        assert not torch.allclose(expected, base_pixels, atol=1e-2)
        trainable = {name for name, parameter in adapter_parameters(pipe).items() if parameter.requires_grad}
        assert trainable == {key for key in adapter_parameters(pipe) if f".{name}." in key}
        assert any("nara_core" in key for key in trainable) == (name != "static")


def test_what_is_loaded_last_is_active(nara_folder, lora_folder):
    pipe = small_sdxl()
    pipe.load_nara_weights(nara_folder, "a")
    pipe.load_lora_weights(lora_folder, adapter_name="static")
    assert active(pipe.unet) == {("static",)}
    assert not is_noise_aware(pipe.unet)
    assert torch.equal(predict(pipe), predict(alone(lora_folder, lora=True)))
    pipe.load_nara_weights(nara_folder, "b")
    assert active(pipe.unet) == {("b",)}
    assert is_noise_aware(pipe.unet)
    assert torch.equal(predict(pipe), predict(alone(nara_folder)))


def active(model: nn.Module) -> set[tuple[str, ...]]:
    return {tuple(layer.active_adapters) for layer in model.modules() if isinstance(layer, BaseTunerLayer)}


def test_weights_scale_each_update(pipe, base_pixels):
    assert pipe.set_adapters(["a", "b"], [0.0, 0.0]) is None
    assert pipe.get_active_adapters() == ["a", "b"]
    torch.testing.assert_close(pixels(pipe), base_pixels, rtol=0, atol=1e-5)
    pipe.set_adapters("a")
    one = pixels(pipe)
    pipe.set_adapters(["a", "b", "static"], [1.0, 0.0, 0.0])
    torch.testing.assert_close(pixels(pipe), one, rtol=0, atol=1e-5)
    pipe.set_adapters(["a", "b", "static"], [1.0, 0.5, 0.7])
    layer = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling == {"a": 3 / 4, "b": 0.5 * 2 / 3, "static": 0.7 * 3 / 4}
    mixed = pixels(pipe)
    assert not torch.allclose(mixed, one, atol=1e-3)
    pipe.set_adapters(["static", "b", "a"], [0.7, 0.5, 1.0])
    torch.testing.assert_close(pixels(pipe), mixed, rtol=0, atol=1e-5)


def test_weights_by_block_reach_the_layers_of_that_block(pipe, base_pixels):
    pipe.set_adapters(["a", "b"], [{"unet": {"down": 0.0, "mid": 0.3, "up": {"block_0": [1.0, 0.5]}}}, 0.0])
    unet = pipe.unet
    scales = {
        "down": unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.scaling["a"],
        "mid": unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.scaling["a"],
        "first": unet.up_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.scaling["a"],
        "second": unet.up_blocks[0].attentions[1].transformer_blocks[0].attn1.to_q.scaling["a"],
    }
    assert scales == pytest.approx({"down": 0.0, "mid": 0.3 * 3 / 4, "first": 3 / 4, "second": 0.5 * 3 / 4})
    assert find_holders(unet)[0].active_adapters == ["a", "b"]
    assert not torch.allclose(pixels(pipe), base_pixels, atol=1e-3)


def test_disabled_adapters_leave_the_base(pipe, base_pixels):
    pipe.set_adapters(["a", "static"])
    on = pixels(pipe)
    pipe.disable_lora()
    assert torch.equal(pixels(pipe), base_pixels)
    assert not any(parameter.requires_grad for parameter in adapter_parameters(pipe).values())
    pipe.enable_lora()
    assert torch.equal(pixels(pipe), on)


def test_cross_attention_scale_is_for_one_call(nara_folder, base_pixels):
    pipe = alone(nara_folder)
    full = pixels(pipe)
    none = pixels(pipe, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(none, base_pixels, rtol=0, atol=1e-5)
    half = pixels(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(pixels(pipe), full)
    pipe.set_adapters("x", 0.5)
    torch.testing.assert_close(pixels(pipe), half, rtol=0, atol=1e-5)


def test_set_lora_device_moves_cores_too(pipe):
    pipe.set_lora_device(["a", "static"], "meta")
    for name, parameter in adapter_parameters(pipe).items():
        assert parameter.is_meta == (".b." not in name), name
    (holder,) = find_holders(pipe.unet)
    assert all(buffer.is_meta for buffer in holder.cores["a"].buffers())
    assert not any(buffer.is_meta for buffer in holder.cores["b"].buffers())


def test_fusing_needs_one_level_and_half_of_nothing_is_fused(pipe, base_pixels):
    pipe.set_adapters(["static", "b"])  # the LoRA comes first in layers that have both
    before = State(pipe)
    for components in (["unet"], ["text_encoder", "unet"]):
        with pytest.raises(
            ValueError, match=r"λ is not known.*fuse_lora works at one λ: call it inside `with noise_level"
        ):
            pipe.fuse_lora(components=components, lora_scale=0.8)
    with (
        noise_level(pipe.unet, torch.tensor([0.2, 0.3])),
        pytest.raises(ValueError, match="merging needs a single value"),
    ):
        pipe.fuse_lora(components=["unet"])
    assert before == State(pipe)
    with noise_level(pipe.unet, 0.4):
        expected = pixels(pipe)
        pipe.fuse_lora(components=["unet"])
    assert pipe.num_fused_loras == 2
    torch.testing.assert_close(pixels(pipe), expected, rtol=0, atol=1e-4)
    pipe.unfuse_lora(components=["unet"])
    assert not torch.allclose(pixels(pipe), expected, atol=1e-3)
    pipe.set_adapters("static")
    pipe.fuse_lora(components=["unet"])  # a LoRA alone needs no λ
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    torch.testing.assert_close(pixels(pipe), base_pixels, rtol=0, atol=1e-5)


def test_what_is_fused_stays_when_the_adapter_is_unloaded(nara_folder):
    pipe = alone(nara_folder)
    with noise_level(pipe.unet, 0.4):
        expected = pixels(pipe)
        pipe.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    pipe.unload_nara_weights()
    torch.testing.assert_close(pixels(pipe), expected, rtol=0, atol=1e-4)
    assert not find_holders(pipe.unet)


def test_adapters_get_numbers_for_names_as_loras_do(nara_folder, other_folder, lora_folder):
    pipe = small_sdxl()
    pipe.load_nara_weights(other_folder)
    pipe.load_nara_weights(other_folder)
    pipe.load_nara_weights(nara_folder)
    assert pipe.get_list_adapters()["unet"] == ["default_0", "default_1", "default_2"]
    assert pipe.get_list_adapters()["text_encoder"] == ["default_2"]
    pipe.delete_adapters("default_0")
    pipe.load_nara_weights(other_folder)
    assert pipe.get_list_adapters()["unet"] == ["default_1", "default_2", "default_3"]


def test_a_nara_file_is_no_lora(nara_folder, tmp_path):
    tensors = load_file(nara_folder / FILE)
    identity = trained(text=False, core_type="identity")
    identity.save_nara_weights(tmp_path)  # of A and B alone; α would be lost
    with safe_open(nara_folder / FILE, "pt") as file:
        save_file(tensors, tmp_path / "renamed.safetensors", metadata=file.metadata())
    pipe = small_sdxl()
    before = State(pipe)
    unet_alone = {key.removeprefix("unet."): tensor for key, tensor in tensors.items() if key.startswith("unet.")}
    for call in (
        lambda: pipe.load_lora_weights(nara_folder),
        lambda: pipe.load_lora_weights(nara_folder, weight_name=FILE),
        lambda: pipe.load_lora_weights(nara_folder / FILE),
        lambda: pipe.load_lora_weights(tmp_path, weight_name="renamed.safetensors"),
        lambda: pipe.load_lora_weights(tmp_path, weight_name=FILE),
        lambda: pipe.load_lora_weights(tensors),
        lambda: pipe.unet.load_lora_adapter(nara_folder, prefix="unet", weight_name=FILE),
        lambda: pipe.unet.load_lora_adapter(tensors, prefix="unet"),
        lambda: pipe.unet.load_lora_adapter(unet_alone, prefix=None),
        lambda: pipe.unet.load_lora_adapter(tensors, prefix="transformer"),
    ):
        with pytest.raises(ValueError, match=r"holds a NaRA adapter, .* load it by pipe.load_nara_weights"):
            call()
        assert before == State(pipe)


def test_the_core_trains_through_a_loaded_adapter(nara_folder):
    pipe = alone(nara_folder)
    pipe.unet.requires_grad_(False)
    pipe.set_adapters("x")
    condition = {"text_embeds": torch.ones(2, 24), "time_ids": torch.ones(2, 6)}
    out = pipe.unet(torch.ones(2, 4, 8, 8), torch.tensor([10, 900]), torch.ones(2, 5, 40), added_cond_kwargs=condition)
    out.sample.square().mean().backward()
    unet = {name: parameter for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}
    assert any("nara_core" in name for name in unet)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in unet.values())


def test_registration_is_harmless_when_repeated(nara_folder, base_pixels):
    methods = [
        (DiffusionPipeline, "load_nara_weights"),
        (PeftAdapterMixin, "set_adapters"),
        (PeftAdapterMixin, "unload_lora"),
        (LoraBaseMixin, "delete_adapters"),
    ]
    before = [getattr(owner, name) for owner, name in methods]
    nara_diffusion.registry.register()
    importlib.reload(nara_diffusion.registry)
    nara_diffusion.registry.register()
    assert [getattr(owner, name) for owner, name in methods] == before
    pipe = alone(nara_folder)
    pipe.delete_adapters("x")
    assert torch.equal(pixels(pipe), base_pixels)
