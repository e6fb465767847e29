"""`nara fold --bins` and `--bound`: several LoRAs, their schedules for hosts, and the measured error."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from nara_diffusion.export import PlainLora, to_lora, to_lora_bins
from nara_diffusion.export.bins.to_lora_bins import SCHEDULE_FILE, LoraBins
from nara_diffusion.export.hosts.files import DENOISERS
from nara_diffusion.export.hosts.schedules import host_schedules
from nara_diffusion.utils.atomic_write import atomic_write_files

from .adapter_file import MODEL, AdapterFile
from .skeleton import skeleton

FLOWS = ("sd3", "flux", "wan")
DISCRETE, FLOW = "timestep", "flow"  # names of λ's definitions in `nara_diffusion.noise.timesteps`
PEFT = "peft"
VIDEOS = ("wan",)
"""The bases for which there is no text-to-image workflow of ComfyUI."""
Write = Callable[[dict[str, PlainLora], Path, argparse.Namespace], None]


def fold_bins(file: AdapterFile, args: argparse.Namespace, write: Write) -> str:
    """Write the folder atomically, and return the text to show.

    Args:
        write: a function that writes one file of LoRAs by component.

    Raises:
        ValueError: no denoiser; several components for PEFT; a λ of which no schedule can be written, or that of a flow
            without --shift; see `to_lora_bins`.
    """
    name = next((name for name in (*DENOISERS, MODEL) if name in file.parts), None)
    if name is None:
        raise ValueError(f"'{file.path}' has no denoiser, but {', '.join(file.parts)}: their LoRAs have no λ.")
    part = file.parts[name]
    _check(args, part.config.noise_convention, list(file.parts))
    bins = to_lora_bins(skeleton(part, name), args.bins, bound=args.bound, interpolation=args.interpolation)
    if args.form == PEFT:
        bins.save_pretrained(args.output)
    else:
        others = {each: to_lora(skeleton(part, each)) for each, part in file.parts.items() if each != name}
        _write_files(bins, name, others, args, write)
    return f"{args.output}: {len(bins.loras)} LoRAs, ΔW differs by {bins.error.worst_update:.2%} at most"


def _check(args: argparse.Namespace, convention: str | None, components: list[str]) -> None:
    """Refuse adapters without a definition of λ from which a host's schedule can be written."""
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}, expected 1 or more.")
    if args.form == PEFT:
        if len(components) > 1:
            raise ValueError(f"--form peft holds one component, the file has {', '.join(components)}: choose another.")
        return
    is_flow = convention == FLOW
    if convention not in (None, FLOW, DISCRETE):
        raise ValueError(f"its λ is {convention!r}, of which no schedule is written: fold it at one --noise_level.")
    if convention is not None and args.base is not None and is_flow != (args.base in FLOWS):
        kind = "that of a flow" if args.base in FLOWS else "t / N"
        raise ValueError(
            f"--base {args.base} has a λ that is {kind}, and the file's is {convention!r}: choose its base."
        )
    if is_flow and args.shift is None:
        raise ValueError("its λ is that of a flow: give its --shift, which is 1 where the model isn't shifted.")
    if args.shift is not None and (not is_flow or args.shift < 1):
        raise ValueError(f"--shift is for adapters whose λ is that of a flow, and 1 or more; got {args.shift}.")


def _write_files(
    bins: LoraBins, component: str, others: dict[str, PlainLora], args: argparse.Namespace, write: Write
) -> None:
    stem = args.output.name
    names = [f"{stem}-{index}.safetensors" for index in range(len(bins.loras))]
    always = f"{stem}-text.safetensors" if others else None
    schedules = dict(zip(names, bins.schedules, strict=True))
    with atomic_write_files(args.output) as partial:
        for name, lora in zip(names, bins.loras, strict=True):
            write({component: lora}, partial / name, args)
        if always is not None:
            write(others, partial / always, args)
        workflow = args.base not in VIDEOS
        texts = host_schedules(schedules, args.checkpoint, args.steps, args.shift, always, workflow)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        entries = [
            {"file": name, "noise_level": level, "strength": schedule.as_lists()}
            for (name, schedule), level in zip(schedules.items(), bins.noise_levels, strict=True)
        ]
        (partial / SCHEDULE_FILE).write_text(json.dumps({"loras": entries}, indent=2) + "\n", encoding="utf-8")
        bins.error.save(partial)
