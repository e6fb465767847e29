"""`from_lora` on kohya's files, which ComfyUI and others write too: each layer is α / r · up · down, by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nara_diffusion import from_lora, to_lora
from tests.helpers.adapted import relative_error
from tests.helpers.exported import update_of
from tests.helpers.small_pipelines import small_flux, small_sd, small_sdxl

BLOCKS = 1  # layers_per_block of the small UNets

UNET = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.1.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
    "mid_block.attentions.0.proj_out",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
    "up_blocks.0.resnets.0.time_emb_proj",
]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj", "encoder.layers.1.mlp.fc1"]


def sgm_name(name: str) -> str:
    """The name of a module of the UNet in Stability's own code, for which kohya writes SDXL's files."""
    kinds = ["resnets", "attentions"]
    blocks = {"down_blocks": ("input_blocks", 1), "up_blocks": ("output_blocks", 0)}
    for ours, (theirs, first) in blocks.items():
        match = re.match(rf"{ours}\.(\d)\.(resnets|attentions)\.(\d)", name)
        if match:
            index = first + int(match[1]) * (BLOCKS + 1) + int(match[3])
            name = f"{theirs}.{index}.{kinds.index(match[2])}{name[match.end() :]}"
    name = name.replace("mid_block.attentions.0", "middle_block.1")
    return name.replace(".conv1", ".in_layers.2").replace(".time_emb_proj", ".emb_layers.1")


def kohya_name(name: str, sgm: bool) -> str:
    return "lora_unet_" + (sgm_name(name) if sgm else name).replace(".", "_")


def kohya_file(pipe: Any, *, sgm: bool, text: bool = True) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A file's tensors, and component → module → the update by hand, float64."""
    tensors: dict[str, Tensor] = {}
    updates: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    named = [("unet", name, kohya_name(name, sgm)) for name in UNET]
    if text:
        prefixes = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"} if sgm else {"text_encoder": "lora_te_"}
        for component, prefix in prefixes.items():
            named += [(component, name, prefix + f"text_model_{name}".replace(".", "_")) for name in TEXT]
    generator = torch.Generator().manual_seed(7)
    for index, (component, name, key) in enumerate(named):
        model = getattr(pipe, component)
        inner = name if not hasattr(model, "text_model") else f"text_model.{name}"
        weight = model.get_submodule(inner).weight
        rank, alpha = 2 + index % 3, 1.5 + index
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), rank, *(1,) * (weight.dim() - 2), generator=generator)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        updates[component][inner] = alpha / rank * up.double().flatten(1) @ down.double().flatten(1)
    return tensors, {component: found for component, found in updates.items() if found}


@pytest.mark.parametrize(
    ("make", "sgm", "text"),
    [(small_sdxl, True, True), (small_sdxl, True, False), (small_sdxl, False, False), (small_sd, False, True)],
    ids=["SDXL", "SDXL, UNet alone", "SDXL by Diffusers' names", "SD 1"],
)
def test_each_layer_of_the_file_is_there_with_its_own_alpha(tmp_path, make, sgm, text):
    pipe = make()
    tensors, updates = kohya_file(pipe, sgm=sgm, text=text)
    save_file(tensors, tmp_path / "style.safetensors", metadata={"ss_network_dim": "4"})
    from_lora(tmp_path / "style.safetensors", pipe)
    for component, expected in updates.items():
        model = getattr(pipe, component)
        lora = to_lora(model, 0.4)
        assert lora.layers.keys() == expected.keys()
        for name, update in expected.items():
            assert relative_error(update_of(model.get_submodule(name)), update) < 1e-6, name
            assert lora.layers[name].scaling == pytest.approx(model.get_submodule(name).scaling["default"])


def test_a_unet_alone_reads_its_file():
    pipe = small_sdxl()
    tensors, updates = kohya_file(pipe, sgm=True, text=False)
    from_lora(tensors, pipe.unet)
    for name, update in updates["unet"].items():
        assert relative_error(update_of(pipe.unet.get_submodule(name)), update) < 1e-6


