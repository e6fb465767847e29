"""Finding modules of an adapted model: the holders of cores, and the modules outside of adapted layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn


def find_holders(model: nn.Module) -> list[Any]:
    """The core holders below `model`."""
    return [holder for _, holder in _holders_by_root(model)]


def core_holders(model: nn.Module) -> list[Any]:
    """The core holders below `model`, of which there has to be one.

    Raises:
        ValueError: there is none.
    """
    return [holder for _, holder in adapted_parts(model)]


def adapted_parts(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(model).__name__} is no torch.nn.Module: pass the model itself, e.g. pipe.unet.")
    found = _holders_by_root(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no NaRA adapter: add one first, e.g. get_peft_model(model, NaraConfig(…))."
        )
    return found


def _holders_by_root(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """(root, its holder of cores) for each adapted model at or below `model`. `is_core_holder` marks a holder.

    It skips the insides of LoRA layers and of holders, which hold none: three quarters of the modules of an adapted
    LLaDA-8B. Samplers call this at every step.
    """
    found, seen, left = [], set(), [model]
    while left:
        module = left.pop()
        if id(module) in seen or "lora_A" in module._modules:
            continue
        seen.add(id(module))
        for child in module._modules.values():
            if getattr(type(child), "is_core_holder", False):
                found.append((module, child))
            elif child is not None:
                left.append(child)
    return found


def arguments_of(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a forward of `module`, by name, in the order of its signature."""
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    return dict(list(given.items())[1:])


def outer_modules(root: nn.Module) -> Iterator[nn.Module]:
    """`root` and the modules below it, without the insides of adapted layers: five sixths of an adapted SDXL UNet.

    The order is arbitrary; a module that occurs twice is yielded twice.
    """
    left: list[nn.Module | None] = [root]
    while left:
        module = left.pop()
        if module is not None and "lora_A" not in module._modules:
            left.extend(module._modules.values())
            yield module
