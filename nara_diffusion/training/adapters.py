"""From the method that `--adapter` names, and its options, to an adapted model."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from torch import nn
from transformers import PreTrainedModel

from nara_diffusion import NaraConfig, StrengthSchedule
from nara_diffusion.config import changes_base
from nara_diffusion.cores.registry import registered_cores
from nara_diffusion.noise.level import MASKED_SHARE

from .methods import Method, method_of
from .parser import hint

ALL_LINEAR = "all-linear"
CORE_FIELDS = {field.name for field in dataclasses.fields(NaraConfig)} - {
    field.name for field in dataclasses.fields(LoraConfig)
}
"""What NaraConfig adds to LoraConfig."""

logger = logging.getLogger(__name__)

_DATA_DRIVEN = ("corda", "eva", "lora_ga")
# arguments of an adapter: the fields that they set
_FIELDS = {
    "rank": ("r",),
    "lora_alpha": ("lora_alpha", "alpha"),
    "target_modules": ("target_modules",),
    "core_type": ("core_type",),
}
_VIRTUAL_TOKENS = 20


def title_of(args: Any) -> str:
    """The usual name of the method that `args` describe, such as "NaRA-C" for `nara` with a constant core."""
    method, config = method_of(args), adapter_config(args)
    title = method.title
    if method.family == "nara" and "core_type" not in method.fixed:
        core = getattr(config, "core_type", "")
        titles = {"hypernetwork": "NaRA", "constant": "NaRA-C", "rank_mask": "T-LoRA", "identity": "LoRA"}
        title = titles.get(core, f"NaRA with core {core!r}")
    has_dora = getattr(config, "use_dora", False) and "DoRA" not in title
    return f"{title}-DoRA".replace("LoRA-DoRA", "DoRA") if has_dora else title


def check_adapter(args: Any) -> None:
    """Raises ValueError for settings that contradict the method, and logs arguments that it doesn't read."""
    method = method_of(args)
    if method.family != "nara" and args.core_type != "hypernetwork":
        raise ValueError(f"core_type is {args.core_type!r}, which adapter {args.adapter} doesn't have: give nara.")
    if args.core_type not in ("hypernetwork", method.fixed.get("core_type", args.core_type)):
        raise ValueError(
            f"core_type is {args.core_type!r}, but adapter {args.adapter} means {method.fixed['core_type']!r}."
        )
    config: Any = adapter_config(args)
    if args.core_start_step and getattr(config, "core_init", None) == "kaiming":
        raise ValueError(
            "core_start_step trains A and B with C = I first, but core_init 'kaiming' starts from another C: "
            "use core_init 'zero_last', or core_start_step 0."
        )
    defaults = {field.name: field for field in dataclasses.fields(args)}
    unread = [name for name in (*_FIELDS, "lora_dropout", "core_learning_rate") if not reads(args, name)]
    unread = [name for name in unread if name != "target_modules" and getattr(args, name) != defaults[name].default]
    unread += [name for name in args.adapter_options if _is_unread_core(method, name)]
    if unread:
        logger.warning("adapter %s doesn't read %s", args.adapter, ", ".join(unread))


def reads(args: Any, name: str) -> bool:
    """Whether the method that `args` name reads the argument `name` of an adapter."""
    method = method_of(args)
    if name == "core_learning_rate":
        core_type = method.fixed.get("core_type", getattr(args, "core_type", "hypernetwork"))
        return method.family == "nara" and core_type not in ("identity", "rank_mask", "bins")
    known = set() if method.config is None else {field.name for field in dataclasses.fields(method.config)}
    return bool(known & {*_FIELDS.get(name, ()), *(_dropouts(method) if name == "lora_dropout" else ())})


