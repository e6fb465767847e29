"""Files of plain LoRAs for other programs: their forms and their keys.

    diffusers   unet.….lora_A.weight, transformer.….lora_A.weight      load_lora_weights; in ComfyUI FLUX and SD3
    kohya       lora_unet_….lora_down.weight, .alpha, lora_te1_…       A1111, Forge, SD.Next, InvokeAI, ComfyUI
    comfyui     diffusion_model.….lora_A.weight                        ComfyUI, by the names of the original code

What a form can't express raises an error that names it, so no part of an adapter is lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nara_diffusion.export.lora.plain_lora import PlainLora
from nara_diffusion.export.lora.tensors import with_text_model
from nara_diffusion.loaders.insertion import TEXT_ENCODER
from nara_diffusion.utils.atomic_write import atomic_write

from .factors import Factors, factors_of
from .metadata import host_metadata
from .transformers import flux, sd3, wan
from .unet import SD15, SDXL, UNetLayout, check_attention, stability_name

BASES = ("sd15", "sdxl", "sd3", "flux", "wan")
FORMS = ("diffusers", "kohya", "comfyui")
DENOISERS = ("unet", "transformer")
_TRANSFORMERS: dict[str, Callable[[Mapping[str, Factors]], dict[str, Factors]]] = {"flux": flux, "sd3": sd3, "wan": wan}
LAYOUTS = {"sd15": SD15, "sdxl": SDXL}
_ENCODERS = {
    "sd15": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "flux": {"text_encoder": "lora_te1"},
}
"""{base: {component: kohya's name of it}}."""


def host_state_dict(
    loras: Mapping[str, PlainLora], form: str, base: str, layout: UNetLayout | None = None
) -> dict[str, Tensor]:
    """The tensors of a file for another program. The scale α/r is multiplied into `up`, and alpha is the rank.

    In kohya's form for a UNet and its text encoders, all layers of a component have one alpha, the smallest of their
    ranks, and `up` is multiplied by rank / alpha: Diffusers reads one alpha for all attention of a component.

    Args:
        loras: {component of the pipeline ("unet", "transformer", "text_encoder", …): its LoRA}.
        form: one of `FORMS`. base: one of `BASES`, the kind of model that the adapter is for.
        layout: the layout of a UNet whose depth isn't that of `base`, such as a small one.

    Raises:
        ValueError: no such form or base; a component or a module for which the form has no key, or which `base` doesn't
            have; what a file for other programs can't express (see `factors_of`); DoRA in a form that isn't Diffusers'.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}.")
    if base not in BASES:
        raise ValueError(f"base is {base!r}, expected one of {', '.join(BASES)}: the model that was adapted.")
    found: dict[str, Tensor] = {}
    for component, lora in loras.items():
        if lora.others:
            raise ValueError(
                f"The adapter of {component} has more than LoRA factors ({next(iter(lora.others))}), which files for "
                "other programs can't express: save it in PEFT's format."
            )
        factors = {name: factors_of(name, layer) for name, layer in lora.layers.items()}
        magnitudes = {name: layer.magnitude for name, layer in lora.layers.items() if layer.magnitude is not None}
        if form == "diffusers":
            found |= _diffusers_keys(component, factors, magnitudes)
            continue
        if magnitudes:
            raise ValueError(
                f"The adapter of {component} is a DoRA, and what reads {form} files (ComfyUI, A1111, …) divides by "
                "other norms than DoRA does: choose --form diffusers or --form peft, for these libraries alone."
            )
        found |= _tensors(component, factors, form, base, layout)
    return found


def save_host_file(
    loras: Mapping[str, PlainLora],
    path: str | os.PathLike[str],
    form: str,
    base: str,
    layout: UNetLayout | None = None,
) -> None:
    """Write the tensors of `host_state_dict` to a safetensors file, whole or not at all. Creates its folder.

    Of LoRAs that need a scheduler the metadata says what they predict, in the words that hosts have for it.

    Raises:
        ValueError: `path` is a folder; see `host_state_dict`.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder: name a file, such as '{path / 'lora.safetensors'}'.")
    tensors = {name: tensor.contiguous() for name, tensor in host_state_dict(loras, form, base, layout).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata=host_metadata(loras, form, base, path.stem))


def _tensors(
    component: str, layers: Mapping[str, Factors], form: str, base: str, layout: UNetLayout | None
) -> dict[str, Tensor]:
    if component in DENOISERS:
        named = denoiser_names(layers, form, base, layout)
        if form == "comfyui":
            return _peft_keys({f"diffusion_model.{name}": own for name, own in named.items()})
        return _kohya_keys("lora_unet", named, base)
    encoders = _ENCODERS.get(base, {})
    if component not in encoders:
        known = ", ".join(["the denoiser", *encoders])
        raise ValueError(f"A {form} file of {base} has no keys for '{component}', expected {known}.")
    return _kohya_keys(encoders[component], {with_text_model(name): own for name, own in layers.items()}, base)


def denoiser_names(
    layers: Mapping[str, Factors], form: str, base: str, layout: UNetLayout | None
) -> dict[str, Factors]:
    """{name in the original code: factors} of a denoiser; Diffusers' names where kohya uses them.

    Raises:
        ValueError: a module that has no name there, or that the UNet of `base` doesn't have.
    """
    if base in _TRANSFORMERS:
        return _TRANSFORMERS[base](layers)
    layout = layout or LAYOUTS[base]
    for name in layers:
        check_attention(name, layout, base)
    if base == "sd15" and form == "kohya":
        return dict(layers)  # kohya trains SD 1.5 on Diffusers' UNet
    return {stability_name(name, layout): own for name, own in layers.items()}


def _diffusers_keys(
    component: str, layers: Mapping[str, Factors], magnitudes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    def full(name: str) -> str:
        return f"{component}.{with_text_model(name) if component.startswith(TEXT_ENCODER) else name}"

    vectors = {f"{full(name)}.lora_magnitude_vector": magnitude for name, magnitude in magnitudes.items()}
    return _peft_keys({full(name): own for name, own in layers.items()}) | vectors


def _peft_keys(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, own in layers.items():
        found |= {f"{name}.lora_A.weight": own.down, f"{name}.lora_B.weight": own.up}
    return found


def _kohya_keys(prefix: str, layers: Mapping[str, Factors], base: str) -> dict[str, Tensor]:
    # With the smallest rank as alpha `up` grows; with a larger one it would shrink, and float16 lose small values.
    smallest = min((own.rank for own in layers.values()), default=0)
    found: dict[str, Tensor] = {}
    for name, own in layers.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        alpha = smallest if base in LAYOUTS else own.rank
        up = own.up if alpha == own.rank else (own.up.double() * (own.rank / alpha)).to(own.up.dtype)
        found |= {f"{key}.lora_down.weight": own.down, f"{key}.lora_up.weight": up}
        found[f"{key}.alpha"] = torch.tensor(float(alpha))
    return found
