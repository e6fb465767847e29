"""Write plain LoRAs to files for other programs, in the form and with the keys that they read.

    diffusers   unet.….lora_A.weight, transformer.….lora_A.weight      load_lora_weights; in ComfyUI FLUX and SD3
    kohya       lora_unet_….lora_down.weight, .alpha, lora_te1_…       A1111, Forge, SD.Next, InvokeAI, ComfyUI
    comfyui     diffusion_model.….lora_A.weight                        ComfyUI, by the names of the original code

If a form can't express a part of an adapter, an error names that part, so that nothing is lost.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nara_diffusion.loaders.components import TEXT_ENCODER
from nara_diffusion.loaders.tensor_files import save_tensors

from .original_names import UNETS, check_base, original_layers
from .plain_lora import PlainLora, PlainLoraLayer, tensors_of_layers

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
        tensors[f"{key}.lora_down.weight"] = layer.A
        tensors[f"{key}.lora_up.weight"] = _with_alpha(layer, alpha).B
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors
