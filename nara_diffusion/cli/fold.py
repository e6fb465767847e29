"""The command `nara fold`: write a NaRA as a plain LoRA, for programs that know only LoRA."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME

from nara_diffusion.export.adapter_factors import Adapter, adapter_of_part
from nara_diffusion.export.host_files import BASES, save_host_file
from nara_diffusion.export.to_lora import lora_of
from nara_diffusion.loaders.file import MODEL, AdapterFile
from nara_diffusion.utils.atomic_write import check_free

PEFT = "peft"


def fold(args: Any) -> str:
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
    λ and go into the same file; --form peft writes only one component.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s"
    )  # shows the warning about the scheduler that the result needs
    file = AdapterFile.read(Path(args.file))
    adapters = {name: adapter_of_part(part) for name, part in file.parts.items()}
    _check(file, args)
    text = _fold(file, adapters, args)
    return f"{args.output}: {text}{_not_for_comfyui(file) if args.form == 'diffusers' else ''}"


def _fold(file: AdapterFile, adapters: Mapping[str, Adapter], args: Any) -> str:
    if args.form != PEFT and args.output.suffix != ".safetensors":
        raise ValueError(
            f"OUTPUT must end in .safetensors, got '{args.output}': other programs look for that name."
        )
    written = args.output / PEFT_WEIGHTS_NAME if args.form == PEFT else args.output
    if written.exists() and written.samefile(file.path or ""):
        raise ValueError(
            f"OUTPUT {args.output} is the adapter itself, which would be lost: choose another name."
        )
    config = [args.output / PEFT_CONFIG_NAME] if args.form == PEFT else []
    check_free([written, *config], args.overwrite)
    loras = {name: lora_of(adapter, args.noise_level) for name, adapter in adapters.items()}
    if args.form == PEFT:
        next(iter(loras.values())).save_pretrained(args.output)
    else:
        base = args.base or BASES[0]  # Diffusers' keys don't depend on the base
        save_host_file(loras, args.output, args.form, base)
    modules = sum(len(lora.layers) for lora in loras.values())
    if args.noise_level == "best":
        errors = [lora.error.worst_update for lora in loras.values() if lora.error is not None]
        return f"{modules} modules, nearest over all λ, the largest relative error of ΔW is {max(errors):.2%}"
    level = torch.tensor([args.noise_level])
    own = ", ".join(
        f"{each.at(level).item():g}" for adapter in adapters.values() for each in adapter.schedules
    )
    return f"{modules} modules, λ = {args.noise_level:g}{f', at its strength of {own} there' if own else ''}"


def _not_for_comfyui(file: AdapterFile) -> str:
    """Return a warning about what ComfyUI silently drops from a file of Diffusers' form."""
    if any(part.config.use_dora for part in file.parts.values()):
        return "; not for ComfyUI, which reads no DoRA"
    if "unet" in file.parts:
        return "; not for ComfyUI, which reads no attention of a UNet in this form: use --form kohya there"
    return ""


# ---------------------------------------------------------------------- checks


def _check(file: AdapterFile, args: Any) -> None:
    if args.form == PEFT and len(file.parts) > 1:
        raise ValueError(
            f"--form peft writes one component, but the file has {', '.join(file.parts)}: choose another --form, or "
            "split the file by nara convert --component."
        )
    if args.form != PEFT and MODEL in file.parts:
        raise ValueError(
            "the adapter is in PEFT's form, which names no component of a pipeline: use --form peft, or convert it "
            "first by nara convert --to pipeline."
        )
    if args.base is None and args.form not in (PEFT, "diffusers"):
        raise ValueError(
            f"--form {args.form} needs --base, one of {', '.join(BASES)}: the model that the adapter was trained on."
        )
