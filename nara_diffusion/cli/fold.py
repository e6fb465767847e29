"""The command `nara fold`: write a NaRA as a plain LoRA, for programs that know only LoRA."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME

from nara_diffusion.export.adapter_factors import Adapter, adapter_of_part
from nara_diffusion.export.host_files import BASES, save_host_file
from nara_diffusion.export.plain_lora import PlainLora
from nara_diffusion.export.to_lora import lora_of
from nara_diffusion.loaders.file import MODEL, AdapterFile
from nara_diffusion.utils.files import check_free

PEFT = "peft"
_HOST = {"transformer_2": "transformer"}
"""{component: its name in other programs' files}. They load one file for each transformer."""


def fold(args: Namespace) -> str:
    """Write a NaRA as a plain LoRA, for programs that know only LoRA. The base model isn't needed.

        nara fold my-toy toy.safetensors --noise_level 0.4 --form kohya --base sdxl
            # A1111, Forge, InvokeAI, ComfyUI
        nara fold my-toy toy.safetensors --noise_level 0.4 --form comfyui --base flux
            # ComfyUI, by its own keys
        nara fold my-toy toy.safetensors --noise_level 0.4   # Diffusers; no ComfyUI with SDXL
        nara fold my-toy toy.safetensors --noise_level best  # the LoRA nearest over all λ
        nara fold outputs/dllm-1 lora --noise_level 0.4 --form peft  # a folder for PeftModel

    The LoRA equals the NaRA at the chosen λ (1 = pure noise) and differs at any other;
    docs/export.md says by how much, and how to choose λ. Adapters of text encoders don't depend on
    λ and go into the same file; --form peft writes only one component. --component writes one of
    several: each transformer of Wan 2.2 gets its own file, at a λ that it runs at.

        nara fold my-toy low.safetensors --noise_level 0.4 --form comfyui --base wan \\
            --component transformer_2
    """
    file = AdapterFile.read(Path(args.file))
    if args.component is not None:
        if args.component not in file.parts:
            raise ValueError(
                f"The file has {', '.join(file.parts)}: choose one of them, not {args.component!r}."
            )
        file = replace(file, parts={args.component: file.parts[args.component]})
    _check(file, args)
    adapters = {_HOST.get(name, name): adapter_of_part(part) for name, part in file.parts.items()}
    loras = {name: lora_of(adapter, args.noise_level) for name, adapter in adapters.items()}
    if args.form == PEFT:
        next(iter(loras.values())).save_pretrained(args.output)
    else:
        base = args.base or BASES[0]  # Diffusers' keys don't depend on the base
        save_host_file(loras, args.output, args.form, base)
    ending = ""  # ComfyUI silently drops some layers of Diffusers' form
    if args.form == "diffusers" and any(part.config.use_dora for part in file.parts.values()):
        ending = "; not for ComfyUI, which reads no DoRA"
    elif args.form == "diffusers" and "unet" in file.parts:
        ending = "; not for ComfyUI, which needs --form kohya for a UNet"
    return f"{args.output}: {_described(loras, adapters, args.noise_level)}{ending}"


def _described(
    loras: Mapping[str, PlainLora], adapters: Mapping[str, Adapter], noise_level: float | str
) -> str:
    """Return text with the number of modules and a description of the LoRA at `noise_level`."""
    modules = sum(len(lora.layers) for lora in loras.values())
    if not isinstance(noise_level, float):
        errors = [lora.error.worst_update for lora in loras.values() if lora.error is not None]
        worst = f"the largest relative error of ΔW is {max(errors):.2%}"
        return f"{modules} modules, nearest over all λ, {worst}"
    strengths = []
    for adapter in adapters.values():
        if adapter.schedule is not None:
            strengths.append(f"{adapter.schedule.at(torch.tensor([noise_level])).item():g}")
    strength = f", at its strength of {', '.join(strengths)} there" if strengths else ""
    return f"{modules} modules, λ = {noise_level:g}{strength}"


def _check(file: AdapterFile, args: Namespace) -> None:
    """Raise ValueError if the form can't store the adapter or needs the base, or for a wrong OUTPUT.

    OUTPUT has a wrong name, is the adapter itself, or exists.
    """
    if len(file.adapters) > 1:
        raise ValueError(
            f"The file has several adapters, {', '.join(file.parts)}, and one LoRA can't switch between them. Split "
            "the file with nara convert --component."
        )
    is_split = args.form == PEFT or file.parts.keys() >= {*_HOST, *_HOST.values()}
    if is_split and len(file.parts) > 1:
        kind = (
            "a folder of PEFT has one component"
            if args.form == PEFT
            else "a LoRA has one transformer"
        )
        raise ValueError(
            f"{kind}, but the file has {', '.join(file.parts)}: choose one with --component."
        )
    if args.form != PEFT and MODEL in file.parts:
        raise ValueError(
            "The adapter's file names no component of a pipeline. Use --form "
            "peft, or convert it first with nara convert --to pipeline."
        )
    if args.base is None and args.form not in (PEFT, "diffusers"):
        raise ValueError(
            f"--form {args.form} needs --base, one of {', '.join(BASES)}: the model that the "
            "adapter was trained on."
        )
    output = args.output
    if args.form != PEFT and output.suffix != ".safetensors":
        raise ValueError(
            f"OUTPUT must end in .safetensors, since other programs look for that name, but it is '{output}'."
        )
    written = [output]
    if args.form == PEFT:
        written = [output / PEFT_WEIGHTS_NAME, output / PEFT_CONFIG_NAME]
    if written[0].exists() and written[0].samefile(file.path or ""):
        raise ValueError(
            f"OUTPUT {output} is the adapter itself, which would be lost. Choose another name."
        )
    check_free(written, args.overwrite)
