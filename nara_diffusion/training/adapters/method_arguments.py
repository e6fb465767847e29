"""Which arguments each method of `--adapter` reads. A contradiction raises; an argument without effect is logged."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from nara_diffusion.cores.registry import BUILT_IN
from nara_diffusion.training.arguments.common import AdapterArguments
from nara_diffusion.training.arguments.values import default_of

from .methods import CORE_FIELDS, METHODS, effective, method_of

logger = logging.getLogger(__name__)
# Arguments of an adapter that other families than these don't read.
_READERS: dict[str, tuple[str, ...]] = {
    "target_modules": ("nara", "lora", "other"),
    "rank": ("nara", "lora", "other"),
    "lora_dropout": ("nara", "lora", "other"),
    "num_virtual_tokens": ("prompt",),
}
# The built-in types of core that read an argument, unless all do. Custom cores may read any argument.
_TRAINED = ("hypernetwork", "constant", "knots")
_CORE_READERS: dict[str, tuple[str, ...]] = {
    "core_module": (),
    "core_learning_rate": _TRAINED,
    "core_scale": _TRAINED,
    "core_sharing": _TRAINED,
    "core_hidden_dims": ("hypernetwork",),
    "mask_density_radius": ("hypernetwork",),
    "noise_embedding_dim": ("hypernetwork",),
    "fourier_scale": ("hypernetwork",),
    "core_bins": ("bins",),
    "core_knots": ("knots",),
}
# Switches whose meaning a method either knows or contradicts: {argument: (families, further methods)}.
_SWITCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "use_dora": (("nara", "lora"), ()),
    "use_rslora": (("nara", "lora"), ()),
    "core_type": (("nara",), ()),
    "lora_alpha": (("nara", "lora"), ("adalora",)),
}


def check_method(args: Any) -> None:
    """Raises ValueError for arguments that contradict the method, and logs those that it doesn't read."""
    method, defaults = method_of(args), _defaults(args)
    for name, value in method.fixed.items():
        if getattr(args, name) not in (defaults[name], value):
            raise ValueError(f"{name} is {getattr(args, name)!r}, but adapter {args.adapter} means {name} {value!r}.")
    for name, (families, methods) in _SWITCHES.items():
        neutral = (defaults[name], args.rank) if name == "lora_alpha" else (defaults[name],)
        if method.family in families or args.adapter in methods or getattr(args, name) in neutral:
            continue
        knowing = [key for key, other in METHODS.items() if other.family in families or key in methods]
        raise ValueError(
            f"{name} is {getattr(args, name)!r}, which adapter {args.adapter} doesn't know: leave it out, or choose "
            f"one of {', '.join(knowing)}."
        )
    _check_options(args)
    unread = unread_arguments(args)
    if unread:
        logger.warning("adapter %s doesn't read %s", _described(args), ", ".join(unread))


def _check_options(args: Any) -> None:
    """Refuse `adapter_options` that would turn the method into another one."""
    own = {name for name in _defaults(args) if name in CORE_FIELDS or name in ("use_dora", "use_rslora")}
    for option in args.adapter_options or []:
        name = option.partition("=")[0]
        if name in own:
            raise ValueError(
                f"adapter_options holds {option!r}, which is an argument of its own: give {name} (--{name})."
            )


def _described(args: Any) -> str:
    """The name of the method, with `core_type` where the user chose one."""
    method = method_of(args)
    if method.family != "nara" or "core_type" in method.fixed:
        return args.adapter
    return f"{args.adapter} with core_type {args.core_type!r}"


def unread_arguments(args: Any) -> list[str]:
    """The arguments that differ from their default and that the method doesn't read."""
    core_type = effective(args, "core_type")
    return [
        field.name
        for field in dataclasses.fields(args)
        if not _reads(args.adapter, core_type, field.name) and getattr(args, field.name) != default_of(field)
    ]


def without_unread(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, which stand in for arguments that weren't `given`, without those that the given method doesn't read."""
    adapter = given.get("adapter", "nara")
    core_type = METHODS[adapter].fixed.get("core_type", given.get("core_type", "hypernetwork"))
    return {name: value for name, value in values.items() if _reads(adapter, core_type, name)}


def _reads(adapter: str, core_type: str, name: str) -> bool:
    family = METHODS[adapter].family
    if name in CORE_FIELDS or name in _CORE_READERS:
        return family == "nara" and (core_type not in BUILT_IN or core_type in _CORE_READERS.get(name, BUILT_IN))
    return family in _READERS.get(name, (family,))


def _defaults(args: Any) -> dict[str, Any]:
    """{name: default} of the arguments of an adapter."""
    fields = dataclasses.fields(AdapterArguments)
    own = {field.name: field for field in dataclasses.fields(args)}
    return {field.name: default_of(own.get(field.name, field)) for field in fields}
