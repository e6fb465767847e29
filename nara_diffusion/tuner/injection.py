"""Adding an adapter: a record of what PEFT has injected, to undo it, and hiding the cores from PEFT meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME, CoreHolder, holder_of

from .forward_hook import detach_holder

LOADED_FLAG = "_hf_peft_config_loaded"
"""The attribute by which Diffusers and Transformers know that a model has adapters."""


class Injection:
    """The record of one call of `inject_adapter`, by which `undo` reverts it.

    Args:
        holder: of the cores. changes_base: whether the initialisation takes s·B·A out of the base weights, as PiSSA's.
    """

    def __init__(self, holder: CoreHolder, changes_base: bool) -> None:
        self.holder = holder
        self.changes_base = changes_base
        self.layers: list[tuple[nn.Module, str, LoraLayer]] = []
        self.ranks: dict[str, int] = {}

    @property
    def device(self) -> torch.device:
        parameters = (p for _, _, layer in self.layers for p in layer.parameters())  # type: ignore[attr-defined]
        return next((p.device for p in parameters if p.device.type != "meta"), torch.device("cpu"))

    def undo(self, adapter_name: str) -> None:
        for parent, name, layer in reversed(self.layers):
            self._restore_base(layer, adapter_name)
            layer._active_adapter = [active for active in layer.active_adapters if active != adapter_name]
            layer.delete_adapter(adapter_name)
            if not layer.r:
                setattr(parent, name, layer.base_layer)

    def _restore_base(self, layer: Any, adapter_name: str) -> None:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if self.changes_base and weight is not None and weight.is_floating_point():
            weight.data += layer.get_delta_weight(adapter_name).to(weight.dtype)


@contextmanager
def rollback_on_error(root: Any, adapter_name: str) -> Iterator[None]:
    """After an error inside, where an adapter of that new name is added, `root` is as before."""
    flag = vars(root).get(LOADED_FLAG)
    layers = [layer for layer in root.modules() if isinstance(layer, BaseTunerLayer)]
    before = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    with trainable_again(root):
        try:
            yield
        except BaseException:
            roll_back(root, adapter_name)
            for layer, names, disabled in before:
                layer._active_adapter, layer._disable_adapters = names, disabled
            vars(root).pop(LOADED_FLAG, None)
            if flag is not None:
                setattr(root, LOADED_FLAG, flag)
            raise


@contextmanager
def trainable_again(model: nn.Module) -> Iterator[None]:
    """After an error inside, `requires_grad` of all parameters is as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in before:
            parameter.requires_grad = requires_grad
        raise


def roll_back(root: Any, adapter_name: str) -> None:
    """Undo the injection of an adapter whose weights were refused: restore modules, base weights and adapter names."""
    configs: dict[str, Any] = getattr(root, "peft_config", {})
    config, holder = configs.pop(adapter_name, None), holder_of(root)
    injection = Injection(holder, config is not None and config.changes_base)  # type: ignore[arg-type]
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer) and adapter_name in child.r:
                injection.layers.append((parent, name, child))
            elif isinstance(child, AuxiliaryTrainingWrapper) and adapter_name in child._get_available_adapters():
                _roll_back_copy(parent, name, child, adapter_name)
    injection.undo(adapter_name)
    if holder is not None:
        holder._active_adapter = [active for active in holder.active_adapters if active != adapter_name]
        holder.delete_adapter(adapter_name)
    drop_idle_holder(root)
    if not configs:
        vars(root).pop("peft_config", None)


def _roll_back_copy(parent: nn.Module, name: str, wrapper: Any, adapter_name: str) -> None:
    """Remove the adapter's copy of a module that is trained as a whole (`modules_to_save`)."""
    if wrapper._get_available_adapters() == {adapter_name}:
        setattr(parent, name, wrapper.original_module)
    else:
        active = [name for name in wrapper.active_adapters if name != adapter_name]
        wrapper.delete_adapter(adapter_name, new_active_adapters=active)


def check_name_is_free(root: Any, adapter_name: str, config: NaraConfig, state_dict: dict[str, Tensor] | None) -> None:
    """Refuse a duplicate adapter name that PEFT would overwrite in some layers and leave in others.

    Args:
        config: of the new adapter, with its target modules. state_dict: if given, its keys say what it adapts.

    Raises:
        ValueError: a layer of `root` has an adapter of that name, and the new one does not adapt that layer, or the
            existing one is no NaRA.
    """
    config = _maybe_include_all_linear_layers(copy(config), root)  # type: ignore[assignment]
    listed = state_dict and {key.rsplit(".lora_", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
    for name in _layers_with(root, adapter_name):
        stays = not (name in listed if listed else check_target_module_exists(config, name))
        if stays or not isinstance(root.peft_config[adapter_name], NaraConfig):
            raise ValueError(
                f"Layer '{name}' of {type(root).__name__} has an adapter '{adapter_name}', which would "
                f"{'stay beside' if stays else 'be overwritten by'} the new one of that name: call unload() of the "
                "PeftModel that has it before, or give the new one a name of its own, adapter_name=…."
            )


def _layers_with(root: nn.Module, adapter_name: str) -> Iterator[str]:
    """The names of the layers of `root` that have the adapter; adapted models inside `root` have their own."""
    layers = {name: layer for name, layer in root.named_modules() if isinstance(layer, LoraLayer)}
    holder = holder_of(root)
    channel = None if holder is None else holder.channel
    for name, layer in layers.items():
        is_inside = any(name.startswith(f"{other}.") for other in layers)
        variant = layer.lora_variant.get(adapter_name)
        is_others = isinstance(variant, NaraVariant) and variant.channel is not channel
        if adapter_name in layer.r and not (is_inside or is_others or isinstance(layer, ParamWrapper)):
            yield name


def drop_idle_holder(root: nn.Module) -> None:
    """Remove the holder of `root`, with its hooks and its source of λ, if it has no adapter left."""
    holder = root._modules.get(HOLDER_NAME)  # a wrapper such as PeftModel would pass an attribute of its base model
    if isinstance(holder, CoreHolder) and not (holder.cores and getattr(root, "peft_config", None)):
        detach_holder(root)


@contextmanager
def without_holder(root: nn.Module) -> Iterator[None]:
    """Hide the cores from PEFT: names of their modules ("embeddings", "layers") may match `target_modules`."""
    holder = root._modules.pop(HOLDER_NAME, None)
    try:
        yield
    finally:
        if holder is not None:
            root._modules[HOLDER_NAME] = holder
