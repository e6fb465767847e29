"""Loading into offloaded pipelines, whose offloading is suspended meanwhile as for a LoRA, and into wrapped models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft import PeftModel
from torch import nn

from nara_diffusion.layers.offloading import groups_of

from .insertion import nara_adapters_of


@contextmanager
def offloading_suspended(pipe: Any) -> Iterator[None]:
    """Remove accelerate's offloading hooks from `pipe` inside the context, and restore them afterwards.

    Raises:
        ValueError: group offloading keeps weights on disk.
    """
    for name, part in pipe.components.items():
        modules = part.modules() if isinstance(part, nn.Module) else ()
        if any(group.offload_to_disk_path is not None for module in modules for group in groups_of(module)):
            raise ValueError(
                f"Group offloading keeps the weights of {name} on disk, in files that do not follow a change of "
                "adapters: load, save or unload adapters first, then call enable_group_offload(…)."
            )
    model, sequential, grouped = _func_optionally_disable_offloading(pipe)
    device = {"device": pipe._offload_device} if hasattr(pipe, "_offload_device") else {}
    try:
        yield
    finally:
        if model:
            pipe.enable_model_cpu_offload(**device)
        elif sequential:
            pipe.enable_sequential_cpu_offload(**device)
        elif grouped:
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(part)


def unwrapped(model: nn.Module) -> nn.Module:
    """The base model, adapters included, of a PeftModel; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_not_wrapped(model: nn.Module, component: str, method: str) -> None:
    """Raises ValueError if `model`, the pipeline's `component`, is a PeftModel, for which `method` does not work."""
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{component} is a PeftModel, whose adapters pipe.{method} cannot change. Put its base model, adapters "
            f"included, into the pipeline first, pipe.{component} = pipe.{component}.get_base_model(), or use its own "
            "methods (load_adapter, set_adapter, delete_adapter, unload)."
        )


def check_none_left_out(pipe: Any, models: dict[str, nn.Module], name: str) -> None:
    """Raises ValueError if the adapter is in a component, as a ControlNet, that is not among the `models` of a file."""
    rest = {key: unwrapped(part) for key, part in pipe.components.items() if isinstance(part, nn.Module)}
    others = [key for key, part in rest.items() if key not in models and name in nara_adapters_of(part)]
    if others:
        raise ValueError(
            f"Adapter '{name}' is in {', '.join(map(repr, others))} too, which a pipeline's file has no place for: "
            f"save that part by peft.PeftModel, or remove it first, e.g. pipe.{others[0]}.delete_adapters('{name}')."
        )
