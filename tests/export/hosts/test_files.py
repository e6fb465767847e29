"""Files for other hosts: loaded back by Diffusers, pixel by pixel against the NaRA at its λ, and read by hand."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from peft import inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from nara_diffusion import core_matrix, from_lora, noise_level, to_lora
from nara_diffusion.export.hosts import host_state_dict, save_host_file
from nara_diffusion.export.hosts.unet import UNetLayout, stability_name
from tests.helpers.adapted import disturb, lora_config, nara_config
from tests.helpers.denoisers.models import denoiser
from tests.helpers.small_pipelines import pixels, small_flux, small_sd, small_sd3, small_sdxl

LEVEL = 0.37
SMALL = UNetLayout(1, (0,))
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MANY = [
    *ATTENTION,
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "conv_in",
    "conv_out",
]
UNEQUAL = {"rank_pattern": {"conv1": 3, "to_k": 3, "ff.net.2": 5}, "alpha_pattern": {"to_v": 7, "to_k": 5, "conv2": 2}}


def adapted(model: nn.Module, targets, **changes):
    """The model with a disturbed NaRA, of small steps, so that pictures stay pictures."""
    model.add_adapter(nara_config(target_modules=targets, **changes), "toy")
    disturb(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.2
    return model


def with_encoders(pipe, targets=("q_proj", "k_proj", "v_proj", "out_proj")):
    """Plain LoRAs of unequal ranks on the text encoders of a pipeline, and what they are.

    (Diffusers reads of kohya's form all four of attention, or fc1 and fc2, and of both together the latter alone.)
    """
    loras = {}
    for seed, name in enumerate(("text_encoder", "text_encoder_2")):
        encoder = getattr(pipe, name, None)
        if encoder is None:
            continue
        config = lora_config(target_modules=list(targets), rank_pattern={"k_proj": 3}, alpha_pattern={"k_proj": 5})
        inject_adapter_in_model(config, encoder, "toy")
        disturb(encoder, seed)
        loras[name] = to_lora(encoder, adapter_name="toy")
    return loras


def at_level(pipe, component, **call):
    with noise_level(getattr(pipe, component), LEVEL):
        return pixels(pipe, **call)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize(("make", "base"), [(small_sdxl, "sdxl"), (small_sd, "sd15")])
def test_diffusers_draws_the_same_pixels_from_the_file(tmp_path, make, base, form):
    pipe = make()
    unet = adapted(pipe.unet, MANY, **UNEQUAL)
    loras = with_encoders(pipe)
    wanted = at_level(pipe, "unet")
    save_host_file({"unet": to_lora(unet, LEVEL, "toy"), **loras}, tmp_path / "toy.safetensors", form, base, SMALL)
    other = make()
    before = pixels(other)
    other.load_lora_weights(tmp_path / "toy.safetensors")
    torch.testing.assert_close(pixels(other), wanted, rtol=1e-4, atol=2e-5)
    assert (before - wanted).abs().max() > 0.02


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_draws_the_same_pixels_from_a_file_of_flux(tmp_path, form):
    pipe = small_flux()
    blocks = [
        f"transformer_blocks.0.attn.{x}" for x in (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ]
    blocks += [
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.ff_context.net.2",
        "single_transformer_blocks.0.proj_out",
    ]
    adapted(pipe.transformer, [*blocks, "transformer_blocks.0.norm1.linear"])
    wanted = at_level(pipe, "transformer")
    save_host_file({"transformer": to_lora(pipe.transformer, LEVEL, "toy")}, tmp_path / "toy.safetensors", form, "flux")
    other = small_flux()
    before = pixels(other)
    other.load_lora_weights(tmp_path / "toy.safetensors")
    torch.testing.assert_close(pixels(other), wanted, rtol=1e-4, atol=2e-5)
    assert (before - wanted).abs().max() > 0.02


def test_text_encoders_have_kohyas_names_and_all_of_their_updates():
    loras = with_encoders(small_sdxl(), targets=("k_proj", "fc2"))
    found = updates(host_state_dict(loras, "kohya", "sdxl", SMALL), "kohya")
    for prefix, component in (("lora_te1", "text_encoder"), ("lora_te2", "text_encoder_2")):
        for name, layer in loras[component].layers.items():
            whole = name if name.startswith("text_model.") else f"text_model.{name}"
            update = layer.scaling * layer.B.double() @ layer.A.double()
            torch.testing.assert_close(found.pop(f"{prefix}_{whole.replace('.', '_')}"), update, rtol=1e-5, atol=1e-7)
    assert not found
    assert "lora_te1_text_model_encoder_layers_1_mlp_fc2.alpha" in host_state_dict(loras, "kohya", "sdxl", SMALL)
    assert "lora_te_text_model_encoder_layers_1_mlp_fc2.alpha" in host_state_dict(
        {"text_encoder": loras["text_encoder"]}, "kohya", "sd15", SMALL
    )


def updates(tensors, form):
    """{name in the file: ΔW (d_out, …)} in float64, by the rules that hosts follow."""
    found = {}
    if form == "comfyui":
        for key, down in tensors.items():
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                found[name] = tensors[f"{name}.lora_B.weight"].double().flatten(1) @ down.double().flatten(1)
    else:
        for key, down in tensors.items():
            if key.endswith(".lora_down.weight"):
                name = key.removesuffix(".lora_down.weight")
                scale = tensors[f"{name}.alpha"].item() / len(down)
                found[name] = scale * tensors[f"{name}.lora_up.weight"].double().flatten(1) @ down.double().flatten(1)
    return found


def dense(model, name):
    """ΔW (d_out, …) of a module at LEVEL, by its definition."""
    layer = model.get_submodule(name)
    with torch.no_grad():
        C = core_matrix(model, LEVEL, "toy")[0].double()
        A, B = (getattr(layer, f"lora_{x}")["toy"].weight.double().flatten(1) for x in "AB")
        return layer.scaling["toy"] * B @ C @ A


@pytest.mark.parametrize(("form", "prefix"), [("comfyui", "diffusion_model."), ("kohya", "lora_unet_")])
def test_flux_has_the_three_projections_in_one_matrix(form, prefix):
    model = adapted(small_flux().transformer, ["to_q", "to_v", "add_k_proj", "proj_mlp"])
    tensors = host_state_dict({"transformer": to_lora(model, LEVEL, "toy")}, form, "flux")
    found = updates(tensors, form)
    join = (lambda name: name) if form == "comfyui" else (lambda name: name.replace(".", "_"))
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
    parts = {
        "double_blocks.0.img_attn.qkv": [f"{double}.to_q", None, f"{double}.to_v"],
        "double_blocks.0.txt_attn.qkv": [None, f"{double}.add_k_proj", None],
        "single_blocks.0.linear1": [f"{single}.attn.to_q", None, f"{single}.attn.to_v", f"{single}.proj_mlp"],
    }
    assert found.keys() == {prefix + join(name) for name in parts}
    for name, sources in parts.items():
        wanted = [
            torch.zeros(32, dense(model, sources[1] or sources[0]).shape[1]).double() if s is None else dense(model, s)
            for s in sources
        ]
        torch.testing.assert_close(found[prefix + join(name)], torch.cat(wanted), rtol=1e-5, atol=1e-8)


def test_sd3_has_its_names_and_the_last_contexts_halves_in_the_other_order():
    model = adapted(small_sd3().transformer, ["to_k", "norm1_context.linear", "ff.net.2"])
    found = updates(host_state_dict({"transformer": to_lora(model, LEVEL, "toy")}, "comfyui", "sd3"), "comfyui")
    k = dense(model, "transformer_blocks.0.attn.to_k")
    zero = torch.zeros_like(k)
    torch.testing.assert_close(found["diffusion_model.joint_blocks.0.x_block.attn.qkv"], torch.cat([zero, k, zero]))
    modulation = "diffusion_model.joint_blocks.{}.context_block.adaLN_modulation.1"
    first, last = (dense(model, f"transformer_blocks.{i}.norm1_context.linear") for i in (0, 1))
    torch.testing.assert_close(found[modulation.format(0)], first, rtol=1e-5, atol=1e-8)
    scale, shift = last.chunk(2)  # Diffusers' AdaLayerNormContinuous; shift comes first in SD3's own code
    torch.testing.assert_close(found[modulation.format(1)], torch.cat([shift, scale]), rtol=1e-5, atol=1e-8)


def test_diffusers_reads_wans_own_names_back():
    targets = [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"]
    model = adapted(denoiser("WanTransformer3DModel"), targets)
    lora = to_lora(model, LEVEL, "toy")
    tensors = host_state_dict({"transformer": lora}, "comfyui", "wan")
    assert all(key.startswith("diffusion_model.blocks.") for key in tensors)
    read = WanPipeline.lora_state_dict(dict(tensors))
    again = host_state_dict({"transformer": lora}, "diffusers", "wan")
    assert read.keys() == again.keys()
    assert all(torch.equal(read[key], again[key]) for key in again)


def test_scale_is_in_up_so_that_alpha_is_the_rank(tmp_path):
    unet = adapted(small_sdxl().unet, ["to_q"], lora_alpha=7)
    lora = to_lora(unet, LEVEL, "toy")
    path = tmp_path / "deeper" / "toy.safetensors"
    path.parent.mkdir()
    save_host_file({"unet": lora}, path, "kohya", "sdxl", SMALL)
    tensors = load_file(path)
    assert {value.item() for key, value in tensors.items() if key.endswith("alpha")} == {4.0}
    up = tensors["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_up.weight"]
    layer = lora.layers["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    torch.testing.assert_close(up, layer.B * 7 / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("make", "base"), [(small_sdxl, "sdxl"), (small_sd, "sd15")])
def test_layers_of_unequal_ranks_share_one_alpha_of_their_component(make, base, dtype):
    pipe = make()
    unet = adapted(pipe.unet, MANY, **UNEQUAL)
    unet_lora, encoders = to_lora(unet, LEVEL, "toy"), with_encoders(pipe)
    loras = {component: in_dtype(lora, dtype) for component, lora in {"unet": unet_lora, **encoders}.items()}
    tensors = host_state_dict(loras, "kohya", base, SMALL)
    for component in ("lora_unet_", "lora_te"):
        alphas = {value.item() for key, value in tensors.items() if key.startswith(component) and "alpha" in key}
        assert alphas == {3.0}
    assert {value.dtype for key, value in tensors.items() if "alpha" not in key} == {dtype}
    found = updates(tensors, "kohya")
    for name, layer in unet_lora.layers.items():
        own = stability_name(name, SMALL) if base == "sdxl" else name
        wanted = layer.alpha / layer.rank * layer.B.double().flatten(1) @ layer.A.double().flatten(1)
        assert (found["lora_unet_" + own.replace(".", "_")] - wanted).norm() < 0.01 * wanted.norm()


def in_dtype(lora, dtype):
    """The LoRA with its factors in another dtype."""
    layers = {name: replace(layer, A=layer.A.to(dtype), B=layer.B.to(dtype)) for name, layer in lora.layers.items()}
    return replace(lora, layers=layers)


def test_from_lora_reads_a_file_of_unequal_ranks(tmp_path):
    pipe = small_sdxl()
    unet = adapted(pipe.unet, MANY, **UNEQUAL)
    encoders = with_encoders(pipe)
    save_host_file(
        {"unet": to_lora(unet, LEVEL, "toy"), **encoders}, tmp_path / "toy.safetensors", "kohya", "sdxl", SMALL
    )
    other = small_sdxl()
    from_lora(tmp_path / "toy.safetensors", other)
    torch.testing.assert_close(pixels(other), at_level(pipe, "unet"), rtol=1e-4, atol=2e-5)


def refused(message, loras, form="kohya", base="sdxl"):
    with pytest.raises(ValueError, match=message):
        host_state_dict(loras, form, base, SMALL)


def test_what_a_file_cannot_express_is_refused_by_name():
    unet = adapted(small_sdxl().unet, ["ff.net.2"], lora_bias=True)
    lora = to_lora(unet, LEVEL, "toy")
    refused("ff.net.2' has a bias of B", {"unet": lora})
    encoder = small_sdxl().text_encoder
    inject_adapter_in_model(lora_config(target_modules=["token_embedding"]), encoder, "toy")
    refused(
        "'embeddings.token_embedding' is an embedding|token_embedding' is an embedding",
        {"text_encoder": to_lora(encoder, adapter_name="toy")},
    )
    plain = to_lora(adapted(small_sdxl().unet, ["to_q"]), LEVEL, "toy")
    refused("form is 'webui', expected one of diffusers, kohya, comfyui", {"unet": plain}, form="webui")
    refused("base is 'sd2', expected one of sd15, sdxl, sd3, flux, wan", {"unet": plain}, base="sd2")
    refused("no keys for 'prior', expected the denoiser, text_encoder, text_encoder_2", {"prior": plain})
    refused("has no name in Wan's original code", {"transformer": plain}, base="wan")


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
@pytest.mark.parametrize(("base", "attention"), [("sd15", "1, 2, 3"), ("sdxl", "0, 1")])
def test_an_adapter_of_another_unet_is_refused(form, base, attention):
    lora = to_lora(adapted(small_sdxl().unet, ["to_q"]), LEVEL, "toy")
    block = 0 if base == "sd15" else 3
    layers = {name.replace("up_blocks.0", f"up_blocks.{block}"): layer for name, layer in lora.layers.items()}
    with pytest.raises(
        ValueError, match=rf"up_blocks\.{block}\..*, but {base}'s UNet has attention in up blocks {attention}"
    ):
        host_state_dict({"unet": replace(lora, layers=layers)}, form, base)


def test_a_file_in_a_new_folder_is_written_and_a_folder_is_not_overwritten(tmp_path):
    lora = to_lora(adapted(small_sdxl().unet, ["to_q"]), LEVEL, "toy")
    path = tmp_path / "new" / "deeper" / "toy.safetensors"
    save_host_file({"unet": lora}, path, "kohya", "sdxl", SMALL)
    assert load_file(path)
    with pytest.raises(ValueError, match="is a folder: name a file"):
        save_host_file({"unet": lora}, tmp_path / "new", "kohya", "sdxl", SMALL)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["new"]
