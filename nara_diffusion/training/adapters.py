"""Build an adapted model from the method that `--adapter` names and the method's options."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from nara_diffusion import NaraConfig, StrengthSchedule
from nara_diffusion.config import changes_base
from nara_diffusion.cores.registry import CUSTOM, check_core_type
from nara_diffusion.noise.sources import MASKED_SHARE
from nara_flags.parser import hint
from nara_flags.training import AdapterArguments, TrainingArguments

from .arguments import Method, method_of, schedule_of, window_of

ALL_LINEAR = "all-linear"
CORE_FIELDS = NaraConfig.__dataclass_fields__.keys() - LoraConfig.__dataclass_fields__.keys()
"""The fields that NaraConfig adds to LoraConfig."""

_DATA_DRIVEN = ("corda", "eva", "lora_ga")
_VIRTUAL_TOKENS = 20


_OF_CORE = {"hypernetwork": "NaRA", "constant": "NaRA-C", "rank_mask": "T-LoRA", "identity": "LoRA"}
"""{core_type: the usual name of a NaRA with this core}."""


def title_of(args: AdapterArguments) -> str:
    """Return the method's usual name, such as "NaRA-C" for `nara` with a constant core."""
    method, config = method_of(args), adapter_config(args)
    title = method.title
    if method.family == "nara" and "core_type" not in method.fixed:
        core = getattr(config, "core_type", "")
        title = _OF_CORE.get(core, f"NaRA with core {core!r}")
    has_dora = getattr(config, "use_dora", False) and "DoRA" not in title
    return f"{title}-DoRA".replace("LoRA-DoRA", "DoRA") if has_dora else title


def start_facts(args: TrainingArguments) -> dict[str, str]:
    """Return {label: text} about the adapter that the run starts from; empty without one."""
    if args.init_adapter is None:
        return {}
    return {"starts from": f"{args.init_adapter}, which `before` includes"}


def window_facts(args: TrainingArguments) -> dict[str, str]:
    """Return {label: text} about the run's window of noise levels; empty without a window."""
    window, method = window_of(args), method_of(args)
    if window.is_everything:
        return {}
    until = "≤ λ ≤ 1" if window.high == 1 else f"≤ λ < {window.high:g}"
    if method.family == "nara":
        outside = "the adapter is off outside, by the strength in its file"
    elif method.family == "lora":
        outside = "its file can't store that, so set the strength after loading, as below"
    else:
        outside = f"{method.title} stays on outside, untrained: it takes no StrengthSchedule"
    if getattr(adapter_config(args), "use_dora", False):
        outside += " (except DoRA's magnitudes, which apply at every λ)"
    return {"noise levels": f"{window.low:g} {until}; {outside}"}


def adapter_config(
    args: AdapterArguments,
    *,
    noise_convention: str | None = None,
    noise_level_per: Literal["sample", "part"] | None = None,
    strength: StrengthSchedule | None = None,
    **fields: Any,
) -> PeftConfig | None:
    """Return the configuration of the adapter that `args` describe; None for full fine-tuning.

    One file of arguments can serve several methods: an adapter without a core ignores the core's
    fields in `adapter_options`.

    Args:
        noise_convention: the definition of λ, for adapters that depend on λ.
        noise_level_per: whether training has one λ per sample or per part of a sample.
        strength: the strength schedule for a window of noise levels. Only NaRA and its variants
            store it.
        fields: further fields of the configuration, such as task_type.

    Raises:
        ValueError: `adapter_options` has an unknown field, or a value that the configuration
            doesn't accept.
    """
    method = method_of(args)
    options = _checked_options(args, method)
    if method.config is None:
        return None
    values = {
        **_values(args, method),
        "noise_convention": noise_convention,
        "noise_level_per": noise_level_per,
        "strength": strength,
    }
    values = {name: values[name] for name in values.keys() & _fields_of(method)}
    try:
        return method.config(**values | dict(method.fixed) | options | fields)
    except (TypeError, ValueError) as error:
        is_of_window = str(error).startswith("strength")
        remedy = " The window sets it: leave out --min_noise_level and --max_noise_level."
        raise ValueError(f"{error}{remedy if is_of_window else ''}") from error


def _fields_of(method: Method) -> list[str]:
    """Return the names of the fields that the method's configuration takes."""
    if method.config is None:
        return []
    return [entry.name for entry in dataclasses.fields(method.config) if entry.init]


def _checked_options(args: AdapterArguments, method: Method) -> dict[str, Any]:
    """Return `adapter_options`. Drop the core's fields if the adapter has no core."""
    ignored = set() if method.family == "nara" else CORE_FIELDS
    options = {name: value for name, value in args.adapter_options.items() if name not in ignored}
    names = _fields_of(method)
    for name, value in options.items():
        if name not in names:
            raise ValueError(
                f"adapter_options has {name!r}, but adapter {args.adapter} has no such field: {hint(name, names)}"
            )
        if method.fixed.get(name, value) != value:
            raise ValueError(
                f"adapter {args.adapter} sets {name} to {method.fixed[name]!r}, but adapter_options sets it to "
                f"{value!r}. Leave it out."
            )
    start = options.get("init_lora_weights", True)
    if changes_base(start) or start in _DATA_DRIVEN:
        reason = (
            "needs a pass over data first" if start in _DATA_DRIVEN else "changes the base weights"
        )
        raise ValueError(
            f"init_lora_weights={start} {reason}. Leave it out, or use true, gaussian or orthogonal."
        )
    return options


