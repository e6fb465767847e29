"""Load and prepare models under accelerate's engines.

Some engines would load only a part of a model, or round it. These functions load it whole and in
float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from nara_diffusion.noise.context import find_holders

from .engines import deepspeed_plugin, zero_stage


def prepare(accelerator: Accelerator, model: nn.Module, *others: Any) -> list[Any]:
    """Call `accelerator.prepare` in a way that suits a model with an adapter under every engine.

    Mixed precision uses autocast under all engines, as it does under DDP. The mixed precision of
    FSDP2 and DeepSpeed would round the core's float32 weights, with an error of some per cent in
    C − I. DeepSpeed's would also round all trained weights. DeepSpeed's `torch_autocast` wouldn't
    apply to evaluation, which calls the model without DeepSpeed's wrapper.

    With --fsdp_cpu_ram_efficient_loading, accelerate copies the weights of the main process to all
    others. It expects a state dict with sharded tensors only, but the core's frequencies are a
    buffer that isn't sharded.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.mixed_precision == "bf16":
            model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
        with _without_bf16(accelerator):
            return list(accelerator.prepare(model, *others))
    if accelerator.distributed_type != DistributedType.FSDP:
        return list(accelerator.prepare(model, *others))
    plugin: Any = accelerator.state.fsdp_plugin
    if find_holders(model) and (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = None
        model.forward = torch.autocast(accelerator.device.type, policy.param_dtype)(model.forward)
    persistent = [(m, set(m._buffers) - m._non_persistent_buffers_set) for m in model.modules()]
    for module, names in persistent:
        module._non_persistent_buffers_set.update(names)
    try:
        prepared = accelerator.prepare(model, *others)
    finally:
        for module, names in persistent:
            module._non_persistent_buffers_set.difference_update(names)
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    return list(prepared)


@contextmanager
def _without_bf16(accelerator: Accelerator) -> Iterator[None]:
    """Remove bf16 from DeepSpeed's configuration inside the context, since it casts all weights."""
    config = deepspeed_plugin(accelerator).deepspeed_config
    launched = config["bf16"]
    config["bf16"] = {"enabled": False}
    try:
        yield
    finally:
        config["bf16"] = launched  # `accelerator.mixed_precision` reads it


@contextmanager
def loading_in(accelerator: Accelerator, dtype: torch.dtype) -> Iterator[None]:
    """Make `from_pretrained` return float32 weights under ZeRO-3 too, if `dtype` is float32.

    DeepSpeed would otherwise cast the weights to bf16 during loading.
    """
    if dtype != torch.float32 or zero_stage(accelerator) != 3:
        yield
        return
    plugin = deepspeed_plugin(accelerator)
    with ExitStack() as undo:
        # `set_deepspeed_weakref` gives `from_pretrained` a copy of the configuration
        undo.callback(plugin.set_deepspeed_weakref)
        undo.enter_context(_without_bf16(accelerator))
        plugin.set_deepspeed_weakref()
        yield


def load_whole(accelerator: Accelerator, load: Callable[[], Any]) -> Any:
    """Call `load` so that `from_pretrained` gives each process the whole model under any engine.

    ZeRO-3 would give each process only a part of the model. --fsdp_cpu_ram_efficient_loading would
    give an empty model to all processes but the main one.
    """
    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    launched = os.environ.pop(variable, None)
    if zero_stage(accelerator) == 3:
        unset_hf_deepspeed_config()
    try:
        return load()
    finally:
        if launched is not None:
            os.environ[variable] = launched
        if zero_stage(accelerator) == 3:
            deepspeed_plugin(accelerator).set_deepspeed_weakref()


def recompute_activations(model: PreTrainedModel) -> None:
    """Turn on the model's gradient checkpointing, in the form that needs no gradient of inputs."""
    # the name of the argument up to transformers 5.23, deprecated since then
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
