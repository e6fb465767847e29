"""Convert a T-LoRA that its authors' code (ControlGenAI/T-LoRA) wrote.

    <attention>.processor.to_{q,k,v,out,q_proj,k_proj,v_proj}_lora.
        down.weight (r, d_in), up.weight (d_out, r)                             vanilla
        q_layer.weight, p_layer.weight, lambda_layer (1, r), base_q.weight,
        base_p.weight, base_lambda                                              ortho

The scale is 1. SDXL's files are safetensors of Diffusers' `save_attn_procs`; FLUX's are `lora.pt`.
FLUX's training gives a single block seven adapters; its attention runs three of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from nara_diffusion.strict import check_tensors

from .adapter_part import AdapterPart
from .tlora import Factors, OtherFile, Triples, interleaved, tlora_part

KEY = re.compile(
    r"(?P<layer>(?P<attention>(?:down_|up_|mid_|single_|transformer_)[\w.]+)\.processor\.to_(?P<projection>\w+)_lora)"
    r"\.(?P<field>.+)"
)
_PROJECTIONS = {
    **{name: f"to_{name}" for name in "qkv"},
    "out": "to_out.0",
    **{f"{name}_proj": f"add_{name}_proj" for name in "qkv"},
}
_VANILLA = {"down.weight": "A", "up.weight": "B"}
_ORTHO = {
    "q_layer.weight": "A",
    "p_layer.weight": "B",
    "lambda_layer": "values",
    "base_q.weight": "A",
    "base_p.weight": "B",
    "base_lambda": "values",
}
"""{field: the kind of its shape, which is (r, d_in), (d_out, r) or (1, r)}."""


def convert_repository(file: OtherFile) -> AdapterPart:
    """Return the part for the denoiser.

    Raises:
        ValueError: a key or a tensor isn't one of T-LoRA's. The message names it.
    """
    is_ortho = any(key.endswith("lambda_layer") for key in file.tensors)
    fields = _ORTHO if is_ortho else _VANILLA
    layers: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, str] = {}
    for key, tensor in file.tensors.items():
        match = KEY.fullmatch(key)
        if not match or match["field"] not in fields or match["projection"] not in _PROJECTIONS:
            raise ValueError(
                f"'{key}' is not a tensor of {'an ortho' if is_ortho else 'a vanilla'} T-LoRA, and a file with "
                "several methods can't be played."
            )
        layer, projection = match["layer"], match["projection"]
        layers.setdefault(layer, {})[match["field"]] = tensor
        if projection in "qkv" or not layer.startswith("single_"):
            modules[layer] = f"{match['attention']}.{_PROJECTIONS[projection]}"
    check_layers(file.tensors, layers, fields)
    factors: dict[str, Factors] = {}
    for layer, module in modules.items():
        in_order = [layers[layer][field] for field in fields]
        if is_ortho:
            Q, P, values, Q0, P0, values0 = in_order
            factors[module] = interleaved(Triples(P, values, Q), Triples(P0, values0, Q0))
        else:
            A, B = in_order
            factors[module] = A, B
    is_flow = any(layer.startswith("transformer_blocks.") for layer in layers)
    convention = "flow" if is_flow else "timestep"
    return tlora_part(file, factors, step=2 if is_ortho else 1, noise_convention=convention)


def check_layers(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Tensor]],
    fields: Mapping[str, str],
) -> None:
    """Raise ValueError if a tensor is missing, or has a wrong shape, dtype or value.

    All layers have the rank of the first. The sizes of the base's layers are taken from the file.
    """
    rank, expected = 0, {}
    for layer, by_field in layers.items():
        for field, kind in fields.items():
            shape = (*getattr(by_field.get(field), "shape", ()), 0, 0)
            rank = rank or shape[0]
            shapes = {"A": (rank, shape[1]), "B": (shape[0], rank), "values": (1, rank)}
            expected[f"{layer}.{field}"] = torch.empty(shapes[kind], device="meta")
    check_tensors(tensors, expected)
