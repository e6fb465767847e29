"""Loading into a pipeline whose parts wait elsewhere: the hooks that bring them in are off meanwhile, as for a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn

from nara_diffusion.offload import check_not_on_disk


@contextmanager
def offloading_suspended(pipe: Any) -> Iterator[None]:
    """Inside, no offload hook of accelerate's is on `pipe`; afterwards, also after an error, all are on again.

    Raises:
        ValueError: group offloading keeps weights on disk.
    """
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            check_not_on_disk(part, name)
    model, sequential, grouped = _func_optionally_disable_offloading(pipe)
    device = {"device": pipe._offload_device} if hasattr(pipe, "_offload_device") else {}
    try:
        yield
    finally:
        if model:
            pipe.enable_model_cpu_offload(**device)
        elif sequential:
            pipe.enable_sequential_cpu_offload(**device)
        elif grouped:
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(part)
