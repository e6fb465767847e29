"""Names of the UNet's modules in Stability's code: by walking over the blocks as they are called, and by Diffusers."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as to_diffusers
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers as to_blocks
from torch import nn

from nara_diffusion.export.hosts.unet import SD15, SDXL, stability_name

ADAPTABLE = (nn.Linear, nn.Conv2d)
CONFIGS = {
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sd15": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
}
LAYOUTS = {"sdxl": SDXL, "sd15": SD15}


def unet(base: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[base])


def _walked(model: UNet2DConditionModel) -> dict[nn.Module, str]:
    """{module: its name there}, from the order in which the blocks are called."""
    found: dict[nn.Module, str] = {}
    inside = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
    inside["conv_shortcut"] = "skip_connection"

    def add(module, name, resnet=False):
        for path, child in module.named_modules():
            if isinstance(child, ADAPTABLE):
                found[child] = ".".join(filter(None, (name, inside[path] if resnet else path)))

    add(model.conv_in, "input_blocks.0.0")
    number = 1
    for block in model.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            add(resnet, f"input_blocks.{number}.0", resnet=True)
            if attention is not None:
                add(attention, f"input_blocks.{number}.1")
            number += 1
        if block.downsamplers:
            found[block.downsamplers[0].conv] = f"input_blocks.{number}.0.op"
            number += 1
    for place, module in enumerate(
        [model.mid_block.resnets[0], model.mid_block.attentions[0], model.mid_block.resnets[1]]
    ):
        add(module, f"middle_block.{place}", resnet=place != 1)
    number = 0
    for block in model.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for index, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            parts = [resnet, *([attention] if attention is not None else [])]
            for place, part in enumerate(parts):
                add(part, f"output_blocks.{number}.{place}", resnet=place == 0)
            if index == len(block.resnets) - 1 and block.upsamplers:
                found[block.upsamplers[0].conv] = f"output_blocks.{number}.{len(parts)}.conv"
            number += 1
    found[model.conv_out] = "out.2"
    for index, place in ((1, 0), (2, 2)):
        found[getattr(model.time_embedding, f"linear_{index}")] = f"time_embed.{place}"
        if hasattr(model, "add_embedding"):
            found[getattr(model.add_embedding, f"linear_{index}")] = f"label_emb.0.{place}"
    return found


@pytest.mark.parametrize("base", CONFIGS)
def test_names_are_those_of_the_blocks_in_their_order(base):
    model = unet(base)
    walked = _walked(model)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    names = {name: stability_name(name, LAYOUTS[base]) for name in modules}
    assert names == {name: walked[module] for name, module in modules.items()}
    assert len(set(names.values())) == len(names)


def test_diffusers_reads_the_names_of_sdxl_back():
    model = unet("sdxl")
    names = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    tensors = {}
    for index, name in enumerate(names):
        key = f"lora_unet_{stability_name(name, SDXL).replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = tensors[f"{key}.lora_up.weight"] = torch.tensor(float(index))
    read, _ = to_diffusers(to_blocks(dict(tensors), model.config))
    back = {int(value): key for key, value in read.items() if "down" in key.rpartition("lora")[2]}
    for index, name in enumerate(names):
        key = back[index].removeprefix("unet.").replace(".processor", "").replace("_lora.down.weight", "")
        assert key.replace(".lora.down.weight", "").replace("to_out", "to_out.0") == name


@pytest.mark.parametrize(
    ("kohya", "name"),
    [
        (
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("input_blocks.8.1.transformer_blocks.9.ff.net.2", "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2"),
        ("input_blocks.6.0.op", "down_blocks.1.downsamplers.0.conv"),
        ("middle_block.1.proj_in", "mid_block.attentions.0.proj_in"),
        ("middle_block.2.in_layers.2", "mid_block.resnets.1.conv1"),
        ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.1.proj_out", "up_blocks.1.attentions.2.proj_out"),
        ("output_blocks.8.0.skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("label_emb.0.2", "add_embedding.linear_2"),
    ],
)
def test_names_of_files_that_kohya_has_written_for_sdxl(kohya, name):
    assert stability_name(name, SDXL) == kohya


@pytest.mark.parametrize(
    "name", ["transformer_blocks.0.attn.to_q", "down_blocks.0.motion_modules.0.proj_in", "mid_block.resnets.0.norm1"]
)
def test_module_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match="Stable Diffusion's UNet"):
        stability_name(name, SDXL)
