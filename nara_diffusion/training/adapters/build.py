"""From arguments to an adapted model."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from nara_diffusion.noise.signals import MASKED_SHARE
from nara_diffusion.noise.strength import StrengthSchedule

from .configs import ALL_LINEAR, adapter_config
from .methods import method_of
from .pissa import changes_base, remember_start, takes_start_from_base


def build_adapter(
    model: PreTrainedModel,
    args: Any,
    *,
    total_steps: int | None = None,
    noise_convention: str | None = MASKED_SHARE,
    strength: StrengthSchedule | None = None,
) -> nn.Module:
    """Prepare the language model `model` for `--adapter`: only what is trained requires a gradient.

    Args:
        args: an AdapterArguments.
        total_steps: optimizer steps of the training; AdaLoRA needs them.
        noise_convention: how λ is defined, for adapters that depend on it.
        strength: see `adapter_config`.

    Returns:
        A PeftModel around `model`, or `model` itself with all its weights trainable (`adapter` "full").

    Raises:
        ValueError: a name in `target_modules` matches nothing, or a module that the method can't adapt.
    """
    options: dict[str, Any] = {}
    if method_of(args).family == "prompt":
        # what PEFT prepends the tokens in; encoders have no `generate`
        options["task_type"] = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION"
    config = adapter_config(
        args, noise_convention=noise_convention, strength=strength, total_steps=total_steps, **options
    )
    return model.requires_grad_(True) if config is None else add_adapter(model, config)


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Add an adapter to `model`. Only the weights of the adapter are trainable.

    Raises:
        ValueError: a name in `target_modules` matches nothing; the message names modules that would.
    """
    check_adaptable(model, config)
    with warnings.catch_warnings():
        # PEFT 0.21 asks by a name that transformers deprecated in 5.24
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    remember_start(adapted)
    return adapted


@contextmanager
def base_model(adapted: nn.Module, load: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """The model without what was trained: `adapted` with its adapter disabled, or what `load` returns where training
    has changed the weights themselves."""
    if changes_base(adapted):
        yield load()
        return
    with adapted.disable_adapter():  # type: ignore[operator]
        yield adapted


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing by the model's own call, in the form that needs no gradient at the inputs."""
    # its name up to transformers 5.23 and, as a deprecated one, since
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def check_adaptable(model: nn.Module, config: PeftConfig) -> None:
    """Raises ValueError for names in `target_modules` that match nothing, or modules that the method can't adapt."""
    targets = getattr(config, "target_modules", None)
    if targets is None or isinstance(targets, str):
        return
    check_target_modules(model, targets)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, _ConvNd)]
    found = sorted(target for target in targets if any(f".{name}".endswith(f".{target}") for name in convolutions))
    if found and takes_linear_layers_only(config):
        kind = "VeRA" if isinstance(config, VeraConfig) else f"init_lora_weights={config.init_lora_weights!r}"  # type: ignore[attr-defined]
        raise ValueError(
            f"target_modules {', '.join(found)} are convolutions of {type(model).__name__}, and PEFT has {kind} for "
            "linear layers alone: leave them out."
        )


def check_target_modules(model: nn.Module, targets: Any) -> None:
    """Refuse names that match no module, by PEFT's rule: a module's whole name, or its end after a dot."""
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


def takes_linear_layers_only(config: PeftConfig) -> bool:
    """Whether PEFT has the method for linear layers only: VeRA, and starts that are taken from the base weights."""
    return isinstance(config, VeraConfig) or takes_start_from_base(config)
