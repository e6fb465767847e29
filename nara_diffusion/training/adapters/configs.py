"""From arguments to PEFT's configuration of each method.

nara, nara_dora, nara_c   NaraConfig          ΔW = s · B · C · A of rank --rank
tlora                     NaraConfig          the same with a mask of --rank entries for C
multi_lora                NaraConfig          --core_bins LoRAs of rank --rank each, of which λ chooses one
lora, dora, rslora        LoraConfig
pissa                     LoraConfig          A and B start as the --rank largest singular directions of W
hira                      HiraConfig          ΔW = W ⊙ B · A
vera                      VeraConfig          frozen random A and B of rank --rank, shared; vectors are learned
adalora                   AdaLoraConfig       starts with 1.5 × --rank directions a layer, ends with --rank on average
oft                       OFTConfig           rotations in blocks of 4 × --rank features, about as many parameters as
                                              a LoRA of that rank has on a square layer
prompt_tuning             PromptTuningConfig  --num_virtual_tokens embeddings before each text
p_tuning                  PromptEncoderConfig the same, made by a small network
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any

import yaml
from peft import (
    AdaLoraConfig,
    HiraConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)

from nara_diffusion import NaraConfig, StrengthSchedule

from .methods import CORE_FIELDS, effective, method_of

ALL_LINEAR = "all-linear"

_UNPREPARED = {
    "corda": "needs covariances of the base model's inputs, which this script doesn't collect",
    "eva": "needs activations of the base model on data, which this script doesn't collect",
    "lora_ga": "needs gradients of the base model on data, which this script doesn't collect",
    "loftq": "replaces the base weights by quantised ones, which nobody has who loads the adapter",
}

CORE_ARGUMENTS = tuple(sorted(CORE_FIELDS - {"noise_convention", "scheduler", "strength"}))
"""Arguments that are fields of NaraConfig of the same name."""


def adapter_config(
    args: Any,
    *,
    noise_convention: str | None = None,
    scheduler: dict[str, Any] | None = None,
    strength: StrengthSchedule | None = None,
    total_steps: int | None = None,
    **fields: Any,
) -> PeftConfig | None:
    """PEFT's configuration of the adapter that `args` (an AdapterArguments) describe; None for full fine-tuning.

    Args:
        noise_convention: how λ is defined, for adapters that depend on it.
        scheduler: class and configuration of the scheduler that a converted model needs; see `NaraConfig`.
        strength: that of a window of noise levels, for NaRA's family; other adapters can't hold it.
        total_steps: optimizer steps of the training, which AdaLoRA's schedule needs.
        fields: further fields of the configuration, such as task_type.

    Raises:
        ValueError: `--adapter_options` names a field that the configuration lacks, or a value that it refuses.
    """
    method = method_of(args)
    if method.family == "full":
        if args.adapter_options:
            raise ValueError(f"adapter_options is {args.adapter_options}, but full fine-tuning has no configuration.")
        return None
    cls: Any
    values: dict[str, Any]
    if method.family == "nara":
        cls, values = NaraConfig, _nara(args)
        values |= {"noise_convention": noise_convention, "scheduler": scheduler, "strength": strength}
    elif args.adapter == "adalora":
        cls, values = AdaLoraConfig, _adalora(args, total_steps)
    elif method.family == "lora":
        cls, values = LoraConfig, _lora(args)
    else:
        cls, build = _OTHERS[args.adapter]
        values = build(args)
    options = parse_options(cls, args.adapter_options or [])
    try:
        config = cls(**values | options | fields)
    except ValueError as error:
        if strength is None or not str(error).startswith("strength"):
            raise
        raise ValueError(f"{error} The strength is that of the window: --open_window leaves it out.") from error
    _check_lora_start(getattr(config, "init_lora_weights", True))
    return config


def _check_lora_start(start: Any) -> None:
    """Refuse initialisations that need a pass over data, which no train script makes."""
    if start in _UNPREPARED:
        raise ValueError(f"init_lora_weights={start} {_UNPREPARED[start]}: leave it out, or use --adapter pissa.")


def parse_options(cls: type, options: list[str]) -> dict[str, Any]:
    """`--adapter_options` as fields of the configuration class `cls`; values are read as YAML.

    Raises:
        ValueError: one isn't NAME=VALUE, or names no field.
    """
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    values = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"adapter_options holds {option!r}, expected NAME=VALUE with a field of {cls.__name__}.{hint}"
            )
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"adapter_options holds {option!r}, whose value is not valid YAML: {error}") from error
    return values


def target_modules(args: Any) -> str | list[str]:
    """The value of PEFT's `target_modules`: a list of names, a pattern, or "all-linear"."""
    return ALL_LINEAR if args.target_modules == [ALL_LINEAR] else list(args.target_modules)


def _lora(args: Any) -> dict[str, Any]:
    return {
        "r": args.rank,
        "lora_alpha": args.rank if args.lora_alpha is None else args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "use_rslora": effective(args, "use_rslora"),
        "use_dora": effective(args, "use_dora"),
        "target_modules": target_modules(args),
        "init_lora_weights": "pissa" if args.adapter == "pissa" else True,
    }


def _nara(args: Any) -> dict[str, Any]:
    core = {name: effective(args, name) for name in CORE_ARGUMENTS} | {"core_hidden_dims": tuple(args.core_hidden_dims)}
    values: dict[str, Any] = _lora(args) | core
    if args.adapter == "multi_lora":  # r counts all blocks; each has the scale of a LoRA of rank --rank
        blocks = args.core_bins
        kept_scale = math.sqrt(blocks) if args.use_rslora else blocks
        values |= {"r": blocks * args.rank, "lora_alpha": values["lora_alpha"] * kept_scale}
    return values


def _adalora(args: Any, total_steps: int | None) -> dict[str, Any]:
    if total_steps is None:
        raise ValueError("AdaLoRA's schedule needs the number of optimizer steps: pass total_steps=N.")
    first = math.ceil(1.5 * args.rank)
    alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    return {
        "target_r": args.rank,
        "init_r": first,
        "lora_alpha": alpha / args.rank * first,  # PEFT divides by init_r
        "lora_dropout": args.lora_dropout,
        "target_modules": target_modules(args),
        "total_step": total_steps,
        "tinit": total_steps // 10,
        "tfinal": total_steps * 3 // 10,
        "deltaT": max(1, total_steps // 100),
    }


def _hira(args: Any) -> dict[str, Any]:
    return {"r": args.rank, "hira_dropout": args.lora_dropout, "target_modules": target_modules(args)}


def _vera(args: Any) -> dict[str, Any]:
    key = getattr(args, "seed", 0)
    return {
        "r": args.rank,
        "vera_dropout": args.lora_dropout,
        "target_modules": target_modules(args),
        "projection_prng_key": key,
    }


def _oft(args: Any) -> dict[str, Any]:
    size = {"r": 0, "oft_block_size": 4 * args.rank}
    return {**size, "module_dropout": args.lora_dropout, "target_modules": target_modules(args)}


def _virtual_tokens(args: Any) -> dict[str, Any]:
    return {"num_virtual_tokens": args.num_virtual_tokens}


_OTHERS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "hira": (HiraConfig, _hira),
    "vera": (VeraConfig, _vera),
    "oft": (OFTConfig, _oft),
    "prompt_tuning": (PromptTuningConfig, _virtual_tokens),
    "p_tuning": (PromptEncoderConfig, _virtual_tokens),
}
