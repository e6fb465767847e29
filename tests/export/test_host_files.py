"""Files for other hosts: loaded back by Diffusers, pixel by pixel against the NaRA at its λ, and read by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file

from nara_command import main
from nara_diffusion import core_matrix, from_lora, noise_level, to_lora
from nara_diffusion.export import PlainLora, PlainLoraLayer, save_host_file
from nara_diffusion.export.host_files import host_state_dict
from nara_diffusion.export.original_names import parts_of
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.denoisers import denoiser
from tests.helpers.small_pipelines import MORE_ATTENTION, pixels, small_flux, small_sd, small_sd3, small_sdxl

LEVEL = 0.37
ATTENTION, CLIP = ["to_q", "to_k", "to_v", "to_out.0"], ["q_proj", "k_proj", "v_proj", "out_proj"]
MANY = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
MANY += ["conv_in", "conv_out"]
ATTENTION_AS_SD15 = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNEQUAL = {"rank_pattern": {"conv1": 3, "to_k": 3, "ff.net.2": 5}, "alpha_pattern": {"to_v": 7, "to_k": 5, "conv2": 2}}


def adapted(model: Any, targets: list[str], **changes: Any) -> Any:
    """The model with a disturbed NaRA, of small steps, so that pictures stay pictures."""
    model.add_adapter(nara_config(target_modules=targets, **changes), "toy")
    disturb(model, scale=0.2)
    return model


def with_encoders(pipe: Any, targets: list[str]) -> dict[str, PlainLora]:
    """LoRAs of unequal ranks, as NaRAs, on the text encoders of a pipeline, and what they are."""
    loras = {}
    for seed, name in enumerate(("text_encoder", "text_encoder_2")):
        encoder = getattr(pipe, name, None)
        if encoder is not None:
            config = nara_config(core_type="identity", target_modules=targets, rank_pattern={"(k_proj|q)": 3})
            inject_adapter_in_model(config, encoder, "toy")
            disturb(encoder, seed=seed)
            loras[name] = to_lora(encoder, adapter_name="toy")
    return loras


@pytest.mark.parametrize(
    ("make", "options", "words", "said"),
    [
        (partial(small_sd, **ATTENTION_AS_SD15), UNEQUAL, ["--form", "kohya", "--base", "sd15"], ""),
        pytest.param(small_sdxl, UNEQUAL, ["--form", "kohya", "--base", "sdxl"], "", marks=pytest.mark.slow),
        (small_sdxl, UNEQUAL | {"use_dora": True}, [], "; not for ComfyUI, which reads no DoRA"),
    ],
    ids=["SD 1.5, kohya", "SDXL of one layer a block, kohya", "SDXL with DoRA, Diffusers"],
)
def test_diffusers_draws_folded_files_as_the_nara(make, options, words, said, tmp_path, capsys):
    """(Kohya's files of SDXL with two layers a block, and FLUX's, are in tests/acceptance.)"""
    more = MORE_ATTENTION if "sdxl" in words else {}  # whose names kohya's form translates
    pipe, other = make(**more), make(**more)
    with_encoders(pipe, CLIP)
    unet = adapted(pipe.unet, MANY, **options)
    pipe.save_nara_weights(tmp_path, adapter_name="toy")
    path = tmp_path / "new" / "lora.safetensors"
    main(["fold", str(tmp_path), str(path), "--noise_level", str(LEVEL), *words])
    assert f"λ = {LEVEL}{said}" in capsys.readouterr().out
    with noise_level(unet, LEVEL):
        expected = pixels(pipe)
    original = pixels(other)
    other.load_lora_weights(path)
    torch.testing.assert_close(pixels(other), expected, rtol=1e-4, atol=5e-5)
    assert (original - expected).abs().max() > 0.02


def test_text_encoders_names_are_read_by_every_program(tmp_path: Path):
    """Transformers 5 leaves `text_model` out of the names of CLIP, and Diffusers before 0.38 needs it."""
    pipe = small_sdxl()
    tensors = host_state_dict(with_encoders(pipe, CLIP), "diffusers", "sdxl")
    layers = [f"text_model.encoder.layers.{i}.self_attn.{name}" for i in range(2) for name in CLIP]
    names = {f"{component}.{name}" for component in ("text_encoder", "text_encoder_2") for name in layers}
    assert tensors.keys() == {f"{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    save_file(
        {key.replace("text_model.", ""): tensor for key, tensor in tensors.items()}, tmp_path / "lora.safetensors"
    )
    read = from_lora(tmp_path / "lora.safetensors", small_sdxl())
    torch.testing.assert_close(pixels(read), pixels(pipe), rtol=1e-4, atol=5e-5)
    t5 = {"text_encoder_2": with_encoders(small_flux(), ["k_proj", "SelfAttention.q"])["text_encoder_2"]}
    key = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
    assert key in host_state_dict(t5, "diffusers", "flux")


def test_sd3_swaps_the_last_contexts_halves():
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
    first = update("0.context_block.adaLN_modulation.1")
    torch.testing.assert_close(first, dense("0.norm1_context.linear"), rtol=1e-5, atol=1e-8)
    scale, shift = dense("1.norm1_context.linear").chunk(2)  # Diffusers' AdaLayerNormContinuous
    last = update("1.context_block.adaLN_modulation.1")
    torch.testing.assert_close(last, torch.cat([shift, scale]), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_sd3_text_encoders_have_sdxls_names(form: str):
    loras = with_encoders(small_sd3(), CLIP)
    tensors = host_state_dict(loras, form, "sd3")
    for index, lora in enumerate(loras.values(), start=1):
        for name, layer in lora.layers.items():
            module = f"text_model.{name.removeprefix('text_model.')}".replace(".", "_")
            A, B, alpha = (
                tensors.pop(f"lora_te{index}_{module}.{key}") for key in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            update, expected = alpha / len(A) * B @ A, layer.scaling * layer.B @ layer.A
            torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-7)
    assert not tensors


def test_flux_mlp_takes_its_matrixs_last_rows():
    rank, width = 2, 3
    layer = PlainLoraLayer(torch.ones(rank, width), torch.ones(4 * width, rank), 2.0, rank)
    lora = PlainLora(LoraConfig(), {"single_transformer_blocks.0.proj_mlp": layer})
    tensors = host_state_dict({"transformer": lora}, "comfyui", "flux")
    B = tensors["diffusion_model.single_blocks.0.linear1.lora_B.weight"]
    assert torch.equal(B, torch.cat([torch.zeros(3 * width, rank), layer.B]))


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


def test_unet_modules_have_stabilitys_names():
    assert parts_of(NAMES, "sdxl") == {theirs: [ours] for ours, theirs in NAMES.items()}
    names = ["up_blocks.0.upsamplers.0.conv", "up_blocks.0.resnets.2.conv1"]
    assert next(iter(parts_of(names, "sd15"))) == "output_blocks.2.1.conv"  # no attention


def test_layers_per_block_are_read_from_modules():
    one = ["down_blocks.1.resnets.0.conv1", "up_blocks.1.resnets.1.conv1"]
    assert list(parts_of(one, "sdxl")) == ["input_blocks.3.0.in_layers.2", "output_blocks.3.0.in_layers.2"]
    first = ["up_blocks.0.attentions.0.proj_in", "up_blocks.0.attentions.1.proj_in"]  # of either UNet
    assert list(parts_of(first, "sdxl")) == ["output_blocks.0.1.proj_in", "output_blocks.1.1.proj_in"]
    with pytest.raises(ValueError, match=r"down_blocks\.1\.resnets\.0\.conv1.* number of layers .*diffusers"):
        parts_of(one[:1], "sdxl")
    with pytest.raises(ValueError, match=r"up_blocks\.1\.attentions\.0\.proj_in.* number of layers"):
        parts_of(["up_blocks.1.attentions.0.proj_in"], "sdxl")  # no down block shows a layer


NOT_IN = "is adapted, but {} has no such module"
REFUSED: list[tuple[str, str, dict[str, Any], str, str, str]] = [
    ("unet", "conv_in", {}, "webui", "sdxl", "form is 'webui'"),
    ("unet", "conv_in", {}, "kohya", "sd2", "base is 'sd2'"),
    ("prior", "conv_in", {}, "kohya", "sdxl", "no keys for 'prior', only for"),
    ("transformer", "conv_in", {}, "kohya", "wan", "has no name in wan's original code"),
    ("unet", "up_blocks.0.attentions.0.proj_in", {}, "comfyui", "sd15", NOT_IN.format("sd15")),
    ("unet", "up_blocks.0.attentions.0.proj_in", {}, "kohya", "sd15", NOT_IN.format("sd15")),
    ("unet", "mid_block.attentions.0.transformer_blocks.1.ff.net.2", {}, "kohya", "sd15", NOT_IN.format("sd15")),
    ("unet", "add_embedding.linear_1", {}, "kohya", "sd15", NOT_IN.format("sd15")),
    ("transformer", "transformer_blocks.0.attn.to_q", {}, "kohya", "sd15", "is not a module of Stable Diffusion"),
    ("unet", "down_blocks.0.attentions.0.proj_in", {}, "kohya", "sdxl", NOT_IN.format("sdxl")),
    ("unet", "up_blocks.2.attentions.0.proj_in", {}, "comfyui", "sdxl", NOT_IN.format("sdxl")),
    ("unet", "up_blocks.3.resnets.0.conv1", {}, "comfyui", "sdxl", NOT_IN.format("sdxl")),
    ("transformer", "transformer_blocks.19.attn.to_q", {}, "kohya", "flux", NOT_IN.format("flux")),
    ("transformer", "single_transformer_blocks.0.attn.to_q", {}, "kohya", "sd3", "has no name in sd3's original code"),
    ("unet", "mid_block.resnets.0.norm1", {}, "comfyui", "sdxl", "is not a module of Stable Diffusion"),
    (
        "unet",
        "conv_in",
        {"B": torch.ones(5, 1)},
        "diffusers",
        "sdxl",
        "is a grouped convolution, which files",
    ),
    ("unet", "conv_in", {"is_embedding": True}, "diffusers", "sdxl", "is an embedding, which files for other programs"),
    # ComfyUI: (W0 + ΔW) m / ‖W0‖ by row; A1111: by column; DoRA: (W0 + ΔW) m / ‖W0 + ΔW‖ by row
    ("text_encoder", "q_proj", {"magnitude": torch.ones(5)}, "comfyui", "sdxl", "DoRA.* --form diffusers or --form p"),
]


def test_inexpressible_layers_are_refused(tmp_path: Path):
    layer = PlainLoraLayer(torch.ones(2, 3), torch.ones(5, 2), 2.0, 2)
    for component, module, change, form, base, message in REFUSED:
        loras = {component: PlainLora(LoraConfig(), {module: replace(layer, **change)})}
        with pytest.raises(ValueError, match=message):
            save_host_file(loras, tmp_path / "lora.safetensors", form, base)
    loras = {"unet": PlainLora(LoraConfig(), {"conv_in": layer}, others={"conv_in.bias": torch.ones(5)})}
    with pytest.raises(ValueError, match=r"more than LoRA factors \(conv_in\.bias\)"):
        save_host_file(loras, tmp_path / "lora.safetensors", "diffusers", "sdxl")
    with pytest.raises(OSError, match=r"can't be written: .*directory"):
        save_host_file({}, tmp_path, "diffusers", "sdxl")
    assert not list(tmp_path.iterdir())
