"""Names of adapters in a pipeline: that of a new adapter, and that of the adapter to save."""

from __future__ import annotations

from torch import nn

from .insertion import adapters_of, nara_adapters_of


def _free_name(models: dict[str, nn.Module]) -> str:
    existing = {name for model in models.values() for name in adapters_of(model)}
    number = len(adapters_of(next(iter(models.values()))))
    while f"default_{number}" in existing:
        number += 1
    return f"default_{number}"


def name_to_load(models: dict[str, nn.Module], name: str | None, hotswap: bool) -> str:
    """The name that an adapter is loaded under: `name`, or the first free default_N.

    Raises:
        ValueError: an invalid name; a duplicate adapter name; or, for a hotswap, the name of no adapter.
    """
    existing = sorted({name for model in models.values() for name in adapters_of(model)})
    if hotswap:
        if name is None or name not in existing:
            raise ValueError(
                f"hotswap=True replaces an adapter that is there, but adapter_name is {name!r} and the pipeline has "
                f"{', '.join(map(repr, existing)) or 'none'}: name one of them, or leave hotswap out."
            )
        return name
    if name is None:
        return _free_name(models)
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name is {name!r}: pass a name without dots, or None.")
    if hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter_name '{name}' is a method of torch's modules, which keep adapters: choose another.")
    if name in existing:
        raise ValueError(
            f"adapter_name '{name}' is a duplicate, since the pipeline has an adapter of that name: choose "
            f"another name, delete the other adapter by pipe.delete_adapters('{name}'), or replace it by hotswap=True."
        )
    return name


def name_to_save(models: dict[str, nn.Module], name: str | None) -> str:
    """The name of the adapter to save: `name`; if None, that of the only NaRA, or else "default".

    Raises:
        ValueError: there is no NaRA of that name.
    """
    there = list(dict.fromkeys(name for model in models.values() for name in nara_adapters_of(model)))
    if name is None and len(there) == 1:
        return there[0]
    wanted = "default" if name is None else name
    if wanted in there:
        return wanted
    others = {other for model in models.values() for other in adapters_of(model)} - set(there)
    hint = f" '{wanted}' is a LoRA: save it by save_lora_weights." if wanted in others else ""
    raise ValueError(
        f"There is no NaRA adapter '{wanted}' to save: the pipeline has {', '.join(map(repr, there)) or 'none'}.{hint}"
    )
