"""Add an adapter to a model: check it, make cores, hide the holder, and undo after an error."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from difflib import get_close_matches
from itertools import pairwise

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.core import BUILT_IN, HOLDER_NAME, CoreSet, core_group, make_cores
from nara_diffusion.layers.offloading import is_dispatched_by_layers
from nara_diffusion.strict import PEFT_PREFIX

logger = logging.getLogger(__name__)


def checked_config(model: nn.Module, adapter_name: str, config: object) -> NaraConfig:
    """Return the configuration of an adapter that can be added to `model`.

    Raises:
        ValueError: it is no `NaraConfig`, or the layers of `model` are offloaded one by one.
    """
    if not isinstance(config, NaraConfig):
        raise ValueError(
            f"Adapter '{adapter_name}' has a {type(config).__name__}: NaraModel needs a NaraConfig."
        )
    if is_dispatched_by_layers(model) and not hasattr(model, "hf_device_map"):
        raise ValueError(
            f"{type(model).__name__} is offloaded layer by layer, so a new adapter would have no values: load "
            "it by pipe.load_nara_weights(), or add it before enable_sequential_cpu_offload()."
        )
    return config


def adapters_are_off(model: nn.Module) -> bool:
    """Return True if `model` has adapted layers, and all of them have their adapters disabled."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return bool(layers) and all(layer.disable_adapters for layer in layers)


def warn_of_disabled(model: nn.Module, adapter_name: str) -> None:
    """Warn that a new adapter is disabled, because the adapters of `model` are."""
    logger.warning(
        "The adapters of %s are disabled (disable_lora() or disable_adapters()), and so is the new adapter '%s': "
        "call enable_lora() or enable_adapters() to enable them.",
        type(model).__name__,
        adapter_name,
    )


@contextmanager
def restored_on_error(*roots: nn.Module) -> Iterator[None]:
    """Restore the `roots` after an error inside the context.

    This restores modules, attributes, parameters and what is trainable. Containers are restored in
    place, since handles of hooks refer to them. Values that were changed in place are not restored,
    but PEFT's initialisations that change the base give its weights new tensors.
    """
    modules: dict[int, nn.Module] = {}
    values = []
    for root in roots:
        for module in root.modules():
            modules[id(module)] = module
        for parameter in root.parameters():
            values.append((parameter, parameter.data, parameter.requires_grad))
    states = [(module, _attributes(module)) for module in modules.values()]
    try:
        yield
    except BaseException:
        for module, state in states:
            _restore(module, state)
        for parameter, data, requires_grad in values:
            parameter.data = data
            parameter.requires_grad = requires_grad
        raise


_State = list[tuple[str, object, object]]
"""For each attribute of a module: (name, value, shallow copy of the value if it is a container)."""


def _attributes(module: nn.Module) -> _State:
    found: _State = []
    for name, value in vars(module).items():
        is_container = type(value) in (dict, list, set, OrderedDict)
        found.append((name, value, copy(value) if is_container else None))
    return found


def _restore(module: nn.Module, state: _State) -> None:
    vars(module).clear()
    for name, value, before in state:
        if isinstance(value, list) and isinstance(before, list):
            value[:] = before
        elif isinstance(value, (dict, set)) and before is not None:
            value.clear()
            value.update(before)  # type: ignore[call-overload]
        vars(module)[name] = value


@contextmanager
def without_holder(root: nn.Module) -> Iterator[None]:
    """Hide the cores from PEFT inside the context: `target_modules` may match their modules."""
    holder = root._modules.pop(HOLDER_NAME, None)
    try:
        yield
    finally:
        if holder is not None:
            root._modules[HOLDER_NAME] = holder


@contextmanager
def suggesting_targets(model: nn.Module, config: NaraConfig) -> Iterator[None]:
    """Add the nearest module names to PEFT's error about `target_modules` that match nothing."""
    try:
        yield
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        names = _nearest_names(model, config.target_modules or ())
        hint = f" Did you mean {', '.join(names)}?" if names else ""
        raise type(error)(f"{error}{hint}") from None


def _nearest_names(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    known = {}
    for path, _ in model.named_modules():
        name = path.rpartition(".")[2]
        known[name.lower()] = name
    found = set()
    for target in [targets] if isinstance(targets, str) else targets:
        wanted = target.rpartition(".")[2].lower()
        for match in get_close_matches(wanted, known, 1):
            found.add(repr(known[match]))
    return sorted(found)


def check_adapter_names(model: nn.Module, names: set[str]) -> None:
    """Raise ValueError if one of several adapters has the name of a part of a key.

    PEFT would leave out tensors of such an adapter, or of another one, when saving.
    """
    if len(names) < 2:
        return
    for key in model.state_dict():
        if not any(part in key for part in (".lora_", ".base_layer.", f"{HOLDER_NAME}.")):
            continue
        for before, name in pairwise(f"{PEFT_PREFIX}{key}".split(".")):
            if name in names and not _precedes_adapter_name(before):
                raise ValueError(
                    f"adapter '{name}' is named like a part of '{key}', so PEFT would leave "
                    "out tensors when it saves one of several adapters. Choose another name."
                )


def _precedes_adapter_name(part: str) -> bool:
    """Return True if the name of an adapter follows `part` in a key."""
    if part == HOLDER_NAME:
        return False
    return part.startswith(("lora_", "cores", "modules_to_save"))


def cores_for(
    config: NaraConfig,
    adapter_name: str,
    layers: dict[str, LoraLayer],
    low_cpu_mem_usage: bool,
    is_dispatched: bool,
) -> CoreSet:
    """Return the cores of an adapter, on the device of its layers.

    Args:
        layers: name → layer, for the layers that the adapter adapts.
        low_cpu_mem_usage: True if a file will replace the values, so that they may be on "meta".
        is_dispatched: True if accelerate offloads the layers one by one.
    """
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        rank = layer.r[adapter_name]  # follows rank_pattern
        group = core_group(config, name, rank)
        ranks[group] = max(rank, ranks.get(group, 0))
    # a custom core may have values that no file holds
    on_meta = low_cpu_mem_usage and config.core_type in BUILT_IN
    with torch.device("meta") if on_meta else nullcontext():
        cores = make_cores(config, ranks)
    if any(parameter.is_meta for parameter in cores.parameters()):
        return cores
    return cores.to(_device_for(layers.values(), low_cpu_mem_usage or is_dispatched))


def _device_for(layers: Iterable[LoraLayer], will_be_loaded: bool) -> torch.device:
    """Return the first device of the layers' parameters other than "meta".

    If all parameters are on "meta", return "meta", or the CPU if their values will be loaded.
    """
    is_empty = True
    for layer in layers:
        assert isinstance(layer, nn.Module)
        for parameter in layer.parameters():
            if parameter.device.type != "meta":
                return parameter.device
            is_empty = False
    return torch.device("cpu" if is_empty or will_be_loaded else "meta")