def without_unread(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, which stand in for arguments that weren't `given`, without those that the given method doesn't read."""
    chosen = SimpleNamespace(adapter=given.get("adapter", "nara"), core_type=given.get("core_type", "hypernetwork"))
    own = (*_FIELDS, "core_learning_rate")
    return {name: value for name, value in values.items() if name not in own or reads(chosen, name)}


def adapter_config(
    args: Any,
    *,
    noise_convention: str | None = None,
    scheduler: dict[str, Any] | None = None,
    strength: StrengthSchedule | None = None,
    **fields: Any,
) -> PeftConfig | None:
    """The configuration of the adapter that `args` (an AdapterArguments) describe; None for full fine-tuning.

    Args:
        noise_convention: how λ is defined, for adapters that depend on it.
        scheduler: class and configuration of the scheduler that a converted model needs; see `NaraConfig`.
        strength: that of a window of noise levels, for NaRA's family; other adapters can't hold it.
        fields: further fields of the configuration, such as task_type.

    Raises:
        ValueError: `adapter_options` names a field that the configuration lacks, or has a value that it refuses.
    """
    method = method_of(args)
    options = {name: value for name, value in args.adapter_options.items() if not _is_unread_core(method, name)}
    known = [] if method.config is None else [field.name for field in dataclasses.fields(method.config) if field.init]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"adapter_options holds {name!r}, which adapter {args.adapter} lacks: {hint(name, known)}")
        if method.fixed.get(name, value) != value:
            raise ValueError(f"adapter {args.adapter} means {name} {method.fixed[name]!r}, adapter_options {value!r}.")
        if isinstance(value, list):
            options[name] = tuple(value) if name == "core_hidden_dims" else value
    if method.config is None:
        return None
    _check_start(options.get("init_lora_weights", True))
    values = _fields_of(args, method, options)
    if method.family == "nara":
        values |= {"noise_convention": noise_convention, "scheduler": scheduler, "strength": strength}
    values = {name: value for name, value in values.items() if name in known} | dict(method.fixed) | options | fields
    try:
        config = method.config(**values)
    except (TypeError, ValueError) as error:
        window = " The strength is that of the window: leave --min_noise_level and --max_noise_level out."
        raise ValueError(f"{error}{window if str(error).startswith('strength') else ''}") from error
    return config


def _fields_of(args: Any, method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    values = {"r": args.rank, "lora_alpha": alpha, "alpha": alpha, "num_virtual_tokens": _VIRTUAL_TOKENS}
    values["target_modules"] = ALL_LINEAR if args.target_modules == [ALL_LINEAR] else list(args.target_modules)
    values["core_type"] = args.core_type
    values |= dict.fromkeys(_dropouts(method), args.lora_dropout)
    if args.adapter == "multi_lora":  # r counts all blocks; each has the scale of a LoRA of rank --rank
        blocks = options.get("core_bins", NaraConfig.core_bins)
        scale = math.sqrt(blocks) if options.get("use_rslora") else blocks
        values |= {"r": blocks * args.rank, "lora_alpha": alpha * scale}
    return values


def _is_unread_core(method: Method, name: str) -> bool:
    """Whether the field is a core's, which a file of arguments may hold for several methods, and this one has none."""
    return name in CORE_FIELDS and method.family != "nara"


def _dropouts(method: Method) -> tuple[str, str]:
    return "lora_dropout", f"{method.name}_dropout"


def _check_start(start: Any) -> None:
    """Refuse initialisations of A and B that change the base weights, or need a pass over data."""
    kind = str(start).lower()
    if changes_base(start) or kind in _DATA_DRIVEN:
        why = "needs a pass over data first" if kind in _DATA_DRIVEN else "changes the base weights"
        raise ValueError(f"init_lora_weights={start} {why}: leave it out, or give true, gaussian or orthogonal.")


def build_adapter(
    model: PreTrainedModel,
    args: Any,
    *,
    noise_convention: str | None = MASKED_SHARE,
    strength: StrengthSchedule | None = None,
) -> nn.Module:
    """Prepare the language model `model` for `--adapter`: only what is trained requires a gradient.

    Args:
        args: an AdapterArguments.
        noise_convention, strength: see `adapter_config`.

    Returns:
        A PeftModel around `model`, or `model` itself with all its weights trainable (`adapter` "full").

    Raises:
        ValueError: a name in `target_modules` matches nothing.
    """
    options: dict[str, Any] = {}
    if method_of(args).family == "prompt":
        # what PEFT prepends the tokens in; encoders have no `generate`
        options["task_type"] = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION"
    config = adapter_config(args, noise_convention=noise_convention, strength=strength, **options)
    return model.requires_grad_(True) if config is None else add_adapter(model, config)


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Add an adapter to `model`. Only the weights of the adapter are trainable.

    Raises:
        ValueError: a name in `target_modules` matches nothing; the message names modules that would.
    """
    check_target_modules(model, getattr(config, "target_modules", None))
    with warnings.catch_warnings():
        # PEFT 0.21 asks by a name that transformers deprecated in 5.24
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def check_target_modules(model: nn.Module, targets: Any) -> None:
    """Refuse names that match no module, by PEFT's rule: a module's whole name, or its end after a dot. PEFT alone
    adapts the others without a word."""
    if targets is None or isinstance(targets, str):
        return
    names = [f".{name}" for name, _ in model.named_modules() if name]
    unmatched = sorted(target for target in targets if not any(name.endswith(f".{target}") for name in names))
    if unmatched:
        linear = {name.rpartition(".")[2]: 0 for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        raise ValueError(
            f"target_modules {', '.join(unmatched)} match no module of {type(model).__name__}: "
            f"{hint(unmatched[0], linear)} Its linear layers are {', '.join(sorted(linear))}; {ALL_LINEAR} takes all "
            "but the output head."
        )


@contextmanager
def base_model(adapted: nn.Module, load: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """The model without what was trained: `adapted` with its adapter disabled, or what `load` returns where all
    weights were trained."""
    if not hasattr(adapted, "peft_config"):
        yield load()
        return
    with adapted.disable_adapter():  # type: ignore[operator]
        yield adapted


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing by the model's own call, in the form that needs no gradient at the inputs."""
    # its name up to transformers 5.23 and, as a deprecated one, since
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def import_core_module(name: str) -> None:
    """Import the module `name`, or, where it ends in .py, the file of that path, whose folder joins `sys.path`.

    Raises:
        ValueError: there is no such module or file, it fails, or no core is registered then.
    """
    path = Path(name)
    if name.endswith(".py") and str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))
    try:
        found = importlib.import_module(module_name(name))
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"core_module {name!r} can't be imported: {type(error).__name__}: {error}") from error
    file = getattr(found, "__file__", None)
    if name.endswith(".py") and (file is None or Path(file).resolve() != path.resolve()):
        raise ValueError(f"core_module is {name!r}, but Python takes its name for {file}: rename the file.")
    if not registered_cores():
        raise ValueError(f"core_module {name!r} registers no core: call nara_diffusion.register_core(NAME, …) in it.")


def module_name(name: str) -> str:
    """The name under which Python imports the module that `--core_module` names."""
    return Path(name).stem if name.endswith(".py") else name
