"""A NaRA's file at one noise level λ as a plain LoRA, for hosts that know only LoRA.

    nara fold my-toy toy.safetensors --noise_level 0.4 --form kohya --base sdxl      # A1111, Forge, InvokeAI, ComfyUI
    nara fold my-toy toy.safetensors --noise_level 0.4 --form comfyui --base flux    # ComfyUI, by its own names
    nara fold my-toy toy.safetensors --noise_level 0.4                               # Diffusers: load_lora_weights
    nara fold outputs/dllm-1 lora --noise_level 0.4 --form peft                      # a folder for PeftModel
    nara fold my-toy toys --bins 4 --form kohya --base sdxl                          # four LoRAs and their schedules
    nara fold my-toy toys --bound 0.05 --form comfyui --base flux --shift 3.16       # as many as 5 % need

At λ the LoRA is the NaRA exactly, elsewhere it is not: docs/export.md tells how far, and which λ to take. The base
model isn't needed. Text encoders, whose adapters don't depend on λ, go into the same file (--form peft: one component).

With --bins or --bound, OUTPUT is a folder: several LoRAs whose strengths change while sampling follow the NaRA at every
λ, to an error that is written and drawn beside them. The schedules stand there for ComfyUI (a workflow with hooks),
prompt-control, loractl, Wan2GP and WanVideoWrapper; LoRAs of text encoders are in a file of their own, always on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from nara_diffusion.export import PlainLora, to_lora
from nara_diffusion.export.bins.to_lora_bins import Interpolation
from nara_diffusion.export.hosts import BASES, FORMS, save_host_file
from nara_diffusion.export.hosts.unet import SD15, SDXL, UNetLayout

from .adapter_file import MODEL, AdapterFile, read
from .errors import in_one_line
from .fold_bins import PEFT, fold_bins
from .skeleton import skeleton


def folded(file: AdapterFile, level: float) -> dict[str, PlainLora]:
    """{component: its plain LoRA at λ = `level`}.

    Raises:
        ValueError: λ outside of [0, 1], a damaged file, or what is no plain LoRA at any λ.
    """
    return {name: to_lora(skeleton(part, name), level) for name, part in file.parts.items()}


def write(loras: dict[str, PlainLora], output: Path, args: argparse.Namespace) -> None:
    """Write the file, or with "peft" the folder.

    Raises:
        ValueError: there are several components for PEFT, no base for a form that needs one, or no component.
    """
    if args.form == PEFT:
        if len(loras) > 1:
            raise ValueError(f"--form peft holds one component, the file has {', '.join(loras)}: choose another form.")
        next(iter(loras.values())).save_pretrained(output)
        return
    if MODEL in loras:
        raise ValueError(
            "the adapter is in PEFT's form, which names no component of a pipeline: fold it by --form peft, or "
            "bring it into a pipeline's form first, by nara convert."
        )
    if args.base is None and args.form != "diffusers":
        raise ValueError(
            f"--form {args.form} needs --base, one of {', '.join(BASES)}: what the adapter was trained on."
        )
    base = args.base or BASES[0]  # Diffusers' names are the same for each
    save_host_file(loras, output, args.form, base, _layout(base, args.layers_per_block))


def _layout(base: str, layers_per_block: int | None) -> UNetLayout | None:
    if layers_per_block is None:
        return None
    return UNetLayout(layers_per_block, (SD15 if base == "sd15" else SDXL).attention_up_blocks)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "nara fold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="the adapter: a file, or a folder")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a .safetensors file; a folder with --form peft")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--noise_level", type=float, help="λ in [0, 1], 1 is pure noise: one LoRA")
    amount.add_argument("--bins", type=int, help="LoRAs, at most")
    amount.add_argument("--bound", type=float, help="as many LoRAs as keep the error of ΔW below it at each λ")
    parser.add_argument(
        "--interpolation",
        choices=get_args(Interpolation),
        default="linear",
        help="of several LoRAs: each fades into the next (linear, nearer), or one at a time (constant); "
        "default: %(default)s",
    )
    parser.add_argument("--form", choices=(*FORMS, PEFT), default="diffusers", help="default: %(default)s")
    parser.add_argument("--base", choices=BASES, help="what the adapter was trained on")
    parser.add_argument("--layers_per_block", type=int, help="of a UNet that has another number than Stability's 2")
    parser.add_argument("--shift", type=float, help="of a flow model, for the schedules (SD3 3, FLUX e^1.15 = 3.16)")
    parser.add_argument("--steps", type=int, default=30, help="of sampling, for schedules by step (default: 30)")
    parser.add_argument("--checkpoint", default="sd_xl_base_1.0.safetensors", help="that ComfyUI's workflow loads")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara fold`."""
    args = parse_arguments(argv)
    with in_one_line():
        file = read(args.file)
        if args.noise_level is None:
            sys.stdout.write(f"{fold_bins(file, args, write)}\n")
            return
        loras = folded(file, args.noise_level)
        write(loras, args.output, args)
        modules = sum(len(lora.layers) for lora in loras.values())
        sys.stdout.write(f"{args.output}: {modules} modules, λ = {args.noise_level:g}\n")
