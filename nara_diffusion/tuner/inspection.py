"""Compute the C(λ) of an adapter for inspection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nara_diffusion.cores.core_set import CoreSet
from nara_diffusion.layers.offloading import in_memory
from nara_diffusion.noise.context import core_holders, find_holders
from nara_diffusion.noise.level import as_level
from nara_diffusion.strict import PEFT_PREFIX


@contextmanager
def onloaded_cores(model: nn.Module) -> Iterator[None]:
    """Keep all cores in `model` in memory inside the context."""
    with ExitStack() as stack:
        for holder in find_holders(model):
            stack.enter_context(in_memory(holder.root))
        yield


def core_matrix(
    model: nn.Module,
    noise_level: float | Tensor,
    adapter_name: str = "default",
    *,
    module: str | None = None,
) -> Tensor:
    """Return C(λ) of one adapter.

    The result is (b, r, r) for λ (b,), and (1, r, r) for a float or a core without noise input.

    Args:
        model: an adapted model.
        noise_level: λ in [0, 1], a float or (b,).
        adapter_name: the name of the adapter.
        module: the name of an adapted module, as in `named_modules()`. Required unless
            `core_sharing` is "global".

    Raises:
        ValueError: no NaRA adapter has this name, or several do; λ is out of range; or `module` is
            missing or not adapted.
    """
    holders = core_holders(model)
    of_models = [holder.cores[adapter_name] for holder in holders if adapter_name in holder.cores]
    if len(of_models) != 1:
        names = ", ".join(sorted({repr(name) for holder in holders for name in holder.cores}))
        count = f"{len(of_models)} adapters" if of_models else "no adapter"
        raise ValueError(
            f"The model has {count} with the name '{adapter_name}'; its adapters are {names}. Pass the name of one "
            "of them, or, if several models inside this one have it, the model that you mean."
        )
    cores: CoreSet = of_models[0]
    group = next(iter(cores))
    if module is not None or len(cores) > 1:
        group = _group_of(model, module, adapter_name, cores)
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
            # layers with an identity core have no variant
            return next(iter(cores)) if variant is None else variant.key[1]
    raise ValueError(f"'{module}' is not a module adapted by '{adapter_name}'.")
