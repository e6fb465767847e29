"""Weights that hooks load, or convert to the compute dtype, only for the `forward` of their own module.

    accelerate     `_hf_hook`          CPU and disk offload: elsewhere, the weights are on "meta"
    Diffusers      `_diffusers_hook`   group offloading: elsewhere, they are on the CPU, or left without values on disk;
                                       layerwise casting: elsewhere, they are in a storage dtype such as float8

Code that reads weights without calling their module has to bring them in itself: the LoRA variants, which read B, W0
and the magnitude, and the root's hook, which reads the cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_managed(module: nn.Module) -> bool:
    """Whether accelerate or Diffusers have put a hook around the forward of `module` itself."""
    return "_hf_hook" in vars(module) or "_diffusers_hook" in vars(module)


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Inside the context, all weights of `modules` are on the device, and in the dtype, in which they compute."""
    managed = [(below, hook) for module in modules for below in module.modules() for hook in _hooks_of(below)]
    for module, hook in managed:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in reversed(managed):
            hook.post_forward(module, torch.empty(0))


def _hooks_of(module: nn.Module) -> list[Any]:
    """The hooks around the forward of `module`, the outermost first, in the order in which its call would run them.

    It includes all hooks of Diffusers' registry: one of them counts calls, to prefetch weights.
    """
    registry = getattr(module, "_diffusers_hook", None)
    theirs = [] if registry is None else list(reversed(registry.hooks.values()))
    return [*_offloading_hooks(getattr(module, "_hf_hook", None)), *theirs]


def _offloading_hooks(hook: Any) -> list[Any]:
    """The offloading hooks of accelerate in `hook`, which may be a sequence of hooks."""
    parts = getattr(hook, "hooks", [hook])
    return [part for part in parts if getattr(part, "offload", False)]


# ---------------------------------------------------------------------- the root


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed's ZeRO-3 keeps a part of the weights of `module` in each process now."""
    marks = ("device_mesh", "ds_id")  # of a DTensor, and of what ZeRO-3 manages
    return any(hasattr(parameter, mark) for parameter in module.parameters() for mark in marks)


def compute_device(module: nn.Module) -> torch.device | None:
    """The device on which `module` computes, wherever its weights are now; None if it has no weights."""
    tensors = (*module.parameters(), *module.buffers())
    executed = (device for below in module.modules() for device in _execution_devices(below))
    here = (tensor.device for tensor in tensors if not tensor.is_meta)
    return next(executed, None) or next(here, None)


def _execution_devices(module: nn.Module) -> list[torch.device]:
    devices = []
    for hook in _hooks_of(module):
        group = getattr(hook, "group", None)
        device = getattr(hook, "execution_device", None) if group is None else group.onload_device
        if device is not None:
            devices.append(torch.device(device))
    return devices


def onload_cores(root: nn.Module) -> bool:
    """Read the cores of `root` from disk if group offloading keeps them there. The forward of `root` removes them
    again.

    (Cores that are offloaded to the CPU stay there: they are small enough to compute there.)

    Returns:
        Whether they are kept on disk.
    """
    groups = _groups_of_cores(root)
    for group in groups:
        group.onload_()
    return bool(groups)


def keeps_cores_on_disk(root: nn.Module) -> bool:
    """Whether group offloading keeps the cores of `root` on disk while no forward of it runs."""
    return bool(_groups_of_cores(root))


@contextmanager
def onloaded_cores(model: nn.Module) -> Iterator[None]:
    """Inside the context, the cores at or below `model` are in memory, also if group offloading keeps them on disk."""
    groups = [group for module in model.modules() for group in _groups_of_cores(module)]
    for group in groups:
        group.onload_()
    try:
        yield
    finally:
        for group in groups:
            group.offload_()


def _groups_of_cores(root: nn.Module) -> list[Any]:
    groups = [hook.group for hook in _hooks_of(root) if hasattr(hook, "group")]
    return [group for group in groups if group.offload_to_disk_path is not None and any(map(_is_holder, group.modules))]


