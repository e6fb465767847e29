"""`core_matrix`: the C(λ) of an adapter, to inspect it."""

from __future__ import annotations

from torch import Tensor, nn

from nara_diffusion.loaders.strict import PEFT_PREFIX
from nara_diffusion.noise.level import as_signals, core_holders

from .core_set import CoreSet
from .holder import onloaded_cores


def core_matrix(
    model: nn.Module,
    noise_level: float | Tensor,
    adapter_name: str = "default",
    *,
    module: str | None = None,
    mask_density: float | Tensor | None = None,
) -> Tensor:
    """C(λ) of one adapter: (b, r, r) for λ (b,), (1, r, r) for a float or a core without noise input.

    Args:
        model: an adapted model. noise_level: λ in [0, 1], a float or (b,).
        module: for `core_sharing` other than "global", the name of an adapted module (as in `named_modules()`).
        mask_density: for `core_input` "mask_density" or "both".

    Raises:
        ValueError: no NaRA adapter of that name, or several; λ out of range, or `module` missing or not adapted.
    """
    cores = _cores_of(model, adapter_name)
    groups = list(cores)
    group = groups[0] if len(groups) == 1 and module is None else _group_of(model, module, adapter_name, groups)
    if cores.needs_density and mask_density is None:
        raise ValueError(f"Adapter '{adapter_name}' reads the mask density too: pass mask_density=….")
    with onloaded_cores(model):
        return cores.matrix(group, as_signals(noise_level, mask_density))


def _cores_of(model: nn.Module, adapter_name: str) -> CoreSet:
    holders = core_holders(model)
    found = [holder.cores[adapter_name] for holder in holders if adapter_name in holder.cores]
    if not found:
        names = sorted({repr(name) for holder in holders for name in holder.cores})
        raise ValueError(f"There is no adapter '{adapter_name}': the model has {', '.join(names)}.")
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} models below {type(model).__name__} have an adapter '{adapter_name}': pass the one that is "
            "meant."
        )
    return found[0]


def _group_of(model: nn.Module, module: str | None, adapter_name: str, groups: list[str]) -> str:
    if module is None:
        raise ValueError(f'The adapter has {len(groups)} cores: pass module="name of an adapted module".')
    for name, layer in model.named_modules():
        if name == module or name == f"{PEFT_PREFIX}{module}":
            variant = getattr(layer, "lora_variant", {}).get(adapter_name)
            if variant is not None:
                return variant.group
            if adapter_name in getattr(layer, "scaling", {}):  # an identity, whose layers have no variant
                return groups[0]
    raise ValueError(f"'{module}' is not a module adapted by '{adapter_name}'.")