def _values(args: AdapterArguments, method: Method) -> dict[str, Any]:
    """Return {configuration field: value} for the arguments that have a flag of their own."""
    rank, alpha = args.rank, args.rank if args.lora_alpha is None else args.lora_alpha
    # r also counts the other blocks, or T-LoRA's fixed directions; the scale is that of --rank
    options, times, mask = args.adapter_options, 1, {}
    if args.adapter == "multi_lora":
        times = options.get("core_bins", NaraConfig.core_bins)
    if args.adapter == "tlora":
        times = 2 if str(options.get("lora_a_init")).startswith("residual") else 1
        mask = {"rank_mask_min": times, "rank_mask_step": times}
    scale = math.sqrt(times) if options.get("use_rslora") else times
    is_all = args.target_modules == [ALL_LINEAR]
    return {
        "r": times * rank,
        "lora_alpha": scale * alpha,
        "alpha": alpha,
        "num_virtual_tokens": _VIRTUAL_TOKENS,
        "target_modules": ALL_LINEAR if is_all else list(args.target_modules),
        "core_type": args.core_type,
        "lora_dropout": args.lora_dropout,
        **mask,
        f"{method.name}_dropout": args.lora_dropout,
    }


def check_adapter(args: TrainingArguments) -> None:
    """Raise ValueError for an adapter that no run can train.

    The `__post_init__` of the arguments calls this. Import --core_module first, since it may
    register the core.
    """
    if args.core_module is not None:
        _import_core_module(args.core_module)
    check_core_type(args.core_type)
    method, config = method_of(args), adapter_config(args, strength=schedule_of(args))
    meant = method.fixed.get("core_type", args.core_type if method.family == "nara" else "none")
    if args.core_type not in ("hypernetwork", meant):
        raise ValueError(
            f"core_type is {args.core_type!r}, but that of adapter {args.adapter} is always {meant}. Leave it out."
        )
    if args.core_start_step and getattr(config, "core_init", None) == "kaiming":
        raise ValueError(
            "core_start_step trains A and B with C = I first, but core_init 'kaiming' starts from another C. Use "
            "core_init 'zero_last', or core_start_step 0."
        )
    if getattr(config, "has_residual", False) and args.weight_decay:
        raise ValueError(
            f"weight_decay is {args.weight_decay}, and would shrink the directions that lora_a_init 'residual' fixes. "
            "Use weight_decay 0."
        )
    family, start = method.family, args.init_adapter
    if start is not None and not Path(start).expanduser().exists():
        raise ValueError(f"init_adapter is {start!r}, but there is no such file or folder.")
    if start is not None and family not in ("nara", "lora"):
        raise ValueError(
            f"init_adapter starts from a LoRA or a NaRA, and adapter {args.adapter} is neither. Use adapter nara."
        )


def _import_core_module(name: str) -> None:
    """Import the module `name`, or the file `name` if it ends in .py.

    The folder of a file is added to `sys.path`.

    Raises:
        ValueError: the module is missing, can't be imported, or registers no core.
    """
    folder = str(Path(name).resolve().parent)
    if name.endswith(".py") and folder not in sys.path:
        sys.path.append(folder)
    try:
        importlib.import_module(module_name(name))
    except Exception as error:  # user code may raise anything
        raise ValueError(
            f"core_module {name!r} can't be imported: {type(error).__name__}: {error}"
        ) from error
    if not CUSTOM:
        raise ValueError(
            f"core_module {name!r} registers no core. Call nara_diffusion.register_core(NAME, …) in it."
        )


def module_name(name: str) -> str:
    """Return the name under which Python imports the module that `--core_module` names."""
    return Path(name).stem if name.endswith(".py") else name


def build_adapter(
    model: PreTrainedModel,
    args: AdapterArguments,
    *,
    noise_convention: str | None = MASKED_SHARE,
    noise_level_per: Literal["sample", "part"] = "sample",
    strength: StrengthSchedule | None = None,
    target_modules: str | None = None,
) -> nn.Module:
    """Return a PeftModel around the language model `model`, with only the adapter trainable.

    With `adapter` "full", return `model` itself with all its weights trainable.

    Raises:
        ValueError: see `adapter_config` and `check_target_modules`.
    """
    # a pattern, in place of the names in `args`
    options = {} if target_modules is None else {"target_modules": target_modules}
    if method_of(args).family == "prompt":
        # PEFT prepends the tokens in `generate`, a method that encoders don't have
        is_decoder = hasattr(model, "prepare_inputs_for_generation")
        options["task_type"] = "CAUSAL_LM" if is_decoder else "FEATURE_EXTRACTION"
    config = adapter_config(
        args,
        noise_convention=noise_convention,
        noise_level_per=noise_level_per,
        strength=strength,
        **options,
    )
    return model.requires_grad_(True) if config is None else add_adapter(model, config)


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> nn.Module:
    """Return a PeftModel around `model`. Raise ValueError if `check_target_modules` does."""
    check_target_modules(model, getattr(config, "target_modules", None))
    with warnings.catch_warnings():
        # PEFT 0.21 uses a name that transformers 5.24 deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def check_target_modules(model: nn.Module, targets: Any) -> None:
    """Raise ValueError for names that match no module; PEFT would silently ignore them.

    As in PEFT, a name matches a module if it equals the module's full name or the end of the full
    name after a dot.
    """
    if targets is None or isinstance(targets, str):
        return
    modules = {f".{name}": module for name, module in model.named_modules()}
    unmatched = [t for t in sorted(targets) if not any(name.endswith(f".{t}") for name in modules)]
    if unmatched:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"target_modules {', '.join(unmatched)} match no module of {type(model).__name__}: "
            f"{hint(unmatched[0], names)} Its linear layers are {', '.join(names)}. {ALL_LINEAR} "
            "adapts all of them except the output head."
        )