def _is_holder(module: nn.Module) -> bool:
    return getattr(type(module), "is_core_holder", False)


KEEPS_COPY = (
    "group offloading keeps a copy of its weight, which would come back at the next forward. Merge first, then call "
    "enable_group_offload()."
)


def check_mergeable_here(layer: Any, layer_name: str) -> None:
    """Refuse to merge into a weight that is offloaded, or that will be read again from disk or pinned memory.

    Raises:
        ValueError: accelerate has the weight of `layer` offloaded, layerwise casting stores it as float8, or group
            offloading keeps it on disk or in pinned memory.
    """
    groups = [hook.group for hook in _hooks_of(layer) if hasattr(hook, "group")]
    weight = layer.weight
    if any(group.offload_to_disk_path is not None or group.stream is not None for group in groups):
        reason = KEEPS_COPY
    elif weight.is_meta:
        reason = "accelerate has offloaded its weight. Take the offload away first: pipe.remove_all_hooks()."
    elif weight.is_floating_point() and weight.element_size() == 1:
        reason = f"its weight is stored as {weight.dtype}. Merge first, then call enable_layerwise_casting()."
    else:
        return
    raise ValueError(f"Layer '{layer_name}' cannot be merged: {reason}")


def check_kept_nowhere(model: nn.Module, layer_kind: type) -> None:
    """Refuse to merge into blocks that group offloading keeps elsewhere; before the first forward, layers do not know.

    Args:
        layer_kind: the class of the layers to merge.

    Raises:
        ValueError: group offloading keeps a layer of that kind below `model` on disk or in pinned memory.
    """
    groups = {
        id(hook.group): hook.group for module in model.modules() for hook in _hooks_of(module) if hasattr(hook, "group")
    }
    keeping = (group for group in groups.values() if group.offload_to_disk_path is not None or group.stream is not None)
    kept = {below for group in keeping for part in group.modules for below in part.modules()}
    for name, module in model.named_modules():
        if isinstance(module, layer_kind) and module in kept:
            raise ValueError(f"Layer '{name}' cannot be merged: {KEEPS_COPY}")


def check_addable(model: nn.Module) -> None:
    """Refuse to add an adapter to a model whose weights are on "meta": PEFT would put the adapter there too.

    (PEFT itself handles a model that `from_pretrained` has dispatched by a device map.)

    Raises:
        ValueError: accelerate offloads the layers of `model` one by one.
    """
    offloaded = (module for module in model.modules() if _offloading_hooks(vars(module).get("_hf_hook")))
    if not hasattr(model, "hf_device_map") and next(offloaded, None) is not None:
        raise ValueError(
            f"{type(model).__name__} is offloaded layer by layer, so that a new adapter would have no values: load it "
            "by pipe.load_nara_weights(), or add it before enable_sequential_cpu_offload()."
        )


def check_not_on_disk(model: nn.Module, component: str) -> None:
    """Refuse to read or replace the adapters of a model whose weights are on disk.

    Raises:
        ValueError: Diffusers' group offloading keeps weights of `model` on disk.
    """
    for module in model.modules():
        if any(hook.group.offload_to_disk_path is not None for hook in _hooks_of(module) if hasattr(hook, "group")):
            raise ValueError(
                f"Group offloading keeps the weights of {component} on disk, in files that do not follow a change of "
                "adapters: load, save or unload adapters first, and call enable_group_offload(…, "
                "offload_to_disk_path=…) after that."
            )


def beside_inputs(cores: Mapping[Any, Tensor], args: Any, kwargs: Any) -> dict[Any, Tensor]:
    """Move cores that are on the CPU to the device of a forward's first tensor, once and not again in each layer."""
    devices = (value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    device = next(devices, None)
    return {
        key: core if device is None or core.device.type != "cpu" else core.to(device) for key, core in cores.items()
    }
