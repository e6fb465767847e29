"""C(λ) outside of the forwards of the whole model: for a part that is called by itself, and to inspect an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.cores.registry import CoreSet
from nara_diffusion.layers.offloading import groups_of
from nara_diffusion.layers.variants import CoreChannel, Key
from nara_diffusion.noise.level import (
    as_level,
    backward_pass,
    core_holders,
    entry_for,
    find_holders,
)
from nara_diffusion.strict import PEFT_PREFIX


class ReadOutsideForwards:
    """What the holder of cores does while no forward of the root runs."""

    root: Any
    channel: CoreChannel
    matrix: Any
    depends_on_noise: Any

    @torch.compiler.disable(recursive=True)
    def core_alone(self, key: Key) -> Tensor:
        """C for a layer that finds none: of the running forward, or made at λ of the context around a part alone."""
        entry, pushed = entry_for(self), self.channel.pushed()
        if pushed is not None and pushed[1] is entry and key in pushed[2]:
            return pushed[2][key]  # a context of another model has been entered since
        name, level = key[0], None if entry is None else entry.level
        if self.depends_on_noise(name) and (
            entry is None or level is None or entry.backward != backward_pass()
        ):
            raise RuntimeError(
                f"No C(λ) has reached a layer for adapter '{name}'. The forward of the whole adapted model makes C: "
                "call that forward, or call a part of the model inside `with noise_level(model, value):`, and do not "
                "recompute a part of it by a checkpoint other than the model's own "
                "(`model.gradient_checkpointing_enable()`)."
            )
        values = 1 if level is None else len(level)
        if values > 1 and (self.channel.sample_major or self.channel.one_level):
            raise RuntimeError(
                f"noise_level has {values} values, but a part of a model whose layers may see several rows a sample is "
                "called by itself, so that its samples cannot be told apart: pass one value, or call the whole model."
            )
        with self.in_memory():
            return self.matrix(key, level)

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Inside the context, the cores are in memory, also if group offloading keeps them on disk."""
        groups = groups_of(self.root)
        for group in groups:
            group.onload_()
        try:
            yield
        finally:
            for group in groups:
                group.offload_()


@contextmanager
def onloaded_cores(model: nn.Module) -> Iterator[None]:
    """Inside the context, all cores at or below `model` are in memory."""
    with ExitStack() as stack:
        for holder in find_holders(model):
            stack.enter_context(holder.in_memory())
        yield


def core_matrix(
    model: nn.Module,
    noise_level: float | Tensor,
    adapter_name: str = "default",
    *,
    module: str | None = None,
) -> Tensor:
    """C(λ) of one adapter: (b, r, r) for λ (b,), (1, r, r) for a float or a core without noise input.

    Args:
        model: an adapted model. noise_level: λ in [0, 1], a float or (b,).
        module: for `core_sharing` other than "global", the name of an adapted module (as in `named_modules()`).

    Raises:
        ValueError: no NaRA adapter of that name, or several; λ out of range, or `module` missing or not adapted.
    """
    holders = core_holders(model)
    found = [holder.cores[adapter_name] for holder in holders if adapter_name in holder.cores]
    if len(found) != 1:
        names = ", ".join(sorted({repr(name) for holder in holders for name in holder.cores}))
        raise ValueError(
            f"There {f'are {len(found)} adapters' if found else 'is no adapter'} '{adapter_name}': the model has "
            f"{names}. Of several models below this one, pass the one that is meant."
        )
    cores: CoreSet = found[0]
    group = (
        next(iter(cores))
        if len(cores) == 1 and module is None
        else _group_of(model, module, adapter_name, cores)
    )
    with onloaded_cores(model):
        return cores.matrix(group, as_level(noise_level))


def _group_of(model: nn.Module, module: str | None, adapter_name: str, cores: CoreSet) -> str:
    if module is None:
        raise ValueError(
            f'The adapter has {len(cores)} cores: pass module="name of an adapted module".'
        )
    for name, layer in model.named_modules():
        if name in (module, f"{PEFT_PREFIX}{module}") and adapter_name in getattr(
            layer, "scaling", {}
        ):
            variant: Any = getattr(layer, "lora_variant", {}).get(adapter_name)
            return (
                next(iter(cores)) if variant is None else variant.key[1]
            )  # an identity's layers have no variant
    raise ValueError(f"'{module}' is not a module adapted by '{adapter_name}'.")
