"""Write plain LoRAs to files for other programs, in the form and with the keys that they read.

    diffusers   unet.….lora_A.weight, transformer.….lora_A.weight      load_lora_weights; in ComfyUI FLUX and SD3
    kohya       lora_unet_….lora_down.weight, .alpha, lora_te1_…       A1111, Forge, SD.Next, InvokeAI, ComfyUI
    comfyui     diffusion_model.….lora_A.weight                        ComfyUI, by the names of the original code

If a form can't express a part of an adapter, an error names that part, so that nothing is lost.

A T-LoRA is also written as LyCORIS (`algo: tlora`), SimpleTuner and ComfyUI's T-LoRA node read it:

    lycoris_<module, with _ for .>.q_layer.weight (k, d_in), .p_layer.weight (d_out, k),
    .lambda_layer (1, k), .alpha ()

    ΔW(t) = alpha/k · (P diag(σ m(t)) Q − P0 diag(σ0 m(t)) Q0)

LyCORIS always subtracts the first k singular triples (P0, σ0, Q0) of the base weight, which aren't
in the file. An adapter that was trained with them (lora_a_init="residual_base", see
layers/residual.py) is written exactly. No other adapter can be: for a direction that goes on, its
s b a has to be added and σ0 p0 q0 to be compensated. This sum has rank 2, and LyCORIS' direction
has rank 1.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.cores.registry import build_core
from nara_diffusion.loaders.adapter_part import AdapterPart
from nara_diffusion.loaders.components import TEXT_ENCODER
from nara_diffusion.loaders.tensor_files import OTHER_WEIGHTS_NAMES, save_tensors
from nara_diffusion.loaders.tlora import LYCORIS_CONFIG_NAME
from nara_diffusion.utils.files import atomic_write_files

from .original_names import UNETS, check_base, original_layers, parts_of
from .plain_lora import (
    PlainLora,
    PlainLoraLayer,
    extra_tensors,
    layers_of_tensors,
    tensors_of_layers,
)

BASES = ("sd15", "sdxl", "sd3", "flux", "wan")
FORMS = ("diffusers", "kohya", "comfyui")
HOST_DENOISERS = ("unet", "transformer")
"""Denoisers that files for other programs can be for."""
_ENCODERS = {
    "sd15": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "flux": {"text_encoder": "lora_te1"},
}
"""{base: {component: its name in kohya's files}}."""
_IN_CLIP = re.compile(r"encoder\.layers\.\d+\.(self_attn|mlp)\.")


def host_state_dict(loras: Mapping[str, PlainLora], form: str, base: str) -> dict[str, Tensor]:
    """Return the tensors of a file for another program.

    `up` includes the scale α/r, and alpha is the rank. In kohya's form for a UNet and its text
    encoders, all layers of a component have the same alpha, the smallest of their ranks, and `up`
    also includes rank / alpha. The reason is that Diffusers reads only one alpha for all attention
    layers of a component.

    Args:
        loras: {component of the pipeline ("unet", "transformer", "text_encoder", …): its LoRA}.
        form: one of `FORMS`.
        base: one of `BASES`, the kind of model that the adapter is for.

    Raises:
        ValueError: there is no such form or base; the form has no key for a component or module, or
            `base` doesn't have that module; such files can't express a part of the adapter (see
            `with_scale_1`); or the adapter is a DoRA and the form isn't Diffusers'.
    """
    if form not in FORMS or base not in BASES:
        raise ValueError(
            f"form is {form!r} and base is {base!r}. Forms: {', '.join(FORMS)}. Bases: {', '.join(BASES)}."
        )
    tensors: dict[str, Tensor] = {}
    for component, lora in loras.items():
        if lora.others:
            raise ValueError(
                f"The adapter of {component} has more than LoRA factors ({next(iter(lora.others))}). Files for other "
                "programs can't contain that. Save the adapter in PEFT's format."
            )
        is_dora = any(layer.magnitude is not None for layer in lora.layers.values())
        if is_dora and form != "diffusers":
            raise ValueError(
                f"The adapter of {component} is a DoRA. Programs that read {form} files (ComfyUI, A1111, …) divide by "
                "other norms than DoRA does. Choose --form diffusers or --form peft."
            )
        layers = {name: with_scale_1(name, layer) for name, layer in lora.layers.items()}
        if component.startswith(TEXT_ENCODER):
            layers = {with_text_model(name): layer for name, layer in layers.items()}
        tensors |= _component_tensors(component, layers, form, base)
    return tensors


def save_host_file(
    loras: Mapping[str, PlainLora], path: str | os.PathLike[str], form: str, base: str
) -> None:
    """Write the tensors of `host_state_dict` to a safetensors file, completely or not at all.

    The folder is created if it does not exist.

    Raises:
        ValueError: `host_state_dict` raises an error.
        OSError: the disk is full, or `path` is a folder or can't be written.
    """
    tensors = host_state_dict(loras, form, base)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, Path(path))


def with_scale_1(name: str, layer: PlainLoraLayer) -> PlainLoraLayer:
    """Return the layer with its scale folded into B, in B's dtype, computed in float64.

    Raises:
        ValueError: the layer is an embedding or a grouped convolution, which files for other
            programs can't express.
    """
    if layer.is_embedding or layer.groups > 1:
        kind = "an embedding" if layer.is_embedding else "a grouped convolution"
        raise ValueError(
            f"Module '{name}' is {kind}, which files for other programs can't express. Save the adapter in PEFT's "
            "format."
        )
    return _with_alpha(layer, layer.rank)


def _with_alpha(layer: PlainLoraLayer, alpha: float) -> PlainLoraLayer:
    B = (layer.B.double() * (layer.alpha / alpha)).to(layer.B.dtype)
    return replace(layer, alpha=alpha, B=B)


def with_text_model(name: str) -> str:
    """Return the name with `text_model`, which CLIPTextModel in transformers 5 no longer has."""
    return f"text_model.{name}" if _IN_CLIP.match(name) else name


def _component_tensors(
    component: str, layers: Mapping[str, PlainLoraLayer], form: str, base: str
) -> dict[str, Tensor]:
    """Return the tensors of one component by the form's keys."""
    if form == "diffusers":
        return tensors_of_layers(layers, f"{component}.")
    if component in HOST_DENOISERS:
        check_base(layers, base)
        # kohya trains SD 1.5 on Diffusers' UNet
        has_diffusers_names = base == "sd15" and form == "kohya"
        layers = layers if has_diffusers_names else original_layers(layers, base)
        if form == "comfyui":
            return tensors_of_layers(layers, "diffusion_model.")
        return _kohya_tensors("lora_unet", layers, base)
    encoders = _ENCODERS.get(base, {})
    if component not in encoders:
        names = ", ".join(["the denoiser", *encoders])
        raise ValueError(
            f"A {form} file for {base} has no keys for '{component}', only for {names}."
        )
    return _kohya_tensors(encoders[component], layers, base)


def _kohya_tensors(
    prefix: str, layers: Mapping[str, PlainLoraLayer], base: str
) -> dict[str, Tensor]:
    """Return the tensors of one component in kohya's form."""
    # with the smallest rank as alpha, `up` can only grow; smaller values could vanish in float16
    smallest = min((layer.rank for layer in layers.values()), default=0)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        alpha = smallest if base in UNETS else layer.rank
        tensors |= {
            f"{key}.lora_down.weight": layer.A,
            f"{key}.lora_up.weight": _with_alpha(layer, alpha).B,
            f"{key}.alpha": torch.tensor(float(alpha)),
        }
    return tensors


LYCORIS_WEIGHTS = OTHER_WEIGHTS_NAMES[0]
"""The name that SimpleTuner gives the file."""


def save_lycoris(part: AdapterPart, folder: Path, base: str | None = None) -> None:
    """Write both files into `folder`, or nothing.

    Args:
        base: None for the module names of Diffusers, which SimpleTuner uses; for ComfyUI "sd15",
            "sdxl" or "wan", the model that the adapter was trained on.

    Raises:
        ValueError: LyCORIS can't express the adapter; or ComfyUI has no such module.
    """
    config = part.config
    if config.lora_a_init != "residual_base":
        raise ValueError(
            "LyCORIS' T-LoRA subtracts singular vectors of the base weight, and this adapter has lora_a_init="
            f"{config.lora_a_init!r}, so it was trained without them: it can't be written. Train with --adapter tlora "
            "--adapter_options lora_a_init=residual_base."
        )
    if config.strength is not None or config.rank_pattern or extra_tensors(part.tensors):
        raise ValueError(
            "LyCORIS' T-LoRA needs strength 1, layers of one rank and nothing else, so a strength over λ, rank_pattern "
            "and trained biases can't be written."
        )
    layers = layers_of_tensors(config, part.tensors)
    names = {name: name for name in layers} if base is None else names_in_comfyui(layers, base)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        fields = lycoris_fields(name, layer)
        key = f"lycoris_{names[name].replace('.', '_')}"
        tensors |= {f"{key}.{field}": tensor for field, tensor in fields.items()}
    core: Any = build_core(config, config.r)
    settings = {
        "algo": "tlora",
        "multiplier": 1.0,
        "linear_dim": config.r // 2,
        "linear_alpha": fields["alpha"].item(),
        "tlora_min_rank": core.min_rank // core.step,
        "tlora_alpha": core.exponent,
    }
    text = json.dumps(settings, indent=2) + "\n"
    with atomic_write_files(folder) as partial:
        save_tensors(tensors, partial / LYCORIS_WEIGHTS)
        (partial / LYCORIS_CONFIG_NAME).write_text(text, encoding="utf-8")


def lycoris_fields(name: str, layer: PlainLoraLayer) -> dict[str, Tensor]:
    """Return LyCORIS' tensors of one layer, {name of the field: tensor}.

    Raises:
        ValueError: the layer is a convolution of another kernel than 1, or has groups.
    """
    if layer.A.dim() > 2 and (layer.A[0, 0].numel() > 1 or layer.groups > 1):
        raise ValueError(
            f"'{name}' is a convolution with a kernel or with groups, for which LyCORIS has no T-LoRA. Train without "
            "it."
        )
    scaled = layer.B[:, 0::2].float()  # P diag(σ), (d_out, k, …)
    values = scaled.norm(dim=0, keepdim=True)  # (1, k, …)
    P = scaled / values.clamp(min=torch.finfo(values.dtype).tiny)
    return {
        "q_layer.weight": layer.A[0::2],
        "p_layer.weight": P.to(layer.B.dtype),
        "lambda_layer": values.view(1, -1),
        "alpha": torch.tensor(layer.scaling * layer.rank / 2),
    }


def names_in_comfyui(layers: dict[str, PlainLoraLayer], base: str) -> dict[str, str]:
    """Return {name in Diffusers: name in ComfyUI} of the modules.

    Raises:
        ValueError: ComfyUI has no such module, or fuses several into one.
    """
    check_base(layers, base)
    names = {}
    for original, modules in parts_of(layers, base).items():
        if len(modules) > 1:
            raise ValueError(
                f"ComfyUI's {base} has '{original}' for {', '.join(map(str, modules))} together, whose singular "
                "vectors are others. Leave out --base, for programs that use Diffusers' names."
            )
        names[str(modules[0])] = original
    return names
