"""Description of an adapter's file: base model, adapted modules, definition of λ, core, and size.

    nara inspect my-toy                                          # a folder of save_nara_weights, PEFT or a training
    nara inspect my-toy/pytorch_nara_weights.safetensors --json  # a file; JSON, for programs

The base model isn't needed. The line λ names the definition that the file gives: masked_share, the masked share of a
language model's answer; timestep, t / N; flow, σ; …
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nara_diffusion.export.adapter_factors import adapter_of_part
from nara_diffusion.loaders.file import AdapterFile, AdapterPart, naming
from nara_diffusion.loaders.strict import is_core_key

_CORE_FIELDS = {
    "hypernetwork": ("core_scale", "core_hidden_dims", "core_sharing", "core_input", "noise_embedding"),
    "constant": ("core_scale", "core_sharing"),
    "knots": ("core_scale", "core_knots", "core_sharing"),
    "bins": ("core_bins",),
    "rank_mask": ("rank_mask_min",),
    "identity": (),
}
"""{core_type: the fields that describe such a core}."""
_LABEL_WIDTH = 12


def described(file: AdapterFile) -> dict[str, Any]:
    """The description of a file, as `nara inspect --json` prints it."""
    path = file.path or Path()
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "components": {name: _described_part(part) for name, part in file.parts.items()},
    }


def _described_part(part: AdapterPart) -> dict[str, Any]:
    adapter_of_part(part)  # raises if it is damaged
    config, modules, core = part.config, part.modules, part.core
    factors = sum(tensor.numel() for key, tensor in part.tensors.items() if not is_core_key(key))
    fields = _CORE_FIELDS.get(config.core_type, ("core_sharing",))
    return {
        "method": "NaRA-DoRA" if config.use_dora else "NaRA",
        "base_model": config.base_model_name_or_path,
        "modules": len(modules),
        "module_kinds": _kinds(modules),
        "ranks": sorted(set(modules.values())),
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "core_type": config.core_type,
        "core": {name: getattr(config, name) for name in fields},
        "noise_convention": config.noise_convention,
        "strength": config.strength,
        "scheduler": config.scheduler,
        "parameters": {"factors": factors, "core": sum(tensor.numel() for tensor in core.values())},
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.tensors.values()}),
    }


def _kinds(modules: dict[str, int]) -> dict[str, int]:
    """{last word of the modules' names that is no number: how many modules have it}."""
    found: dict[str, int] = {}
    for name in modules:
        words = [word for word in name.split(".") if not word.isdigit()]
        found[words[-1]] = found.get(words[-1], 0) + 1
    return found


def text_of(found: dict[str, Any]) -> str:
    """The text of a description, as `nara inspect` prints it."""
    lines = [found["file"], _line("size", f"{found['bytes']:,} bytes"), _line("sha256", found["sha256"])]
    for name, part in found["components"].items():
        lines += ["", f"{name}: {part['method']}", *(_line(*row) for row in _rows(part))]
    return "\n".join(lines)


def _rows(part: dict[str, Any]) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in part["module_kinds"].items())
    ranks = ", ".join(map(str, part["ranks"]))
    core = ", ".join(f"{name} {value}" for name, value in part["core"].items())
    sizes = part["parameters"]
    rows = [
        ("base model", part["base_model"]),
        ("modules", f"{part['modules']}: {kinds}"),
        ("rank", f"{ranks}; lora_alpha {part['lora_alpha']}{', rsLoRA' if part['use_rslora'] else ''}"),
        ("core", f"{part['core_type']}{': ' if core else ''}{core}"),
        ("λ", part["noise_convention"] or ("not stated" if part["core_type"] != "identity" else None)),
        ("strength", part["strength"] and f"over λ: {part['strength']}"),
        ("scheduler", part["scheduler"] and json.dumps(part["scheduler"])),
        ("parameters", f"{sizes['factors'] + sizes['core']:,}: A and B {sizes['factors']:,}, core {sizes['core']:,}"),
        ("dtype", ", ".join(part["dtypes"])),
    ]
    return [(label, str(value)) for label, value in rows if value]


def _line(label: str, value: str) -> str:
    return f"  {label:<{_LABEL_WIDTH}}{value}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara inspect`."""
    parser = argparse.ArgumentParser(
        "nara inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="the adapter: a file, or a folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    with naming(args.file):
        found = described(AdapterFile.read(Path(args.file)))
    sys.stdout.write(f"{json.dumps(found, indent=2, default=list) if args.json else text_of(found)}\n")
