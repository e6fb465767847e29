"""Map Diffusers' module names to the original names that kohya's files and ComfyUI use.

The original code of FLUX and SD3 fuses q, k and v into one matrix. The LoRA for it is
block-diagonal and exact:

    [ΔW_q; ΔW_k; ΔW_v] = diag(up_q, up_k, up_v) · [down_q; down_k; down_v]

Stability's UNets (SD 1.5, SDXL), with n layers in each down block and n + 1 in each up block:

    down_blocks.i.resnets.j       input_blocks.(1 + i(n+1) + j).0, and .1 for attentions
    down_blocks.i.downsamplers.0  input_blocks.((i+1)(n+1)).0.op
    mid_block                     middle_block.0, .1, .2
    up_blocks.i.resnets.j         output_blocks.(i(n+1) + j).0, and .1 for attentions
    up_blocks.i.upsamplers.0      output_blocks.(i(n+1) + n).1.conv, or .2.conv after an attention
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from .plain_lora import PlainLoraLayer

MLP_RATIO = 4
"""FLUX's proj_mlp has this many times the rows of q."""

_NUMBER = re.compile(r"blocks\.(\d+)\.")


def _qkv(pattern: str) -> list[str]:
    """Return the three names that a pattern yields with q, k and v in place of "?"."""
    return [pattern.replace("?", letter) for letter in "qkv"]


