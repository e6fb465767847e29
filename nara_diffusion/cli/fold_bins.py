"""`nara fold --bins` and `--bound`: several LoRAs, their schedules for hosts, and the measured error."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from nara_diffusion.export import PlainLora, to_lora, to_lora_bins
from nara_diffusion.export.bins import SCHEDULE_FILE, LoraBins
from nara_diffusion.export.hosts.files import DENOISERS
from nara_diffusion.export.hosts.schedules import host_schedules
from nara_diffusion.utils.atomic_write import atomic_write_files

from .adapter_file import MODEL, AdapterFile
from .skeleton import skeleton

FLOWS = ("sd3", "flux", "wan")
Write = Callable[[dict[str, PlainLora], Path, argparse.Namespace], None]


def fold_bins(file: AdapterFile, args: argparse.Namespace, write: Write) -> str:
    """Writes the folder, whole or not at all; returns what to show.

    Args:
        write: one file of LoRAs by component.

    Raises:
        ValueError: a flow model without --shift, fewer than one step, no denoiser; see `to_lora_bins`.
    """
    name = next((name for name in (*DENOISERS, MODEL) if name in file.parts), None)
    if name is None:
        raise ValueError(f"'{file.path}' has no denoiser, but {', '.join(file.parts)}: their LoRAs have no λ.")
    _check(args)
    bins = to_lora_bins(skeleton(file.parts[name], name), args.bins, bound=args.bound)
    if args.form == "peft":
        bins.save_pretrained(args.output)
    else:
        others = {each: to_lora(skeleton(part, each)) for each, part in file.parts.items() if each != name}
        _write_files(bins, name, others, args, write)
    return f"{args.output}: {len(bins.loras)} LoRAs, ΔW differs by {bins.error.worst_update:.2%} at most"


def _check(args: argparse.Namespace) -> None:
    if args.base in FLOWS and args.shift is None and args.form != "peft":
        raise ValueError(f"--base {args.base} samples by a flow: give its --shift, which is 1 where it isn't shifted.")
    if args.base not in FLOWS and args.shift is not None:
        raise ValueError(f"--shift is for flows ({', '.join(FLOWS)}), got --base {args.base}.")
    if args.shift is not None and args.shift < 1:
        raise ValueError(f"--shift is {args.shift}, expected 1 or more.")
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}, expected 1 or more.")


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
        for name, text in host_schedules(schedules, args.checkpoint, args.steps, args.shift, always).items():
            (partial / name).write_text(text, encoding="utf-8")
        entries = [
            {"file": name, "noise_level": level, "strength": schedule.as_lists()}
            for (name, schedule), level in zip(schedules.items(), bins.noise_levels, strict=True)
        ]
        (partial / SCHEDULE_FILE).write_text(json.dumps({"loras": entries}, indent=2) + "\n", encoding="utf-8")
        bins.error.save(partial)
