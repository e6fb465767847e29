"""The names of FLUX's, SD3's and Wan's modules in their original code, which has q, k and v of FLUX and SD3 fused.

    FLUX   transformer_blocks.i.attn.to_q, to_k, to_v                double_blocks.i.img_attn.qkv
           transformer_blocks.i.attn.add_q_proj, …                   double_blocks.i.txt_attn.qkv
           single_transformer_blocks.i.attn.to_q, …, proj_mlp        single_blocks.i.linear1
    SD3    transformer_blocks.i.attn.to_q, …                         joint_blocks.i.x_block.attn.qkv
           transformer_blocks.i.attn.add_q_proj, …                   joint_blocks.i.context_block.attn.qkv
    Wan    blocks.i.attn1.to_q                                       blocks.i.self_attn.q

A module without a name there raises an error, and so does the last layer's modulation, whose halves Diffusers swaps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from .factors import Factors, fuse_into

MLP_RATIO = 4  # of FLUX: proj_mlp has four times the rows of q
_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

_FLUX = {
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"double_blocks.\1.img_mlp.0",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"double_blocks.\1.img_mlp.2",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": r"double_blocks.\1.txt_mlp.0",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2": r"double_blocks.\1.txt_mlp.2",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"double_blocks.\1.img_mod.lin",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"double_blocks.\1.txt_mod.lin",
    r"single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks.\1.linear2",
    r"single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks.\1.modulation.lin",
    r"x_embedder": "img_in",
    r"context_embedder": "txt_in",
    r"time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
    r"time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
    r"time_text_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
    r"time_text_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
    r"proj_out": "final_layer.linear",
}
_SD3 = {
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"joint_blocks.\1.x_block.attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
    r"transformer_blocks\.(\d+)\.attn2\.to_out\.0": r"joint_blocks.\1.x_block.attn2.proj",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"joint_blocks.\1.x_block.mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"joint_blocks.\1.x_block.mlp.fc2",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": r"joint_blocks.\1.context_block.mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2": r"joint_blocks.\1.context_block.mlp.fc2",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"joint_blocks.\1.x_block.adaLN_modulation.1",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"joint_blocks.\1.context_block.adaLN_modulation.1",
    r"context_embedder": "context_embedder",
    r"time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    r"proj_out": "final_layer.linear",
}
_WAN = {
    r"blocks\.(\d+)\.attn1\.to_([qkv])": r"blocks.\1.self_attn.\2",
    r"blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.self_attn.o",
    r"blocks\.(\d+)\.attn2\.to_([qkv])": r"blocks.\1.cross_attn.\2",
    r"blocks\.(\d+)\.attn2\.to_out\.0": r"blocks.\1.cross_attn.o",
    r"blocks\.(\d+)\.attn2\.add_([kv])_proj": r"blocks.\1.cross_attn.\2_img",
    r"blocks\.(\d+)\.ffn\.net\.0\.proj": r"blocks.\1.ffn.0",
    r"blocks\.(\d+)\.ffn\.net\.2": r"blocks.\1.ffn.2",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"proj_out": "head.head",
}


def flux(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors of FLUX.1's modules by the original names. Raises ValueError for a module that has none."""
    found: dict[str, Factors] = {}
    for i in _blocks(layers, "transformer_blocks"):
        attention = f"transformer_blocks.{i}.attn"
        _fuse_qkv(found, layers, f"double_blocks.{i}.img_attn.qkv", attention, _QKV)
        _fuse_qkv(found, layers, f"double_blocks.{i}.txt_attn.qkv", attention, _ADDED)
    for i in _blocks(layers, "single_transformer_blocks"):
        block = f"single_transformer_blocks.{i}"
        parts = [*(f"{block}.attn.{part}" for part in _QKV), f"{block}.proj_mlp"]
        width = _rows(layers, parts[:3]) or _rows(layers, parts[3:]) // MLP_RATIO
        fuse_into(found, layers, f"single_blocks.{i}.linear1", parts, [width] * 3 + [MLP_RATIO * width])
    return found | _renamed(layers, _FLUX, r"attn\.(to|add)_[qkv]|proj_mlp", "FLUX")


def sd3(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors of SD3's and SD3.5's modules by the original names. Raises ValueError for a module that has none."""
    found: dict[str, Factors] = {}
    for i in _blocks(layers, "transformer_blocks"):
        block, attention = f"joint_blocks.{i}", f"transformer_blocks.{i}.attn"
        _fuse_qkv(found, layers, f"{block}.x_block.attn.qkv", attention, _QKV)
        _fuse_qkv(found, layers, f"{block}.context_block.attn.qkv", attention, _ADDED)
        _fuse_qkv(found, layers, f"{block}.x_block.attn2.qkv", f"{attention}2", _QKV)
    renamed = _renamed(layers, _SD3, r"attn2?\.(to|add)_[qkv]", "SD3")
    return found | {name: _shift_first(name, own) for name, own in renamed.items()}


def _shift_first(name: str, own: Factors) -> Factors:
    """Swap the halves of the last block's context modulation: scale and shift in Diffusers, shift and scale here."""
    if not name.endswith("context_block.adaLN_modulation.1") or len(own.up) != 2 * own.down.shape[1]:
        return own
    return Factors(own.down, torch.cat(own.up.chunk(2)[::-1]), own.modules)


def wan(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors of Wan 2's modules by the original names. Raises ValueError for a module that has none."""
    return _renamed(layers, _WAN, None, "Wan")


def _fuse_qkv(
    found: dict[str, Factors], layers: Mapping[str, Factors], name: str, attention: str, names: tuple[str, ...]
) -> None:
    parts = [f"{attention}.{part}" for part in names]
    fuse_into(found, layers, name, parts, [_rows(layers, parts)] * 3)


def _rows(layers: Mapping[str, Factors], names: list[str]) -> int:
    """The d_out of the first of `names` that is adapted; 0 if none is."""
    return next((len(layers[name].up) for name in names if name in layers), 0)


def _blocks(layers: Mapping[str, Factors], kind: str) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in layers if name.startswith(f"{kind}.")})


def _renamed(
    layers: Mapping[str, Factors], table: Mapping[str, str], fused: str | None, base: str
) -> dict[str, Factors]:
    """Rename the modules that are single matrices in the original code too."""
    found = {}
    for name, factors in layers.items():
        if fused is not None and re.search(fused, name):
            continue
        others = [re.sub(pattern, other, name) for pattern, other in table.items() if re.fullmatch(pattern, name)]
        if not others:
            raise ValueError(
                f"'{name}' has no name in {base}'s original code: save the adapter for Diffusers or PEFT, or choose "
                "the base that it is for."
            )
        found[others[0]] = factors
    return found