_FLUX = {
    "double_blocks.*.img_attn.qkv": _qkv("transformer_blocks.*.attn.to_?"),
    "double_blocks.*.txt_attn.qkv": _qkv("transformer_blocks.*.attn.add_?_proj"),
    "single_blocks.*.linear1": (
        *_qkv("single_transformer_blocks.*.attn.to_?"),
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
    "joint_blocks.*.x_block.attn.qkv": _qkv("transformer_blocks.*.attn.to_?"),
    "joint_blocks.*.context_block.attn.qkv": _qkv("transformer_blocks.*.attn.add_?_proj"),
    "joint_blocks.*.x_block.attn2.qkv": _qkv("transformer_blocks.*.attn2.to_?"),
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
    "blocks.*.self_attn.q": ["blocks.*.attn1.to_q"],
    "blocks.*.self_attn.k": ["blocks.*.attn1.to_k"],
    "blocks.*.self_attn.v": ["blocks.*.attn1.to_v"],
    "blocks.*.self_attn.o": ["blocks.*.attn1.to_out.0"],
    "blocks.*.cross_attn.q": ["blocks.*.attn2.to_q"],
    "blocks.*.cross_attn.k": ["blocks.*.attn2.to_k"],
    "blocks.*.cross_attn.v": ["blocks.*.attn2.to_v"],
    "blocks.*.cross_attn.o": ["blocks.*.attn2.to_out.0"],
    "blocks.*.cross_attn.k_img": ["blocks.*.attn2.add_k_proj"],
    "blocks.*.cross_attn.v_img": ["blocks.*.attn2.add_v_proj"],
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
_LAYER = re.compile(r"(down|up)_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.")
UNETS = {"sd15": (1, 2, 3), "sdxl": (0, 1)}
"""{base with a UNet: the up blocks that have attention}."""
_ABSENT = {
    "sd15": r"up_blocks\.0\.attentions|transformer_blocks\.[1-9]|add_embedding",
    "sdxl": r"_blocks\.3|down_blocks\.0\.attentions|up_blocks\.2\.attentions",
    "flux": r"^transformer_blocks\.(19|[2-9]\d)\.",
}
"""{base: names that modules of related models have, but no module of this base}."""


def check_base(names: Iterable[str], base: str) -> None:
    """Raise ValueError if a denoiser's module (its name in Diffusers) is not in a model of `base`."""
    for name in names:
        if base in UNETS:
            _original_unet_name(name, base, layers_per_block=2)
        if base in _ABSENT and re.search(_ABSENT[base], name):
            raise ValueError(
                f"'{name}' is adapted, but {base} has no such module: choose the --base that the "
                "adapter was trained on."
            )


def parts_of(names: Collection[str], base: str) -> dict[str, list[str | None]]:
    """Return {name in the original code: the modules that form its matrix, from top to bottom}.

    None takes the place of a module that is not in `names`.

    Args:
        names: the names of a denoiser's modules in Diffusers.
        base: "sd15", "sdxl", "flux", "sd3" or "wan".

    Raises:
        ValueError: a module has no name in the original code; or the names depend on the number of
            layers in each block of the UNet, but the modules don't show that number.
    """
    if base in UNETS:
        layers_per_block = _layers_per_block(names, base)
        return {_original_unet_name(name, base, layers_per_block): [name] for name in names}
    matrices: dict[str, list[str | None]] = {}
    for name in names:
        number = _NUMBER.search(name)
        block = number[1] if number else ""
        pattern = _NUMBER.sub("blocks.*.", name, count=1)
        entries = [entry for entry in _TABLES[base].items() if pattern in entry[1]]
        if not entries:
            raise ValueError(
                f"'{name}' has no name in {base}'s original code. Save the adapter for Diffusers or PEFT, or choose "
                "the base that it is for."
            )
        [(original, patterns)] = entries
        modules = [pattern.replace("*", block) for pattern in patterns]
        matrices[original.replace("*", block)] = [
            module if module in names else None for module in modules
        ]
    return matrices


def original_layers(layers: Mapping[str, PlainLoraLayer], base: str) -> dict[str, PlainLoraLayer]:
    """Return {name in the original code: factors} for layers with scale 1 (see `parts_of`).

    Args:
        layers: {name in Diffusers: factors}.
        base: the kind of model, as for `parts_of`.
    """
    renamed = {}
    for name, parts in parts_of(layers, base).items():
        layer = _fused([None if part is None else layers[part] for part in parts])
        is_modulation = base == "sd3" and name.endswith("context_block.adaLN_modulation.1")
        if is_modulation and len(layer.B) == 2 * layer.A.shape[1]:
            # in SD3's last block, Diffusers has scale, then shift; the original code the reverse
            scale, shift = layer.B.chunk(2)
            layer = replace(layer, B=torch.cat([shift, scale]))
        renamed[name] = layer
    return renamed


def _fused(parts: Sequence[PlainLoraLayer | None]) -> PlainLoraLayer:
    """Stack the parts of one matrix from top to bottom, with ΔW = 0 for parts without a LoRA."""
    present = [part for part in parts if part is not None]
    if len(parts) == 1:
        return present[0]
    first = next(index for index, part in enumerate(parts) if part is not None)
    # FLUX may fuse q, k and v with proj_mlp
    width = len(present[0].B) // (1 if first < 3 else MLP_RATIO)
    sizes = [width] * 3 + [MLP_RATIO * width] * (len(parts) - 3)
    rank = sum(part.rank for part in present)
    B = present[0].B.new_zeros(sum(sizes), rank)
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            B[row : row + size, column : column + part.rank] = part.B
            column += part.rank
        row += size
    return PlainLoraLayer(torch.cat([part.A for part in present]), B, rank, rank)


def _layers_per_block(names: Collection[str], base: str) -> int:
    """Return the number of layers in each down block.

    Up blocks have one layer more. The released UNets have two layers in each down block.
    """
    counts = {"down": 0, "up": 0}
    for match in filter(None, map(_LAYER.match, names)):
        counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
    down, up = counts.values()
    least = max(down, up - 1, 1)
    if least > 1 or 0 < down == up - 1:
        return least
    for name in names:
        if _original_unet_name(name, base, 1) != _original_unet_name(name, base, 2):
            raise ValueError(
                f"The name of '{name}' in {base}'s original code depends on the number of layers in each block of the "
                "UNet, and the adapter doesn't show whether it is one or two. Use --form diffusers, which needs no "
                "such name."
            )
    return least


def _original_unet_name(name: str, base: str, layers_per_block: int) -> str:
    """Return the original name of a UNet's module, by the rule at the top of this file."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _BLOCK.fullmatch(name)
    if match is None or (match[3] == "resnets" and match[5] not in _IN_RESNET):
        raise ValueError(
            f"'{name}' is not a module of Stable Diffusion's UNet. Choose the base that the adapter is "
            "for."
        )
    side, block, kind, layer = match[1], int(match[2] or 0), match[3], int(match[4])
    size = layers_per_block + 1
    is_attention = kind == "attentions"
    with_attention = UNETS[base]
    inner = _IN_RESNET[match[5]] if kind == "resnets" else match[5]
    if side == "mid":
        return f"middle_block.{1 if is_attention else 2 * layer}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * size}.0.op"
    if kind == "upsamplers":
        place = 2 if block in with_attention else 1
        return f"output_blocks.{block * size + layers_per_block}.{place}.conv"
    number = block * size + layer
    place = 1 if is_attention else 0
    if side == "down":
        return f"input_blocks.{1 + number}.{place}.{inner}"
    return f"output_blocks.{number}.{place}.{inner}"
