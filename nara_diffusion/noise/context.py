"""Set λ for the forwards of an adapted model: the context `with noise_level(model, value): …`.

The contexts are entries of one `ContextVar`, and each entry knows its parent. Threads therefore do
not see each other's λ, and a thread that is started inside a context has no λ. Each async task has
its own λ. Generators behave as under `torch.no_grad`: if a generator is suspended inside the
context, its λ stays set for the caller. Exit contexts in reverse order; otherwise an error is
raised and λ is cleared.

If a part of the model is called directly, such as the encoder in `generate` of T5 and BART, it uses
the λ of the context around the call.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .level import Level, as_level


@dataclass(eq=False, slots=True)
class Entry:
    """A `noise_level` context that has been entered.

    Attributes:
        parent: the enclosing context, or None.
        holders: the core holders that the context applies to.
        level: λ; None after the context has exited, because copies of the `ContextVar` may remain.
        backward: the value of `backward_pass()` on entry.
    """

    parent: Entry | None
    holders: frozenset[nn.Module]
    level: Tensor | None
    backward: int = -1


present: ContextVar[Entry | None] = ContextVar("nara_noise_level", default=None)
"""The innermost entered context, whatever model it applies to."""


class noise_level:
    """Run forwards of `model` and its parts at noise level λ = `value`, overriding any source.

        with noise_level(model, 0.3):
            model(x)

    Contexts can be nested and entered again. On exit, even after an exception, the previous value
    is restored. Other threads and async tasks do not see λ. `value` is copied. A tensor that
    requires a gradient receives one.

    Args:
        model: an adapted model. It may be wrapped (PeftModel, DDP, `torch.compile`).
        value: λ in [0, 1], 1 = pure noise: a float, or a tensor, array or list (b,) with one value
            for each sample. Several values require that the inputs of the adapted layers start with
            the batch axis, (b, …). If the layers get (length, b, …), pass a float. A value (b, k)
            holds one λ for each of k equal, consecutive parts of a sample's l positions, such as
            blocks of a text; the layers must then get (b, l, …). A value (1, k) applies to all
            samples.

    Raises:
        ValueError: `value` is outside [0, 1], is NaN or has a wrong shape, or `model` has no NaRA
            adapter.
        RuntimeError: on exit, if another context is the innermost.
    """

    def __init__(self, model: nn.Module, value: Level) -> None:
        self._model, self._value = model, value
        self._entries: list[Entry] = []

    def __enter__(self) -> None:
        holders = frozenset(core_holders(self._model))
        entry = Entry(present.get(), holders, as_level(self._value, axes=2), backward_pass())
        self._entries.append(entry)
        present.set(entry)

    def __exit__(self, *error: object) -> None:
        innermost = entry = present.get()
        # `_entries` may have entries of other threads
        while entry is not None and entry not in self._entries:
            entry = entry.parent
        entry = self._entries[-1] if entry is None else entry
        self._entries.remove(entry)
        entry.level = None
        present.set(entry.parent if innermost is entry else None)
        if innermost is not entry:
            raise RuntimeError(
                "A noise_level(…) was exited while another one is the innermost, so λ is unknown from here on. "
                "Exit contexts in reverse order, as nested `with` blocks do. A generator that is suspended inside a "
                "context and closed later breaks this order."
            )


def backward_pass() -> int:
    """Return the number of the backward pass that is running in this thread.

    The result is −1 outside a backward pass and while a compiler is tracing.
    """
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def checked_module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is not a torch.nn.Module: pass the model itself, e.g. pipe.unet."
        )
    return model


def find_holders(model: nn.Module) -> list[Any]:
    """Return the core holders in `model`, including `model` itself."""
    return [
        child
        for module in outer_modules(model)
        for child in module._modules.values()
        if getattr(type(child), "is_core_holder", False)
    ]


def outer_modules(root: nn.Module) -> list[nn.Module]:
    """Return `root` and its submodules, in no particular order.

    Modules inside adapted layers and holders are skipped. They make up five sixths of the modules
    of an adapted SDXL UNet, and samplers look for holders at every step.
    """
    modules: dict[int, nn.Module] = {}
    left: list[nn.Module | None] = [root]
    while left:
        module = left.pop()
        if module is None or id(module) in modules or "lora_A" in module._modules:
            continue
        if "cores" not in module._modules or not getattr(type(module), "is_core_holder", False):
            modules[id(module)] = module
            left.extend(module._modules.values())
    return list(modules.values())


def core_holders(model: nn.Module) -> list[Any]:
    """Return the core holders in `model`, including `model` itself.

    Raises:
        ValueError: `model` is not a module, or has no core holders.
    """
    holders = find_holders(checked_module(model))
    if not holders:
        raise ValueError(
            f"{type(model).__name__} has no NaRA adapter: add one first, e.g. get_peft_model(model, NaraConfig(…))."
        )
    return holders
