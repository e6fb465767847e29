"""The command `nara fold`: export of a NaRA to plain LoRAs, for programs that know only LoRA."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME

from nara_diffusion.config import NaraConfig
from nara_diffusion.export.adapter_factors import Adapter, adapter_of_part
from nara_diffusion.export.bins import LoraBins, bins_of
from nara_diffusion.export.host_files import BASES, DENOISERS, comfyui_workflow, save_host_file
from nara_diffusion.export.plain_lora import PlainLora, comfyui_node, flow_shift
from nara_diffusion.export.to_lora import lora_of
from nara_diffusion.loaders.file import MODEL, AdapterFile, naming
from nara_diffusion.utils.atomic_write import atomic_write_files

PEFT = "peft"
_FLOWS, _VIDEOS = ("sd3", "flux", "wan"), ("wan",)


def fold(args: Any) -> str:
    """Export of a NaRA to plain LoRAs, for programs that know only LoRA. The base model isn't needed.

        nara fold my-toy toy.safetensors --noise_level 0.4 --form kohya --base sdxl    # A1111, Forge, InvokeAI, ComfyUI
        nara fold my-toy toy.safetensors --noise_level 0.4 --form comfyui --base flux  # ComfyUI, by its own keys
        nara fold my-toy toy.safetensors --noise_level 0.4                             # Diffusers; no ComfyUI with SDXL
        nara fold my-toy toy.safetensors --noise_level best                            # the LoRA nearest over all λ
        nara fold outputs/dllm-1 lora --noise_level 0.4 --form peft                    # a folder for PeftModel
        nara fold my-toy toys --bins 4 --form kohya --base sdxl                        # four LoRAs and their strengths
        nara fold my-toy toys --bins 8 --form comfyui --base flux --shift 3.16         # of a flow model

    With --noise_level, the LoRA equals the NaRA at that λ (1 = pure noise) and differs at any other: docs/export.md
    says by how much, and which λ to choose. Adapters of text encoders don't depend on λ and go into the same file
    (--form peft writes one component).

    With --bins, OUTPUT is a folder with several LoRAs whose strengths change during sampling, so that their sum
    follows the NaRA at every λ. Beside them are the measured error, the strengths over λ (lora_bins.json) and a ComfyUI
    workflow with hooks. LoRAs of text encoders are in a file of their own, always on.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # of the scheduler that the result needs
    file = AdapterFile.read(Path(args.file))
    with naming(args.file):
        adapters = {name: adapter_of_part(part) for name, part in file.parts.items()}
    _check(file, args)
    text = (_fold_bins if args.noise_level is None else _fold)(file, adapters, args)
    return f"{args.output}: {text}{_not_for_comfyui(file) if args.form == 'diffusers' else ''}"


def _fold(file: AdapterFile, adapters: Mapping[str, Adapter], args: Any) -> str:
    if args.form != PEFT and args.output.suffix != ".safetensors":
        raise ValueError(f"OUTPUT {args.output} is no .safetensors file, and programs find no other: name one.")
    written = args.output / PEFT_WEIGHTS_NAME if args.form == PEFT else args.output
    if written.exists() and written.samefile(file.path or ""):
        raise ValueError(f"OUTPUT {args.output} is the adapter itself, which would be lost: name another.")
    loras = {name: lora_of(adapter, args.noise_level) for name, adapter in adapters.items()}
    if args.form == PEFT:
        next(iter(loras.values())).save_pretrained(args.output)
    else:
        _save(loras, args.output, args)
    modules = sum(len(lora.layers) for lora in loras.values())
    if args.noise_level == "best":
        errors = [lora.error.worst_update for lora in loras.values() if lora.error is not None]
        return f"{modules} modules, nearest over all λ, the largest relative error of ΔW is {max(errors):.2%}"
    level = torch.tensor([args.noise_level])
    own = ", ".join(f"{each.at(level).item():g}" for adapter in adapters.values() for each in adapter.schedules)
    return f"{modules} modules, λ = {args.noise_level:g}{f', at its strength of {own} there' if own else ''}"


