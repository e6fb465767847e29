"""The commands `nara inspect`, `nara plot`, `nara convert` and `nara fold`."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.auto_model import AutoModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nara_diffusion.cores.core_set import is_core_key
from nara_diffusion.export.adapter_factors import Adapter, adapter_of_part, cores_of, schedule_of
from nara_diffusion.export.host_files import BASES, LYCORIS_WEIGHTS, save_host_file, save_lycoris
from nara_diffusion.export.plain_lora import PlainLora
from nara_diffusion.export.to_lora import lora_of
from nara_diffusion.loaders.adapter_part import AdapterPart
from nara_diffusion.loaders.components import check_storable
from nara_diffusion.loaders.file import MODEL, AdapterFile, naming
from nara_diffusion.loaders.tensor_files import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME
from nara_diffusion.loaders.tlora import LYCORIS_CONFIG_NAME
from nara_diffusion.utils.files import atomic_write, check_free

_CORE_FIELDS = {
    "hypernetwork": ("core_scale", "core_hidden_dims", "core_sharing", "noise_embedding"),
    "constant": ("core_scale", "core_sharing"),
    "knots": ("core_scale", "core_knots", "core_sharing"),
    "bins": ("core_bins",),
    "rank_mask": ("rank_mask_min", "rank_mask_exponent", "rank_mask_step"),
    "identity": (),
}
"""{core_type: the fields that describe such a core}."""
_FIELDS = ("lora_alpha", "use_rslora", "core_type", "noise_convention", "strength")
"""The fields of the configuration that `nara inspect` shows of every adapter."""


def inspect(args: Namespace) -> str:
    """Describe an adapter's file: base model, adapted modules, definition of λ, core, and size.

        nara inspect my-toy                  # a folder of save_nara_weights, PEFT or a training
        nara inspect my-toy/pytorch_nara_weights.safetensors --json  # a file; JSON, for programs

    The base model isn't needed. The line noise_convention is this adapter's definition of λ:
    masked_share, the share of a language model's answer that is masked; timestep, t / N; flow, σ; …
    """
    file = AdapterFile.read(Path(args.file), without_base=True)
    content = (file.path or Path()).read_bytes()
    description: dict[str, Any] = {
        "file": str(file.path),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "components": {name: _described(part) for name, part in file.parts.items()},
    }
    if file.other is not None:
        for rows in description["components"].values():
            rows["method"] = file.other
    if args.json:
        return json.dumps(description, indent=2, default=list)
    lines = [f"{file.path}: {len(content):,} bytes, sha256 {description['sha256']}"]
    for name, rows in description["components"].items():
        lines += ["", f"{name}: {rows.pop('method')}"]
        rows["base_model"] = rows["base_model"] or "not stored in this file"
        rows["noise_convention"] = rows["noise_convention"] or "not stated"
        core, factors = rows["parameters"]["core"], rows["parameters"]["factors"]
        rows["parameters"] = f"{core + factors:,}: A and B {factors:,}, core {core:,}"
        lines += [f"  {label:<17} {_words(value)}" for label, value in rows.items() if value]
    return "\n".join(lines)


def _described(part: AdapterPart) -> dict[str, Any]:
    """Return {label: value} of one component."""
    config = part.config
    # the last word of each module's name that isn't a number: "to_out" of "attn.to_out.0"
    kinds = Counter(re.sub(r"(\.\d+)+$", "", name).rpartition(".")[2] for name in part.modules)
    core_fields = _CORE_FIELDS.get(config.core_type, ("core_sharing",))
    factors = [tensor for key, tensor in part.tensors.items() if not is_core_key(key)]
    return {
        "method": "NaRA-DoRA" if config.use_dora else "NaRA",
        "modules": len(part.modules),
        "module_kinds": dict(kinds),
        "ranks": sorted(set(part.modules.values())),
        "base_model": config.base_model_name_or_path,
        **{name: getattr(config, name) for name in _FIELDS},
        "core": {name: getattr(config, name) for name in core_fields},
        "parameters": {
            "core": sum(parameter.numel() for parameter in cores_of(part).parameters()),
            "factors": sum(tensor.numel() for tensor in factors),
        },
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in part.tensors.values()}),
    }


def _words(value: object) -> str:
    """Return a value without brackets and quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def plot(args: Namespace) -> str:
    """Plot an adapter's core over λ.

        nara plot my-toy                            # writes my-toy.png
        nara plot my-toy --output core.png --points 201

    Left: the distance of C(λ) from the identity, ‖C(λ) − I‖ / ‖I‖. A plain LoRA has 0. Middle: the
    singular values of C(λ). They show which directions are amplified or switched off at each λ.
    Right: the strength over λ. If each layer has its own core, lines are means over the cores, and
    the shaded range goes from the smallest to the largest.
    """
    from matplotlib.figure import Figure

    output = args.output or Path(f"{Path(args.file).resolve().stem}.png")
    if args.points < 2:
        raise ValueError(f"--points is {args.points}. Use 2 or more.")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder. Give the name of a PNG file.")
    check_free([output], args.overwrite)
    parts = AdapterFile.read(Path(args.file), without_base=True).parts
    levels = torch.linspace(0, 1, args.points, dtype=torch.float32)
    figure = Figure(figsize=(12, 3.4 * len(parts)), layout="constrained")
    rows = figure.subplots(len(parts), 3, squeeze=False)
    for row, (name, part) in zip(rows, parts.items(), strict=True):
        distances, values = core_curves(part, levels)
        schedule = schedule_of(part.config)
        strength = torch.ones_like(levels) if schedule is None else schedule.at(levels)
        title = f"{name}: {part.config.core_type}"
        row[0].plot(levels, distances.mean(0))
        row[0].fill_between(levels, distances.amin(0), distances.amax(0), alpha=0.2)
        row[0].set(ylabel="‖C(λ) − I‖ / ‖I‖", title=title, ylim=(0, None))
        row[1].plot(levels, values.nanmean(0), linewidth=1)
        row[1].set(ylabel="singular values of C(λ)")
        row[2].plot(levels, strength)
        row[2].set(ylabel="strength", ylim=(min(0.0, strength.min().item()), None))
        for axes in row:
            axes.set(xlabel="noise level λ", xlim=(0, 1))
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return str(output)


