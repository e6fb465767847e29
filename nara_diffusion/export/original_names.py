"""Names of modules in the models' original code, which kohya's files and ComfyUI use, for Diffusers' names.

FLUX and SD3 have q, k and v fused in one matrix there. Its LoRA is block-diagonal and exact:

    [ΔW_q; ΔW_k; ΔW_v] = diag(up_q, up_k, up_v) · [down_q; down_k; down_v]

Stability's UNets (SD 1.5, SDXL), with n layers in each down block and n + 1 in each up block:

    down_blocks.i.resnets.j       input_blocks.(1 + i(n+1) + j).0, and .1 for attentions
    down_blocks.i.downsamplers.0  input_blocks.((i+1)(n+1)).0.op
    mid_block                     middle_block.0, .1, .2
    up_blocks.i.resnets.j         output_blocks.(i(n+1) + j).0, and .1 for attentions
    up_blocks.i.upsamplers.0      output_blocks.(i(n+1) + n).1.conv, 2 in place of 1 behind an attention
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from .plain_lora import PlainLoraLayer

MLP_RATIO = 4  # of FLUX: proj_mlp has four times the rows of q

_FLUX = {
    "double_blocks.*.img_attn.qkv": [f"transformer_blocks.*.attn.to_{x}" for x in "qkv"],
    "double_blocks.*.txt_attn.qkv": [f"transformer_blocks.*.attn.add_{x}_proj" for x in "qkv"],
    "single_blocks.*.linear1": (
        *(f"single_transformer_blocks.*.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.*.proj_mlp",
    ),
    "double_blocks.*.img_attn.proj": ["transformer_blocks.*.attn.to_out.0"],
    "double_blocks.*.txt_attn.proj": ["transformer_blocks.*.attn.to_add_out"],
    "double_blocks.*.img_mlp.0": ["transformer_blocks.*.ff.net.0.proj"],
    "double_blocks.*.img_mlp.2": ["transformer_blocks.*.ff.net.2"],
    "double_blocks.*.txt_mlp.0": ["transformer_blocks.*.ff_context.net.0.proj"],
    "double_blocks.*.txt_mlp.2": ["transformer_blocks.*.ff_context.net.2"],
    "double_blocks.*.img_mod.lin": ["transformer_blocks.*.norm1.linear"],
    "double_blocks.*.txt_mod.lin": ["transformer_blocks.*.norm1_context.linear"],
    "single_blocks.*.linear2": ["single_transformer_blocks.*.proj_out"],
    "single_blocks.*.modulation.lin": ["single_transformer_blocks.*.norm.linear"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
}
_SD3 = {
    "joint_blocks.*.x_block.attn.qkv": [f"transformer_blocks.*.attn.to_{x}" for x in "qkv"],
    "joint_blocks.*.context_block.attn.qkv": [
        f"transformer_blocks.*.attn.add_{x}_proj" for x in "qkv"
    ],
    "joint_blocks.*.x_block.attn2.qkv": [f"transformer_blocks.*.attn2.to_{x}" for x in "qkv"],
    "joint_blocks.*.x_block.attn.proj": ["transformer_blocks.*.attn.to_out.0"],
    "joint_blocks.*.context_block.attn.proj": ["transformer_blocks.*.attn.to_add_out"],
    "joint_blocks.*.x_block.attn2.proj": ["transformer_blocks.*.attn2.to_out.0"],
    "joint_blocks.*.x_block.mlp.fc1": ["transformer_blocks.*.ff.net.0.proj"],
    "joint_blocks.*.x_block.mlp.fc2": ["transformer_blocks.*.ff.net.2"],
    "joint_blocks.*.context_block.mlp.fc1": ["transformer_blocks.*.ff_context.net.0.proj"],
    "joint_blocks.*.context_block.mlp.fc2": ["transformer_blocks.*.ff_context.net.2"],
    "joint_blocks.*.x_block.adaLN_modulation.1": ["transformer_blocks.*.norm1.linear"],
    "joint_blocks.*.context_block.adaLN_modulation.1": [
        "transformer_blocks.*.norm1_context.linear"
    ],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
}
_WAN = {
    **{f"blocks.*.self_attn.{x}": [f"blocks.*.attn1.to_{x}"] for x in "qkv"},
    "blocks.*.self_attn.o": ["blocks.*.attn1.to_out.0"],
    **{f"blocks.*.cross_attn.{x}": [f"blocks.*.attn2.to_{x}"] for x in "qkv"},
    "blocks.*.cross_attn.o": ["blocks.*.attn2.to_out.0"],
    **{f"blocks.*.cross_attn.{x}_img": [f"blocks.*.attn2.add_{x}_proj"] for x in "kv"},
    "blocks.*.ffn.0": ["blocks.*.ffn.net.0.proj"],
    "blocks.*.ffn.2": ["blocks.*.ffn.net.2"],
    "time_projection.1": ["condition_embedder.time_proj"],
    "time_embedding.0": ["condition_embedder.time_embedder.linear_1"],
    "time_embedding.2": ["condition_embedder.time_embedder.linear_2"],
    "text_embedding.0": ["condition_embedder.text_embedder.linear_1"],
    "text_embedding.2": ["condition_embedder.text_embedder.linear_2"],
    "head.head": ["proj_out"],
}
_TABLES = {"flux": _FLUX, "sd3": _SD3, "wan": _WAN}
"""{base: {matrix of the original code: Diffusers' modules in it, from top to bottom}}."""
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
UNETS = {"sd15": (1, 2, 3), "sdxl": (0, 1)}
"""{base with a UNet: the up blocks that have attention}."""


def parts_of(names: Collection[str], base: str) -> dict[str, list[str | None]]:
    """{name in the original code: the modules that the matrix holds, from top to bottom, None for one not in `names`}.

    Args:
        names: of a denoiser's modules in Diffusers. base: "sd15", "sdxl", "flux", "sd3" or "wan".

    Raises:
        ValueError: a module that has no name there, or that the UNet of `base` doesn't have; modules that don't show
            how many layers each block of their UNet has, where the names depend on it.
    """
    if base in UNETS:
        layers_per_block = _layers_per_block(names, base)
        return {_of_unet(name, base, layers_per_block): [name] for name in names}
    found: dict[str, list[str | None]] = {}
    for name in names:
        pattern, block = (
            re.sub(r"blocks\.\d+\.", "blocks.*.", name, count=1),
            re.search(r"blocks\.(\d+)\.", name),
        )
        entry = next((entry for entry in _TABLES[base].items() if pattern in entry[1]), None)
        if entry is None:
            raise ValueError(
                f"'{name}' has no name in {base}'s original code: save the adapter for Diffusers or PEFT, or choose "
                "the base that it is for."
            )
        other, *own = (
            each.replace("*", block[1]) if block else each for each in (entry[0], *entry[1])
        )
        found[other] = [part if part in names else None for part in own]
    return found


def original_layers(layers: Mapping[str, PlainLoraLayer], base: str) -> dict[str, PlainLoraLayer]:
    """{name in the original code: factors} of layers by Diffusers' names whose scale is 1; see `parts_of`."""
    found = {}
    for other, parts in parts_of(layers, base).items():
        own = _fused([None if part is None else layers[part] for part in parts])
        if (
            base == "sd3"
            and other.endswith("context_block.adaLN_modulation.1")
            and len(own.B) == 2 * own.A.shape[1]
        ):
            # of the last block: scale and shift in Diffusers, shift and scale here
            own = replace(own, B=torch.cat(own.B.chunk(2)[::-1]))
        found[other] = own
    return found


def _fused(parts: Sequence[PlainLoraLayer | None]) -> PlainLoraLayer:
    """Stack the parts of one matrix from top to bottom; the ΔW of a part without a LoRA is zero."""
    present = [part for part in parts if part is not None]
    if len(parts) == 1:
        return present[0]
    width = (
        next((len(part.B) for part in parts[:3] if part is not None), 0)
        or len(present[0].B) // MLP_RATIO
    )
    sizes, rank = (
        [width] * 3 + [MLP_RATIO * width] * (len(parts) - 3),
        sum(part.rank for part in present),
    )
    B = present[0].B.new_zeros(sum(sizes), rank)
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            B[row : row + size, column : column + part.rank] = part.B
            column += part.rank
        row += size
    return PlainLoraLayer(torch.cat([part.A for part in present]), B, rank, rank)


def _layers_per_block(names: Collection[str], base: str) -> int:
    """The number of layers in each down block: up blocks have one more, and the released UNets have two."""
    down, up = _number_of_layers(names, "down"), _number_of_layers(names, "up")
    least = max(down, up - 1, 1)
    if least > 1 or 0 < down == up - 1:
        return least
    for name in names:
        if _of_unet(name, base, 1) != _of_unet(name, base, 2):
            raise ValueError(
                f"The adapter doesn't show how many layers each block of its UNet has, one or two. The name of "
                f"'{name}' in {base}'s original code depends on it: use the form diffusers, which needs no such name."
            )
    return least


def _number_of_layers(names: Collection[str], side: str) -> int:
    """The number of layers that the blocks of one side, "down" or "up", have at least."""
    layer = re.compile(rf"{side}_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.")
    matches = map(layer.match, names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _of_unet(name: str, base: str, layers_per_block: int) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _BLOCK.fullmatch(name)
    if match is None or (match[3] == "resnets" and match[5] not in _IN_RESNET):
        raise ValueError(
            f"'{name}' is no module of Stable Diffusion's UNet: choose the base that the adapter is for."
        )
    side, kind, layer = match[1], match[3], int(match[4])
    block, size, with_attention = int(match[2] or 0), layers_per_block + 1, UNETS[base]
    rest = _IN_RESNET[match[5]] if kind == "resnets" else match[5]
    if side == "up" and kind == "attentions" and block not in with_attention:
        raise ValueError(
            f"'{name}' is adapted, but {base}'s UNet has attention only in up blocks "
            f"{', '.join(map(str, with_attention))}: choose the base that the adapter is for."
        )
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * size}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{block * size + layers_per_block}.{2 if block in with_attention else 1}.conv"
    start, number = ("input", 1) if side == "down" else ("output", 0)
    return (
        f"{start}_blocks.{number + block * size + layer}.{1 if kind == 'attentions' else 0}.{rest}"
    )