def _fold_bins(file: AdapterFile, adapters: Mapping[str, Adapter], args: Any) -> str:
    """Write a folder of several LoRAs, all files or none."""
    name = next((name for name in (*DENOISERS, MODEL) if name in file.parts), None)
    if name is None:
        raise ValueError(f"'{file.path}' adapts {', '.join(file.parts)} alone, which need no λ: use --noise_level.")
    config = file.parts[name].config
    if args.form != PEFT:
        _check_workflow(args, config)
    bins = bins_of(adapters[name], args.bins)
    if args.form == PEFT:
        bins.save_pretrained(args.output)
    else:
        others = {each: lora_of(adapter, None) for each, adapter in adapters.items() if each != name}
        _save_bins(bins, name, others, args, config)
    return f"{len(bins.loras)} LoRAs, the largest relative error of ΔW is {bins.error.worst_update:.2%}"


def _save(loras: Mapping[str, PlainLora], output: Path, args: Any) -> None:
    save_host_file(loras, output, args.form, args.base or BASES[0], args.layers_per_block)  # Diffusers' keys need none


def _save_bins(bins: LoraBins, component: str, others: Mapping[str, PlainLora], args: Any, config: NaraConfig) -> None:
    shift, patch, stem = args.shift, None, args.output.name
    if config.scheduler is not None:
        shift = flow_shift(config.scheduler) if shift is None else shift
        patch = comfyui_node({**config.scheduler, "flow_shift": shift})
    names = [f"{stem}-{index}.safetensors" for index in range(len(bins.loras))]
    always = f"{stem}-text.safetensors" if others else None
    with atomic_write_files(args.output) as partial:
        for name, lora in zip(names, bins.loras, strict=True):
            _save({component: lora}, partial / name, args)
        if always is not None:
            _save(others, partial / always, args)
        if args.base not in _VIDEOS:  # the workflow is one of text to image
            checkpoint = args.checkpoint or "sd_xl_base_1.0.safetensors"
            schedules = dict(zip(names, bins.schedules, strict=True))
            workflow = comfyui_workflow(schedules, checkpoint, shift, always, patch)
            (partial / "comfyui_workflow.json").write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
        bins.save_strengths(partial, "file", names)


def _not_for_comfyui(file: AdapterFile) -> str:
    """What ComfyUI would leave out of a file of Diffusers' form, without an error."""
    if any(part.config.use_dora for part in file.parts.values()):
        return "; not for ComfyUI, which reads no DoRA"
    if "unet" in file.parts:
        return "; not for ComfyUI, which reads no attention of a UNet in this form: use --form kohya there"
    return ""


# ---------------------------------------------------------------------- refused


def _check(file: AdapterFile, args: Any) -> None:
    given = [name for name in ("shift", "checkpoint") if getattr(args, name) is not None]
    if args.noise_level is not None and given:
        raise ValueError(f"--{given[0]}: for --bins alone, leave it out with --noise_level.")
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


def _check_workflow(args: Any, config: NaraConfig) -> None:
    """Raises ValueError unless a ComfyUI workflow can be written for this definition of λ.

    An adapter that carries a scheduler may have made its base a flow, so `--base` does not say, and `--shift` is known.
    """
    convention, is_converted = config.noise_convention, config.scheduler is not None
    is_flow = convention == "flow"
    if convention not in (None, "flow", "timestep"):
        raise ValueError(
            f"λ is {convention!r}, for which no workflow can be written: use --noise_level or --form peft."
        )
    if not is_converted and None not in (convention, args.base) and is_flow != (args.base in _FLOWS):
        raise ValueError(
            f"--base {args.base} doesn't go with λ as {convention!r}: choose the base that it was trained on."
        )
    if is_flow and args.shift is None and not is_converted and args.base not in _VIDEOS:
        raise ValueError("the adapter is for a flow model: give --shift, that of its scheduler, 1 if it has none.")
    if args.shift is not None and not (is_flow and 1 <= args.shift < math.inf):
        raise ValueError(f"--shift is {args.shift:g}: it is for adapters of flow models, 1 or more, and finite.")