def test_a_file_without_alphas_has_the_scale_one():
    pipe = small_sdxl()
    tensors, updates = kohya_file(pipe, sgm=True, text=False)
    from_lora({key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}, pipe)
    for index, (name, update) in enumerate(updates["unet"].items()):
        rank, alpha = 2 + index % 3, 1.5 + index
        assert relative_error(update_of(pipe.unet.get_submodule(name)), rank / alpha * update) < 1e-6


def comfyui_names(tensors: dict[str, Tensor], kinds: dict[str, str]) -> dict[str, Tensor]:
    """The file as ComfyUI names it: with dots, which kohya's names have lost."""
    dotted = {kohya_name(name, sgm=True): "diffusion_model." + sgm_name(name) for name in UNET}
    for prefix, encoder in (("lora_te1_", "clip_l"), ("lora_te2_", "clip_g")):
        for name in TEXT:
            inner = f"text_model.{name}"
            dotted[prefix + inner.replace(".", "_")] = f"text_encoders.{encoder}.transformer.{inner}"
    found = {}
    for key, tensor in tensors.items():
        name, _, kind = key.partition(".")
        found[f"{dotted[name]}.{kinds.get(kind, kind)}"] = tensor
    return found


@pytest.mark.parametrize(
    "kinds", [{}, {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}], ids=["up, down", "A, B"]
)
def test_comfyui_s_names_are_read(kinds):
    pipe = small_sdxl()
    tensors, updates = kohya_file(pipe, sgm=True)
    from_lora(comfyui_names(tensors, kinds), pipe)
    for component, expected in updates.items():
        model = getattr(pipe, component)
        assert to_lora(model, 0.4).layers.keys() == expected.keys()
        for name, update in expected.items():
            assert relative_error(update_of(model.get_submodule(name)), update) < 1e-6, name


@pytest.mark.parametrize("names", ["kohya", "ComfyUI", "ComfyUI, A and B"])
def test_fused_projections_of_flux_become_their_parts(names):
    pipe = small_flux()
    width = pipe.transformer.inner_dim
    tensors, updates = {}, {}
    for index, name in enumerate(("double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj")):
        down, up = torch.randn(4, width), torch.randn((3 - 2 * index) * width, 4)
        key = f"lora_unet_{name.replace('.', '_')}" if names == "kohya" else f"diffusion_model.{name}"
        A, B = ("lora_A", "lora_B") if "A and B" in names else ("lora_down", "lora_up")
        tensors |= {f"{key}.{A}.weight": down, f"{key}.{B}.weight": up, f"{key}.alpha": torch.tensor(3.0)}
        updates[name] = 3 / 4 * up.double() @ down.double()
    from_lora(tensors, pipe)
    attention = pipe.transformer.transformer_blocks[0].attn
    q, k, v = updates["double_blocks.0.img_attn.qkv"].chunk(3)
    parts = {"to_q": q, "to_k": k, "to_v": v, "to_out.0": updates["double_blocks.0.img_attn.proj"]}
    for name, update in parts.items():
        assert relative_error(update_of(attention.get_submodule(name)), update) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "lora_unet_mid_block_a.dora_scale": torch.ones(3)}, "a DoRA with kohya's or LyCORIS' keys"),
        (lambda t: {**t, "lora_unet_mid_block_a.lora_mid.weight": torch.ones(3, 3)}, "a key of a LyCORIS method"),
        (lambda t: {**t, "lora_unet_mid_block_a.alpha": torch.tensor(1.0)}, "is no LoRA that Diffusers reads"),
        (lambda t: {k: v for k, v in t.items() if "mid" not in k or "up" not in k}, "is no LoRA that Diffusers reads"),
        (lambda t: {k.replace("input_blocks_3", "input_blocks_9"): v for k, v in t.items()}, r"lacks|no LoRA that"),
    ],
    ids=["DoRA", "LoCon with a middle", "an alpha too many", "half a layer", "another model"],
)
def test_files_of_which_a_part_would_be_lost_are_refused(change, message):
    pipe = small_sdxl()
    tensors, _ = kohya_file(pipe, sgm=True)
    with pytest.raises(ValueError, match=message):
        from_lora(change(tensors), pipe)
    assert not any("lora" in name for name, _ in pipe.unet.named_modules())
