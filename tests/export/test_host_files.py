"""Files for other hosts: loaded back by Diffusers, pixel by pixel against the NaRA at its λ, and read by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, inject_adapter_in_model

from nara_diffusion import core_matrix, noise_level, to_lora
from nara_diffusion.export import PlainLora, PlainLoraLayer, save_host_file
from nara_diffusion.export.host_files import host_state_dict
from nara_diffusion.export.original_names import parts_of
from tests.helpers.adapted import disturb, lora_config, nara_config
from tests.helpers.denoisers import denoiser
from tests.helpers.small_pipelines import pixels, small_sd, small_sd3, small_sdxl

LEVEL = 0.37
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MANY = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
MANY += ["conv_in", "conv_out"]
UNEQUAL = {"rank_pattern": {"conv1": 3, "to_k": 3, "ff.net.2": 5}, "alpha_pattern": {"to_v": 7, "to_k": 5, "conv2": 2}}


def adapted(model: Any, targets: list[str], **changes: Any) -> Any:
    """The model with a disturbed NaRA, of small steps, so that pictures stay pictures."""
    model.add_adapter(nara_config(target_modules=targets, **changes), "toy")
    disturb(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.2
    return model


def with_encoders(pipe: Any) -> dict[str, Any]:
    """Plain LoRAs of unequal ranks on the text encoders of a pipeline, and what they are."""
    loras = {}
    for seed, name in enumerate(("text_encoder", "text_encoder_2")):
        encoder = getattr(pipe, name, None)
        if encoder is not None:
            config = lora_config(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], rank_pattern={"k_proj": 3})
            inject_adapter_in_model(config, encoder, "toy")
            disturb(encoder, seed=seed)
            loras[name] = to_lora(encoder, adapter_name="toy")
    return loras


def test_diffusers_draws_the_same_pixels_from_kohyas_file_of_sd15(tmp_path):
    """(Those of SDXL and FLUX are in tests/acceptance.)"""
    pipe, other = small_sd(), small_sd()
    unet = adapted(pipe.unet, MANY, **UNEQUAL)
    loras = {"unet": to_lora(unet, LEVEL, "toy"), **with_encoders(pipe)}
    with noise_level(unet, LEVEL):
        wanted = pixels(pipe)
    save_host_file(loras, tmp_path / "new" / "toy.safetensors", "kohya", "sd15", 1)
    before = pixels(other)
    other.load_lora_weights(tmp_path / "new" / "toy.safetensors")
    torch.testing.assert_close(pixels(other), wanted, rtol=1e-4, atol=2e-5)
    assert (before - wanted).abs().max() > 0.02
    with pytest.raises(ValueError, match="is a folder: name a file"):
        save_host_file(loras, tmp_path / "new", "kohya", "sd15", 1)


def test_layers_of_unequal_ranks_share_one_alpha_of_their_component():
    """Diffusers reads one alpha for all attention of a component."""
    loras = {"unet": to_lora(adapted(small_sdxl().unet, MANY, **UNEQUAL), LEVEL, "toy"), **with_encoders(small_sdxl())}
    halves = {
        component: replace(
            lora, layers={n: replace(own, A=own.A.half(), B=own.B.half()) for n, own in lora.layers.items()}
        )
        for component, lora in loras.items()
    }
    tensors = host_state_dict(halves, "kohya", "sdxl", 1)
    assert {tensor.item() for key, tensor in tensors.items() if "alpha" in key} == {3.0}
    assert {tensor.dtype for key, tensor in tensors.items() if "alpha" not in key} == {torch.float16}
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    key = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_k"
    layer = loras["unet"].layers[name]
    found = tensors[f"{key}.lora_up.weight"].double() @ tensors[f"{key}.lora_down.weight"].double()
    wanted = layer.scaling * layer.B.double() @ layer.A.double()
    assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_sd3_has_its_names_and_the_last_contexts_halves_in_the_other_order():
    model = adapted(small_sd3().transformer, ["to_k", "norm1_context.linear", "ff.net.2"])
    tensors = host_state_dict({"transformer": to_lora(model, LEVEL, "toy")}, "comfyui", "sd3")

    def update(name: str) -> torch.Tensor:
        up, down = (tensors[f"diffusion_model.joint_blocks.{name}.lora_{x}.weight"].double() for x in "BA")
        return up @ down

    def dense(name: str) -> torch.Tensor:
        layer = model.get_submodule(f"transformer_blocks.{name}")
        A, B = (getattr(layer, f"lora_{x}")["toy"].weight.detach().double() for x in "AB")
        return layer.scaling["toy"] * B @ core_matrix(model, LEVEL, "toy")[0].detach().double() @ A

    k = dense("0.attn.to_k")
    zero = torch.zeros_like(k)
    torch.testing.assert_close(update("0.x_block.attn.qkv"), torch.cat([zero, k, zero]), rtol=1e-5, atol=1e-8)
    scale, shift = dense("1.norm1_context.linear").chunk(2)  # Diffusers' AdaLayerNormContinuous
    last = update("1.context_block.adaLN_modulation.1")
    torch.testing.assert_close(last, torch.cat([shift, scale]), rtol=1e-5, atol=1e-8)


def test_diffusers_reads_wans_own_names_back():
    model = adapted(denoiser("WanTransformer3DModel"), [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"])
    lora = {"transformer": to_lora(model, LEVEL, "toy")}
    read = WanPipeline.lora_state_dict(host_state_dict(lora, "comfyui", "wan"))
    again = host_state_dict(lora, "diffusers", "wan")
    assert read.keys() == again.keys()
    assert all(torch.equal(read[key], again[key]) for key in again)


NAMES = {
    "conv_in": "input_blocks.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": "input_blocks.8.1.transformer_blocks.9.ff.net.2",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block.1.transformer_blocks.9.ff.net.2",
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.attentions.2.proj_in": "output_blocks.5.1.proj_in",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
}
"""{Diffusers' name: that of files that kohya has written for SDXL}."""


def test_modules_of_unets_have_the_names_of_stabilitys_code():
    assert parts_of(NAMES, "sdxl") == {theirs: [own] for own, theirs in NAMES.items()}
    assert list(parts_of(["up_blocks.0.upsamplers.0.conv"], "sd15")) == ["output_blocks.2.1.conv"]  # no attention


@pytest.mark.parametrize(
    ("component", "module", "form", "base", "message"),
    [
        ("unet", "conv_in", "webui", "sdxl", "form is 'webui'"),
        ("unet", "conv_in", "kohya", "sd2", "base is 'sd2'"),
        ("prior", "conv_in", "kohya", "sdxl", "no keys for 'prior', expected the denoiser, text_encoder"),
        ("transformer", "conv_in", "kohya", "wan", "has no name in wan's original code"),
        ("unet", "up_blocks.0.attentions.0.proj_in", "comfyui", "sd15", "has attention in up blocks 1, 2, 3 alone"),
        ("unet", "mid_block.resnets.0.norm1", "comfyui", "sdxl", "is no module of Stable Diffusion's UNet"),
    ],
)
def test_what_a_file_cannot_express_is_refused_by_name(component, module, form, base, message):
    layer = PlainLoraLayer(torch.ones(2, 3), torch.ones(5, 2), 2.0, 2)
    with pytest.raises(ValueError, match=message):
        host_state_dict({component: PlainLora(LoraConfig(), {module: layer})}, form, base, 1)
