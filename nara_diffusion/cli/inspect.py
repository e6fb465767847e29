"""Description of an adapter's file: base model, adapted modules, definition of λ, core, and size.

    nara inspect my-toy                                          # a folder of save_nara_weights, PEFT or a training
    nara inspect my-toy/pytorch_nara_weights.safetensors --json  # a file; JSON, for programs

The base model isn't needed. The line λ names the definition that the file gives: masked_share, the masked share of a
language model's answer; timestep, t / N; flow, σ; …
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from nara_diffusion.export.adapter_factors import adapter_of_part, cores_of
from nara_diffusion.loaders.file import AdapterFile, AdapterPart, naming

_CORE_FIELDS = {
    "hypernetwork": ("core_scale", "core_hidden_dims", "core_sharing", "noise_embedding"),
    "constant": ("core_scale", "core_sharing"),
    "knots": ("core_scale", "core_knots", "core_sharing"),
    "bins": ("core_bins",),
    "rank_mask": ("rank_mask_min",),
    "identity": (),
}
"""{core_type: the fields that describe such a core}."""


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
    config, modules = part.config, part.modules
    kinds = Counter(next(word for word in reversed(name.split(".")) if not word.isdigit()) for name in modules)
    factors = sum(tensor.numel() for tensor in part.tensors.values()) - sum(t.numel() for t in part.core.values())
    core = sum(parameter.numel() for parameter in cores_of(part).parameters())  # without Fourier frequencies, …
    fields = ("base_model_name_or_path", "lora_alpha", "use_rslora", "core_type", "noise_convention", "strength")
    return {
        "method": "NaRA-DoRA" if config.use_dora else "NaRA",
        "modules": len(modules),
        "module_kinds": dict(kinds),
        "ranks": sorted(set(modules.values())),
        **{name.removesuffix("_name_or_path"): getattr(config, name) for name in (*fields, "scheduler")},
        "core": {name: getattr(config, name) for name in _CORE_FIELDS.get(config.core_type, ("core_sharing",))},
        "parameters": {"core": core, "factors": factors},
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.tensors.values()}),
    }


def text_of(found: dict[str, Any]) -> str:
    """The text of a description, as `nara inspect` prints it."""
    lines = [f"{found['file']}: {found['bytes']:,} bytes, sha256 {found['sha256']}"]
    for name, part in found["components"].items():
        sizes = part["parameters"]
        total = f"{sum(sizes.values()):,}: A and B {sizes['factors']:,}, core {sizes['core']:,}"
        rows = {**part, "parameters": total, "noise_convention": part["noise_convention"] or "not stated"}
        rows["base_model"] = part["base_model"] or "not stored in this file"
        lines += ["", f"{name}: {part['method']}"]
        lines += [f"  {label:<17} {_words(value)}" for label, value in rows.items() if value and label != "method"]
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def run(args: Any) -> str:
    """The command `nara inspect`."""
    with naming(args.file):
        found = described(AdapterFile.read(Path(args.file)))
    return json.dumps(found, indent=2, default=list) if args.json else text_of(found)
