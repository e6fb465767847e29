"""Files of plain LoRAs for other programs: their forms and their keys, and ComfyUI's workflow of strengths over λ.

    diffusers   unet.….lora_A.weight, transformer.….lora_A.weight      load_lora_weights; in ComfyUI FLUX and SD3
    kohya       lora_unet_….lora_down.weight, .alpha, lora_te1_…       A1111, Forge, SD.Next, InvokeAI, ComfyUI
    comfyui     diffusion_model.….lora_A.weight                        ComfyUI, by the names of the original code

What a form can't express raises an error that names it, so no part of an adapter is lost. The metadata has the
scheduler that the LoRA needs, if its model predicts something else than its base: `from_lora` reads it.

In the workflow strengths follow λ by keyframes at percents of sampling, 0 at pure noise, 1 at the image:

    discrete (SD 1.5, SDXL)      λ = t / N,   percent = 1 − t / (N − 1)
    flow (SD3, FLUX)             λ = σ = a s / (1 + (a − 1) s),   percent = 1 − s       a: the model's shift
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.loaders.insertion import TEXT_ENCODER
from nara_diffusion.loaders.strict import save_tensors
from nara_diffusion.noise.strength_schedule import StrengthSchedule

from .original_names import UNETS, original_layers
from .plain_lora import PlainLora, PlainLoraLayer, tensors_of_layers

BASES = ("sd15", "sdxl", "sd3", "flux", "wan")
FORMS = ("diffusers", "kohya", "comfyui")
DENOISERS = ("unet", "transformer")
SCHEDULER_KEY = "nara_scheduler"
"""The key of the scheduler's class and configuration, as JSON, in a file's metadata."""
_ENCODERS = {
    "sd15": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "flux": {"text_encoder": "lora_te1"},
}
"""{base: {component: kohya's name of it}}."""
_IN_CLIP = re.compile(r"encoder\.layers\.\d+\.(self_attn|mlp)\.")
LEVELS = 1000
_KEYFRAMES = 50
"""The number of equally spaced keyframes: ComfyUI holds a keyframe's strength until the next one."""
_STEP = 1e-6
"""Two points of a schedule that are nearer in λ than this are a step: the same λ, or neighbouring float32 numbers."""


def host_state_dict(
    loras: Mapping[str, PlainLora], form: str, base: str, layers_per_block: int = 2
) -> dict[str, Tensor]:
    """The tensors of a file for another program. The scale α/r is multiplied into `up`, and alpha is the rank.

    In kohya's form for a UNet and its text encoders, all layers of a component have one alpha, the smallest of their
    ranks, and `up` is multiplied by rank / alpha: Diffusers reads one alpha for all attention of a component.

    Args:
        loras: {component of the pipeline ("unet", "transformer", "text_encoder", …): its LoRA}.
        form: one of `FORMS`. base: one of `BASES`, the kind of model that the adapter is for.
        layers_per_block: of the UNet's configuration.

    Raises:
        ValueError: no such form or base; a component or a module for which the form has no key, or which `base` doesn't
            have; what a file for other programs can't express (see `with_scale_1`); DoRA in a form that isn't
            Diffusers'.
    """
    if form not in FORMS or base not in BASES:
        raise ValueError(
            f"form is {form!r}, base is {base!r}: pass one of {', '.join(FORMS)}, one of {', '.join(BASES)}."
        )
    found: dict[str, Tensor] = {}
    for component, lora in loras.items():
        if lora.others:
            raise ValueError(
                f"The adapter of {component} has more than LoRA factors ({next(iter(lora.others))}), which files for "
                "other programs can't express: save it in PEFT's format."
            )
        if form != "diffusers" and any(layer.magnitude is not None for layer in lora.layers.values()):
            raise ValueError(
                f"The adapter of {component} is a DoRA, and what reads {form} files (ComfyUI, A1111, …) divides by "
                "other norms than DoRA does: choose --form diffusers or --form peft, for these libraries alone."
            )
        layers = {name: with_scale_1(name, layer) for name, layer in lora.layers.items()}
        if component.startswith(TEXT_ENCODER):
            layers = {with_text_model(name): layer for name, layer in layers.items()}
        found |= _named(component, layers, form, base, layers_per_block)
    return found


def save_host_file(
    loras: Mapping[str, PlainLora], path: str | os.PathLike[str], form: str, base: str, layers_per_block: int = 2
) -> None:
    """Write the tensors of `host_state_dict` to a safetensors file, whole or not at all. Creates its folder.

    Raises:
        ValueError: see `host_state_dict`. OSError: the target is full, a folder, or can't be written.
    """
    path = Path(path)
    found = host_state_dict(loras, form, base, layers_per_block)
    carried = [lora.scheduler for lora in loras.values() if lora.scheduler is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(found, path, {SCHEDULER_KEY: json.dumps(carried[-1], sort_keys=True)} if carried else None)


def with_scale_1(name: str, layer: PlainLoraLayer) -> PlainLoraLayer:
    """The layer with its scale in B, in its own dtype; the product is computed in float64.

    Raises:
        ValueError: an embedding or a grouped convolution, which hosts' files can't express.
    """
    if layer.is_embedding or layer.groups > 1:
        kind = "an embedding" if layer.is_embedding else "a grouped convolution"
        raise ValueError(
            f"Module '{name}' is {kind}, which files for other programs can't express: save it in PEFT's format."
        )
    return _with_alpha(layer, layer.rank)


def _with_alpha(layer: PlainLoraLayer, alpha: float) -> PlainLoraLayer:
    gain = layer.alpha / alpha
    return replace(layer, alpha=alpha, B=layer.B if gain == 1 else (layer.B.double() * gain).to(layer.B.dtype))


def with_text_model(name: str) -> str:
    """The name in a text encoder with `text_model`, which transformers 5 leaves out of the names in CLIPTextModel."""
    return f"text_model.{name}" if _IN_CLIP.match(name) else name


def _named(
    component: str, layers: Mapping[str, PlainLoraLayer], form: str, base: str, layers_per_block: int
) -> dict[str, Tensor]:
    """The tensors of one component by the form's keys."""
    if form == "diffusers":
        return tensors_of_layers(layers, f"{component}.")
    if component in DENOISERS:
        has_diffusers_names = base == "sd15" and form == "kohya"  # kohya trains SD 1.5 on Diffusers' UNet
        layers = layers if has_diffusers_names else original_layers(layers, base, layers_per_block)
        if form == "comfyui":
            return tensors_of_layers(layers, "diffusion_model.")
        return _kohyas("lora_unet", layers, base)
    encoders = _ENCODERS.get(base, {})
    if component not in encoders:
        known = ", ".join(["the denoiser", *encoders])
        raise ValueError(f"A {form} file of {base} has no keys for '{component}', expected {known}.")
    return _kohyas(encoders[component], layers, base)


def _kohyas(prefix: str, layers: Mapping[str, PlainLoraLayer], base: str) -> dict[str, Tensor]:
    # With the smallest rank as alpha `up` grows; with a larger one it would shrink, and float16 lose small values.
    smallest = min((layer.rank for layer in layers.values()), default=0)
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key, own = f"{prefix}_{name.replace('.', '_')}", _with_alpha(layer, smallest if base in UNETS else layer.rank)
        found |= {f"{key}.lora_down.weight": own.A, f"{key}.lora_up.weight": own.B}
        found[f"{key}.alpha"] = torch.tensor(float(own.alpha))
    return found


# ---------------------------------------------------------------------- ComfyUI's workflow


def percent_of(level: float, shift: float | None = None) -> float:
    """ComfyUI's percent at λ, in [0, 1], 0 = pure noise; `shift` a ≥ 1 of a flow, None for a discrete schedule."""
    if shift is None:
        return min(max(1 - level * LEVELS / (LEVELS - 1), 0.0), 1.0)
    return 1 - level / (shift - (shift - 1) * level)


def level_of(percent: float, shift: float | None = None) -> float:
    """λ at ComfyUI's percent: the inverse of `percent_of`."""
    share = 1 - percent
    return share * (LEVELS - 1) / LEVELS if shift is None else shift * share / (1 + (shift - 1) * share)


def keyframes(schedule: StrengthSchedule, shift: float | None = None) -> list[list[float]]:
    """[start percent, strength] of each keyframe, which holds the strength at its middle; none spans a step."""
    steps = {
        round(percent_of(level, shift), 6)
        for (level, _), (following, _) in pairwise(schedule.points)
        if following - level < _STEP
    }
    starts = sorted({*(index / _KEYFRAMES for index in range(_KEYFRAMES)), *(step for step in steps if step < 1)})
    levels = [level_of((start + end) / 2, shift) for start, end in pairwise([*starts, 1.0])]
    values = schedule.at(torch.tensor(levels, dtype=torch.float32).clamp(0, 1)).tolist()
    found = [[start, round(value, 4) + 0.0] for start, value in zip(starts, values, strict=True)]
    return [frame for index, frame in enumerate(found) if index == 0 or frame[1] != found[index - 1][1]]


def comfyui_workflow(
    schedules: Mapping[str, StrengthSchedule],
    checkpoint: str,
    shift: float | None = None,
    always: str | None = None,
    patch: tuple[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A text-to-image workflow in ComfyUI's API format, with LoRA hooks whose keyframes follow the schedules.

    Args:
        schedules: {file in models/loras: its strength over λ}.
        checkpoint: a file in models/checkpoints.
        shift: as for `percent_of`.
        always: a file in models/loras with LoRAs of the text encoders, which have strength 1 at each step; None: none.
        patch: the node that sets what the model predicts, and its inputs, as of `comfyui_node`; None: as its base.
    """
    nodes: dict[str, Any] = {}

    def node(kind: str, **inputs: Any) -> str:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return str(len(nodes))

    base = node("CheckpointLoaderSimple", ckpt_name=checkpoint)
    model, clip = [base, 0], [base, 1]
    if always is not None:
        both = node("LoraLoader", model=model, clip=clip, lora_name=always, strength_model=0.0, strength_clip=1.0)
        model, clip = [both, 0], [both, 1]
    if patch is not None:
        model = [node(patch[0], model=model, **patch[1]), 0]
    hooks = None
    for name, schedule in schedules.items():
        lora, previous = node("CreateHookLoraModelOnly", lora_name=name, strength_model=1.0), {}
        for start, strength in keyframes(schedule, shift):
            frame = node("CreateHookKeyframe", strength_mult=strength, start_percent=start, **previous)
            previous = {"prev_hook_kf": [frame, 0]}
        own = [node("SetHookKeyframes", hooks=[lora, 0], hook_kf=previous["prev_hook_kf"]), 0]
        hooks = own if hooks is None else [node("CombineHooks2", hooks_A=hooks, hooks_B=own), 0]
    clip = [node("SetClipHooks", clip=clip, hooks=hooks, apply_to_conds=True, schedule_clip=False), 0]
    sampled = node(
        "KSampler",
        model=model,
        positive=[node("CLIPTextEncode", clip=clip, text="a photo of sks dog"), 0],
        negative=[node("CLIPTextEncode", clip=clip, text=""), 0],
        latent_image=[node("EmptyLatentImage", width=1024, height=1024, batch_size=1), 0],
        **{"seed": 0, "steps": 30, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
    )
    decoded = node("VAEDecode", samples=[sampled, 0], vae=[base, 2])
    node("SaveImage", images=[decoded, 0], filename_prefix="nara")
    return nodes
