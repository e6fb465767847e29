"""`nara fold --bins`: several LoRAs, a ComfyUI workflow, and the measured error."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nara_diffusion.config import NaraConfig
from nara_diffusion.export import PlainLora, to_lora, to_lora_bins
from nara_diffusion.export.bins import SCHEDULE_FILE, LoraBins, refuse_earlier_parts
from nara_diffusion.export.hosts.comfyui_workflow import comfyui_workflow
from nara_diffusion.export.hosts.files import DENOISERS
from nara_diffusion.export.lora.scheduler import comfyui_node, flow_shift
from nara_diffusion.utils.atomic_write import atomic_write_files

from .adapter_file import MODEL, AdapterFile
from .skeleton import skeleton

FLOWS = ("sd3", "flux", "wan")
DISCRETE, FLOW = "timestep", "flow"  # names of λ's definitions in `nara_diffusion.noise.timesteps`
PEFT = "peft"
WORKFLOW_FILE = "comfyui_workflow.json"
VIDEOS = ("wan",)
"""The bases that get no ComfyUI workflow, since it is one of text to image."""
Write = Callable[[dict[str, PlainLora], Path, argparse.Namespace], None]


def fold_bins(file: AdapterFile, args: argparse.Namespace, write: Write) -> str:
    """Write the folder, all files or none, and return the text to show.

    Args:
        args: of `nara fold`. write: writes {component: its LoRA} to one file.

    Raises:
        ValueError: the file adapts no denoiser, or several components with --form peft; its λ has a definition for
            which no workflow can be written; a flow model without --shift; the folder has LoRAs of an earlier export
            that would stay; see `to_lora_bins`.
    """
    name = next((name for name in (*DENOISERS, MODEL) if name in file.parts), None)
    if name is None:
        raise ValueError(
            f"'{file.path}' adapts {', '.join(file.parts)} alone, which don't depend on λ: use --noise_level, for one "
            "LoRA."
        )
    part = file.parts[name]
    _check(args, part.config, file)
    bins = to_lora_bins(skeleton(part, name), args.bins)
    if args.form == PEFT:
        bins.save_pretrained(args.output)
    else:
        others = {each: to_lora(skeleton(part, each)) for each, part in file.parts.items() if each != name}
        _write_files(bins, name, others, args, write, part.config.scheduler)
    return f"{args.output}: {len(bins.loras)} LoRAs, the largest relative error of ΔW is {bins.error.worst_update:.2%}"


def _check(args: argparse.Namespace, config: NaraConfig, file: AdapterFile) -> None:
    """Raises ValueError unless a ComfyUI workflow can be written for this definition of λ.

    An adapter that carries a scheduler may have made its base a flow, so `--base` doesn't tell, and `--shift` is known.
    """
    if args.form == PEFT:
        check_single(list(file.parts))
        return
    convention, is_converted = config.noise_convention, config.scheduler is not None
    is_flow = convention == FLOW
    if convention not in (None, FLOW, DISCRETE):
        raise ValueError(
            f"'{file.path}' defines λ as {convention!r}, for which no workflow can be written: use --noise_level, or "
            "--form peft."
        )
    if not is_converted and None not in (convention, args.base) and is_flow != (args.base in FLOWS):
        kind = "is a flow model" if args.base in FLOWS else "has discrete timesteps"
        raise ValueError(
            f"--base {args.base} {kind}, but '{file.path}' defines λ as {convention!r}: choose the base that it was "
            "trained on."
        )
    if is_flow and args.shift is None and not is_converted and args.base not in VIDEOS:
        raise ValueError(f"'{file.path}' is for a flow model: give --shift, that of its scheduler, 1 if it has none.")
    if args.shift is not None and not (is_flow and 1 <= args.shift < math.inf):
        raise ValueError(f"--shift is {args.shift:g}: it is for adapters of flow models, 1 or more, and finite.")


def check_single(components: list[str]) -> None:
    """Raises ValueError if there are several components, which don't fit into one folder of PEFT."""
    if len(components) > 1:
        raise ValueError(
            f"--form peft writes one component, but the file has {', '.join(components)}: choose another --form, or "
            "split the file by nara convert --component."
        )


def _write_files(
    bins: LoraBins,
    component: str,
    others: dict[str, PlainLora],
    args: argparse.Namespace,
    write: Write,
    scheduler: dict[str, Any] | None,
) -> None:
    shift, patch = args.shift, None
    if scheduler is not None:
        shift = flow_shift(scheduler) if shift is None else shift
        patch = comfyui_node({**scheduler, "flow_shift": shift})
    stem = args.output.name
    names = [f"{stem}-{index}.safetensors" for index in range(len(bins.loras))]
    always = f"{stem}-text.safetensors" if others else None
    schedules = dict(zip(names, bins.schedules, strict=True))
    refuse_earlier_parts(args.output, [*names, always], rf"{re.escape(stem)}-(\d+|text)\.safetensors")
    with atomic_write_files(args.output) as partial:
        for name, lora in zip(names, bins.loras, strict=True):
            write({component: lora}, partial / name, args)
        if always is not None:
            write(others, partial / always, args)
        if args.base not in VIDEOS:
            workflow = comfyui_workflow(schedules, args.checkpoint, shift, always, patch)
            (partial / WORKFLOW_FILE).write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
        entries = [
            {"file": name, "noise_level": level, "strength": schedule.as_lists()}
            for (name, schedule), level in zip(schedules.items(), bins.noise_levels, strict=True)
        ]
        (partial / SCHEDULE_FILE).write_text(json.dumps({"loras": entries}, indent=2) + "\n", encoding="utf-8")
        bins.error.save(partial)
