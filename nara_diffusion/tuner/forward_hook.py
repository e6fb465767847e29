"""The hook before each forward of an adapted model: λ → C(λ) of the active adapters → the channel of the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nara_diffusion.noise.schedulers.prediction import check_scheduler_at_work
from nara_diffusion.runtime.channel import PerForwardCores
from nara_diffusion.runtime.checkpointing import checkpoint_without_core
from nara_diffusion.runtime.offloading import onload_cores
from nara_diffusion.runtime.root_call import remove_root_call, set_root_call
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME, CoreHolder
from nara_diffusion.tuner.holder.per_forward_cores import cores_of_forward

from .merging import unmerge_all


def attach_holder(holder: CoreHolder, root: nn.Module) -> None:
    """Make `holder` a child of `root`, and make C(λ) before each forward of `root`. Harmless when repeated."""
    if getattr(root, HOLDER_NAME, None) is holder:
        return
    setattr(root, HOLDER_NAME, holder)
    holder.hook_handle = root.register_forward_pre_hook(_before_forward, with_kwargs=True)
    set_root_call(root, holder.channel)


def detach_holder(root: nn.Module) -> None:
    """Undo `attach_holder`."""
    holder: CoreHolder = getattr(root, HOLDER_NAME)
    if holder.hook_handle is not None:
        holder.hook_handle.remove()
        holder.hook_handle = None
    remove_root_call(root)
    checkpoint_without_core(root, holder.channel)
    delattr(root, HOLDER_NAME)


@torch.compiler.disable(recursive=True)
def _before_forward(root: nn.Module, args: Any, kwargs: Any) -> None:
    holder: CoreHolder = getattr(root, HOLDER_NAME)
    if not getattr(root, "peft_config", None):
        detach_holder(root)  # code that does not know of cores has unloaded the adapters
        return
    holder.channel.begin(_cores_for(root, holder, args, kwargs))


def _cores_for(root: nn.Module, holder: CoreHolder, args: Any, kwargs: Any) -> PerForwardCores:
    if holder.merged and holder.disable_adapters:
        unmerge_all(root)  # every layer of it, and not only those that this forward reaches
    elif holder.merged:
        holder.check_merged_level()
        holder.warn_of_merged_level(root, args, kwargs)
    names = holder.active()
    running = [*names, *holder.merged_adapters]
    check_scheduler_at_work(root.peft_config, running, holder.base_prediction)  # type: ignore[arg-type]
    if not names:
        return {}
    holder.prepare_parts(root)
    onload_cores(root)
    return cores_of_forward(holder.cores_of(names), holder.channel, holder.conventions.source, root, args, kwargs)
