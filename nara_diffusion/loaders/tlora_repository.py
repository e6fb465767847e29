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

from nara_diffusion.layers.residual import Triples, interleaved

from .adapter_part import AdapterPart
from .tlora import Factors, OtherFile, check_layers, layers_of, tlora_part

KEY = re.compile(
    r"(?P<layer>(?:down_|up_|mid_|single_|transformer_)[\w.]+\.processor\.to_(?:[qkv](?:_proj)?|out)_lora)"
    r"\.(?P<field>.+)"
)
_PROJECTIONS = {
    **{name: f"to_{name}" for name in "qkv"},
    "out": "to_out.0",
    **{f"{name}_proj": f"add_{name}_proj" for name in "qkv"},
}
_VANILLA = ("down.weight", "up.weight")
_ORTHO = (
    *("q_layer.weight", "p_layer.weight", "lambda_layer"),
    *("base_q.weight", "base_p.weight", "base_lambda"),
)


def convert_repository(file: OtherFile) -> AdapterPart:
    """Return the part for the denoiser.

    Raises:
        ValueError: a key or a tensor isn't one of T-LoRA's. The message names it.
    """
    is_ortho = any(key.endswith("lambda_layer") for key in file.tensors)
    fields, method = (_ORTHO, "an ortho T-LoRA") if is_ortho else (_VANILLA, "a vanilla T-LoRA")
    layers = layers_of(file.tensors, KEY, fields, method)
    check_layers(file.tensors, layers)
    factors: dict[str, Factors] = {}
    for layer, tensors in layers.items():
        attention, _, projection = layer.removesuffix("_lora").partition(".processor.to_")
        if projection not in "qkv" and layer.startswith("single_"):
            continue
        Q, P, *base_tensors = tensors.values()
        if is_ortho:
            values, Q0, P0, values0 = base_tensors
            Q, P = interleaved(Triples(P, values, Q), Triples(P0, values0, Q0))
        factors[f"{attention}.{_PROJECTIONS[projection]}"] = Q, P
    is_flow = any(layer.startswith("transformer_blocks.") for layer in layers)
    convention = "flow" if is_flow else "timestep"
    return tlora_part(file, factors, step=2 if is_ortho else 1, noise_convention=convention)
