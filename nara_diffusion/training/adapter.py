"""From arguments to an adapted model."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from nara_diffusion import NaraConfig

ALL_LINEAR = "all-linear"

# arguments whose name in NaraConfig is their own; a test keeps this complete
CORE_ARGUMENTS = (
    "core_type",
    "core_scale",
    "core_hidden_dims",
    "core_init",
    "core_input",
    "core_sharing",
    "noise_embedding",
    "noise_embedding_dim",
    "fourier_scale",
    "mask_density_radius",
)


def adapter_config(args: Any, **fields: Any) -> NaraConfig:
    """The NaraConfig that `args` (an AdapterArguments) describe; `fields` are further ones, such as task_type."""
    core = {name: getattr(args, name) for name in CORE_ARGUMENTS}
    core["core_hidden_dims"] = tuple(core["core_hidden_dims"])
    return NaraConfig(
        r=args.rank,
        lora_alpha=args.rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        target_modules=ALL_LINEAR if args.target_modules == [ALL_LINEAR] else list(args.target_modules),
        **core,
        **fields,
    )


def add_adapter(model: PreTrainedModel, config: NaraConfig) -> PeftModel:
    """`model` with the adapter, whose A, B and core alone are trainable.

    Raises:
        ValueError: a name in `target_modules` matches nothing; the message names modules that would.
    """
    check_target_modules(model, config.target_modules)
    with warnings.catch_warnings():
        # PEFT 0.21 asks by a name that transformers deprecated in 5.24
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return get_peft_model(model, config)


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing by the model's own call, in the form that needs no gradient at the inputs."""
    # its name up to transformers 5.23 and, as a deprecated one, since
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def check_target_modules(model: nn.Module, targets: Any) -> None:
    """Refuses names that match no module, by PEFT's rule: a module's whole name, or its end after a dot."""
    if isinstance(targets, str):
        return
    names = [name for name, _ in model.named_modules()]
    unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names if name)]
    if not unmatched:
        return
    linear = sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    near = [match for target in unmatched for match in difflib.get_close_matches(target, linear, n=1)]
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise ValueError(
        f"target_modules {', '.join(sorted(unmatched))} match no module of {type(model).__name__}.{hint} "
        f"Its linear layers are {', '.join(linear)}; {ALL_LINEAR} takes all but the output head."
    )