@torch.no_grad()
def core_curves(part: AdapterPart, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖C − I‖ / ‖I‖ (g, n) and C's singular values (g, n, r), of g cores at λ (n,).

    r is the largest rank. For a core of lower rank, the missing values are NaN.
    """
    cores = cores_of(part)
    matrices = [cores.matrix(group, levels).double() for group in cores]  # (n or 1, r, r)
    matrices = [C.expand(len(levels), -1, -1) for C in matrices]
    distances = [
        (C - torch.eye(C.shape[-1])).norm(dim=(1, 2)) / C.shape[-1] ** 0.5 for C in matrices
    ]
    values = [torch.linalg.svdvals(C).T for C in matrices]  # (r, n)
    padded = pad_sequence(values, batch_first=True, padding_value=torch.nan)
    return torch.stack(distances), padded.mT


def convert(args: Namespace) -> str:
    """Convert a NaRA between its two file formats, or a T-LoRA to LyCORIS' format. No base is needed.

    A T-LoRA of another project is converted into either. Its mask has the settings of the
    lycoris_config.json beside it; a file of LyCORIS also needs the base's weights.

        nara convert my-toy folder --to peft                       # for PeftModel
        nara convert my-toy folder --to peft --component text_encoder  # one of several components
        nara convert folder my-toy --to pipeline --component unet  # for pipe.load_nara_weights
        nara convert lycoris.safetensors my-toy --to pipeline --component unet --base_model sdxl-base
        nara convert my-toy folder --to lycoris                    # for LyCORIS and SimpleTuner
        nara convert my-toy folder --to lycoris --base sdxl        # for ComfyUI's T-LoRA node

    Tensors are unchanged, except in LyCORIS' format. It can store an adapter of --adapter tlora with
    lora_a_init=residual_base (docs/time_aware.md). To write a plain LoRA, use nara fold. To make a
    NaRA from a LoRA, call nara_diffusion.from_lora, or give a train script --init_adapter.
    """
    source, output, form, component = args.file, args.output, args.to, args.component
    base: Any = functools.partial(AutoModel.from_pretrained, args.base_model, subfolder=component)
    file = AdapterFile.read(
        Path(source), component or MODEL, base=base if args.base_model else None
    )
    parts = file.parts
    is_peft = file.path is not None and file.path.name == PEFT_WEIGHTS_NAME
    if file.other is None and form == ("peft" if is_peft else "pipeline"):
        other = "pipeline" if form == "peft" else "peft"
        raise ValueError(
            f"'{source}' already has the form {form!r}. Use it as it is, or choose --to {other}."
        )
    if args.base is not None and form != "lycoris":
        raise ValueError(f"--base is for --to lycoris, and not for --to {form}. Leave it out.")
    if form == "pipeline":
        if component is None or not component.isidentifier():
            raise ValueError(
                "--to pipeline needs --component, the adapted part of the pipeline, such as unet or transformer."
            )
        with naming(source):
            check_storable(parts[component].config, component)
        check_free([output / WEIGHTS_NAME], args.overwrite)
        AdapterFile({component: parts[component]}).save(output / WEIGHTS_NAME)
        return f"{output}: as {form}"
    if component not in parts and (component is not None or len(parts) > 1):
        raise ValueError(f"The file has {', '.join(parts)}. Choose one with --component.")
    part = parts[component or next(iter(parts))]
    if form == "peft":
        check_free([output / PEFT_WEIGHTS_NAME, output / PEFT_CONFIG_NAME], args.overwrite)
        AdapterFile({MODEL: part}).save_peft(output)
    else:
        check_free([output / LYCORIS_WEIGHTS, output / LYCORIS_CONFIG_NAME], args.overwrite)
        save_lycoris(part, output, args.base)
    return f"{output}: as {form}"


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
    _check_fold(file, args)
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
    return f"{args.output}: {_fold_words(loras, adapters, args.noise_level)}{ending}"


def _fold_words(
    loras: Mapping[str, PlainLora], adapters: Mapping[str, Adapter], noise_level: float | str
) -> str:
    """Return text with the number of modules and a description of the LoRA at `noise_level`."""
    modules = sum(len(lora.layers) for lora in loras.values())
    if not isinstance(noise_level, float):
        errors = [lora.error.worst_update for lora in loras.values() if lora.error is not None]
        worst = f"the largest relative error of ΔW is {max(errors):.2%}"
        return f"{modules} modules, nearest over all λ, {worst}"
    level = torch.tensor([noise_level])
    schedules = [adapter.schedule for adapter in adapters.values() if adapter.schedule is not None]
    strengths = [f"{schedule.at(level).item():g}" for schedule in schedules]
    strength = f", at its strength of {', '.join(strengths)} there" if strengths else ""
    return f"{modules} modules, λ = {noise_level:g}{strength}"


def _check_fold(file: AdapterFile, args: Namespace) -> None:
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
    of_peft = [output / PEFT_WEIGHTS_NAME, output / PEFT_CONFIG_NAME]
    written = of_peft if args.form == PEFT else [output]
    if written[0].exists() and written[0].samefile(file.path or ""):
        raise ValueError(
            f"OUTPUT {output} is the adapter itself, which would be lost. Choose another name."
        )
    check_free(written, args.overwrite)
