"""Export of a NaRA to plain LoRAs, for programs that know only LoRA. The base model isn't needed.

    nara fold my-toy toy.safetensors --noise_level 0.4 --form kohya --base sdxl      # A1111, Forge, InvokeAI, ComfyUI
    nara fold my-toy toy.safetensors --noise_level 0.4 --form comfyui --base flux    # ComfyUI, by its own keys
    nara fold my-toy toy.safetensors --noise_level 0.4                               # Diffusers; not ComfyUI with SDXL
    nara fold outputs/dllm-1 lora --noise_level 0.4 --form peft                      # a folder for PeftModel
    nara fold my-toy toys --bins 4 --form kohya --base sdxl                          # four LoRAs and their strengths
    nara fold my-toy toys --bins 8 --form comfyui --base flux --shift 3.16           # of a flow model

With --noise_level, the LoRA equals the NaRA at that λ (1 = pure noise) and differs at any other: docs/export.md says by
how much, and which λ to choose. Adapters of text encoders don't depend on λ and go into the same file (--form peft
writes one component).

With --bins, OUTPUT is a folder with several LoRAs whose strengths change during sampling, so that their sum
follows the NaRA at every λ. Beside them are the measured error, the strengths over λ (lora_bins.json) and a ComfyUI
workflow with hooks. LoRAs of text encoders are in a file of their own, always on.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME

from nara_diffusion.export import PlainLora, to_lora
from nara_diffusion.export.hosts import BASES, FORMS, save_host_file
from nara_diffusion.export.hosts.unet import SD15, SDXL, UNetLayout

from .adapter_file import MODEL, AdapterFile, read, strength_of
from .errors import in_one_line
from .fold_bins import PEFT, check_single, fold_bins
from .skeleton import skeleton

OF_SCHEDULES = {"shift": None, "checkpoint": "sd_xl_base_1.0.safetensors"}
"""{argument that only several LoRAs have: its default}."""


def folded(file: AdapterFile, level: float) -> dict[str, PlainLora]:
    """{component: its plain LoRA at λ = `level`}.

    Raises:
        ValueError: λ is outside of [0, 1], the file is damaged, or see `to_lora`.
    """
    return {name: to_lora(skeleton(part, name), level) for name, part in file.parts.items()}


def write(loras: dict[str, PlainLora], output: Path, args: argparse.Namespace) -> None:
    """Write the file, or, with --form peft, the folder.

    Raises:
        ValueError: several components with --form peft; no --base with a form that needs it; an adapter in PEFT's
            format, which names no component, with any form but peft; see `save_host_file`.
    """
    if args.form == PEFT:
        check_single(list(loras))
        next(iter(loras.values())).save_pretrained(output)
        return
    if MODEL in loras:
        raise ValueError(
            "the adapter is in PEFT's form, which names no component of a pipeline: use --form peft, or convert it "
            "first by nara convert --to pipeline."
        )
    if args.base is None and args.form != "diffusers":
        raise ValueError(
            f"--form {args.form} needs --base, one of {', '.join(BASES)}: the model that the adapter was trained on."
        )
    base = args.base or BASES[0]  # Diffusers' keys are the same for each
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
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, help="a .safetensors file; a folder with --bins or --form peft"
    )
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--noise_level", type=float, help="one LoRA, of this λ in [0, 1], 1 = pure noise")
    amount.add_argument("--bins", type=int, help="several LoRAs: their largest number, 1 to 64")
    parser.add_argument(
        "--form",
        choices=(*FORMS, PEFT),
        default="diffusers",
        help="format of the files (default: %(default)s); "
        "in ComfyUI diffusers is for FLUX and SD3 alone, and DoRA is for diffusers and peft alone",
    )
    parser.add_argument(
        "--base", choices=BASES, help="the model that the adapter was trained on, for kohya and comfyui"
    )
    parser.add_argument("--layers_per_block", type=int, help="of the UNet's configuration, if it isn't 2")
    parser.add_argument(
        "--shift",
        type=float,
        help="of a flow model's scheduler, for ComfyUI's workflow, 1 or more (SD3 3, FLUX e^1.15 = 3.16)",
    )
    parser.add_argument(
        "--checkpoint",
        help=f"the file in models/checkpoints that ComfyUI's workflow loads (default: {OF_SCHEDULES['checkpoint']})",
    )
    return parser.parse_args(argv)


def _settle_schedules(args: argparse.Namespace) -> None:
    """Fill in what is not given of `OF_SCHEDULES`; one LoRA has none, and refuses them."""
    given = [f"--{name}" for name in OF_SCHEDULES if getattr(args, name) is not None]
    if args.noise_level is not None and given:
        raise ValueError(f"{', '.join(given)}: for --bins alone, leave it out with --noise_level.")
    for name, default in OF_SCHEDULES.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _check_output(file: AdapterFile, args: argparse.Namespace) -> None:
    """Raises ValueError for an OUTPUT that no host finds, or that is the adapter's own file."""
    if args.layers_per_block is not None and args.layers_per_block < 1:
        raise ValueError(f"--layers_per_block is {args.layers_per_block}, expected 1 or more.")
    if args.noise_level is None:
        return
    if args.form != PEFT and args.output.suffix != ".safetensors":
        raise ValueError(f"OUTPUT {args.output} is no .safetensors file, and programs find no other: name one.")
    written = args.output / PEFT_WEIGHTS_NAME if args.form == PEFT else args.output
    if written.exists() and written.samefile(file.path):
        raise ValueError(f"OUTPUT {args.output} is the adapter itself, which would be lost: name another.")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara fold`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # of the scheduler that the result needs
    args = parse_arguments(argv)
    with in_one_line():
        file = read(args.file)
        _settle_schedules(args)
        _check_output(file, args)
        if args.noise_level is None:
            sys.stdout.write(f"{fold_bins(file, args, write)}{_not_for_comfyui(file, args)}\n")
            return
        loras = folded(file, args.noise_level)
        write(loras, args.output, args)
        modules = sum(len(lora.layers) for lora in loras.values())
        told = f"λ = {args.noise_level:g}{_strength(file, args)}{_not_for_comfyui(file, args)}"
        sys.stdout.write(f"{args.output}: {modules} modules, {told}\n")


def _strength(file: AdapterFile, args: argparse.Namespace) -> str:
    """What is told of the adapter's own strength at λ, which the LoRA includes."""
    level = torch.tensor([args.noise_level], dtype=torch.float32)
    found = [
        f"{strength_of(part.config, level).item():g}"
        for part in file.parts.values()
        if part.config.strength is not None
    ]
    return f", at the adapter's strength of {', '.join(found)} there" if found else ""


def _not_for_comfyui(file: AdapterFile, args: argparse.Namespace) -> str:
    """What ComfyUI would leave out of a file of Diffusers' form, without an error."""
    if args.form != "diffusers":
        return ""
    if any(part.config.use_dora for part in file.parts.values()):
        return "; not for ComfyUI, which reads no DoRA"
    if "unet" in file.parts:
        return "; not for ComfyUI, which reads no attention of a UNet in this form: use --form kohya there"
    return ""
