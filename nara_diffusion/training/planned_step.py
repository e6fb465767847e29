"""Measure the memory and FLOPs of a training step by running it on fake tensors.

A train script describes its step as a `PlannedStep`: a model on the meta device, and its loss.
`measure` runs loss and backward on fake CPU tensors, under the run's autocast:

    peak = weights + adapter + optimizer + max(step, gradients + update)

or `caching`, the most of what the run needs outside of its steps: each part alone on the device,
while it is loaded, quantised or encodes prompts; and the autoencoder beside the model. Only the
autoencoder's activations count there.

`step` is the highest sum of activations, temporary tensors and gradients that exist at once. Norms
return float32, as they do under CUDA's autocast. Quantised weights can't be fake tensors, so they
are counted by a formula. `step` includes an unpacked copy of the largest of them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nara_flags.training import TrainingArguments

from .run import DTYPES


class StepCounter(TorchDispatchMode):
    """Count the FLOPs of operations inside the context, and the storages that they return.

    FLOPs are counted by PyTorch's formulas. `FlopCounterMode` isn't used, since its module hooks
    keep tensors that checkpointing frees.

    Args:
        known: existing tensors, such as weights, which are not counted.

    Attributes:
        live: bytes of the counted storages that currently exist.
        peak: the highest value of `live` since the start, or since `peak` was last set.
        flops: FLOPs since the start, or since `flops` was last set.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._storages = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation, kwargs = func._overloadpacket, kwargs or {}
        if operation is _GROUPED and isinstance(args[0], FakeTensor):
            result = _grouped_product(*args)
        else:
            result = func(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        if operation is _GROUPED:
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif operation is _FLASH:
            self.flops += flop_counter.sdpa_flop_count(*(x.shape for x in args[:3]))
        elif operation is _FLASH_BACKWARD:
            self.flops += flop_counter.sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif formula := flop_counter.flop_registry.get(operation):
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._storages:
            self._storages.add(storage)
            weakref.finalize(storage, self._forget, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _forget(self, size: int) -> None:
        self.live -= size


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace all parameters and buffers of `model` with fake CPU tensors of `mode`, in place.

    Shapes, strides, dtypes, `requires_grad` and tied weights are kept. `Module.to` can't be used
    instead, since it fails on fake tensors.

    Args:
        model: a model on any device. On the meta device it takes no memory.
    """

    @cache
    def fake(tensor: Tensor) -> Tensor:
        new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new

    with mode:
        for module in model.modules():
            for name, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None:
                    setattr(module, name, fake(tensor))


def tensors_of(*models: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of `models`, each once."""
    together = nn.ModuleList(models)
    return [*together.parameters(), *together.buffers()]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the total size of `tensors` in bytes."""
    return sum(tensor.nbytes for tensor in tensors)


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_GROUPED = torch.ops.aten._grouped_mm
_STATES = {"AdamW": 8.0, "PagedAdamW": 8.0, "AdamW8bit": 2 + 2 * 4 / 256, "prodigy": 16.0}
"""Bytes that an optimizer keeps for each trained number."""


@dataclass(frozen=True)
class PlannedStep:
    """The training step of a run, as a train script describes it.

    Attributes:
        model: the module to train, with its adapter, on the meta device.
        loss: a function that runs one forward of `model` on CPU tensors and returns the scalar
            loss.
        forward: a description of the forward, such as "1 x 1024 tokens".
        parts: {name: frozen module on the meta device}. The trained model is first. Each other one
            is on the device alone, before training.
        beside: the name of a part that is on the device beside the model, while `encode` runs.
        encode: a function that fills the run's caches by this part.
        swapped: frozen weights of blocks that are on the host while others run. Two of these blocks
            are on the device at once.
        swappable: the number of blocks that could be swapped.
        resting: frozen weights of `model` that are on the host, since only another part of it runs.
        packed: {quantised weight: bytes per number in 4 or 8 bits}.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    forward: str
    parts: Mapping[str, nn.Module] = field(default_factory=dict)
    beside: str | None = None
    encode: Callable[[], object] = lambda: None
    swapped: Sequence[Sequence[Tensor]] = ()
    swappable: int = 0
    resting: Sequence[Tensor] = ()
    packed: Mapping[Tensor, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """The needs of one process. Memory is in bytes."""

    weights: int  # of frozen weights on the device during a step
    parts: Mapping[str, int]  # {part: its frozen weights}
    adapter: int  # of trained weights
    gradients: int
    optimizer: int  # with the average of the trained weights
    activations: int  # `step` in the module's docstring
    caching: int  # `caching` in the module's docstring
    peak: int
    trainable: int  # number of trained weights
    frozen: int  # number of frozen weights
    flops: int  # of one forward and its backward


def measure(step: PlannedStep, args: TrainingArguments) -> Needs:
    """Return the memory and FLOPs of a forward and backward of `step` on fake tensors.

    The tensors of the models in `step` are replaced with fake tensors.
    """
    everything = nn.ModuleList([step.model, *step.parts.values()])
    packed = {id(weight): size for weight, size in step.packed.items()}

    def size(tensors: Iterable[Tensor]) -> float:
        untrained = [tensor for tensor in tensors if not tensor.requires_grad]
        return sum(p.numel() * packed.get(id(p), p.element_size()) for p in untrained)

    parts = {name: size(tensors_of(part)) for name, part in step.parts.items()}
    swapped = [size(block) for block in step.swapped]
    pairs = map(sum, pairwise([*swapped, 0.0]))
    on_host = size(step.resting) + sum(swapped) - max(pairs, default=0.0)
    weights = size(tensors_of(step.model)) - on_host
    unpacked = max((weight.nbytes for weight in step.packed), default=0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    to_fake(everything, mode)
    if dtype_of(args) != torch.float32:  # as accelerate does for mixed precision
        forward = torch.autocast("cpu", dtype_of(args))(step.model.forward)
        step.model.forward = convert_outputs_to_fp32(forward)
    for module in step.model.modules():
        if type(module) in (nn.LayerNorm, nn.GroupNorm):
            module.forward = partial(_norm, module, module.forward)
    step.model.train()
    trained = [p for p in step.model.parameters() if p.requires_grad]
    counter = StepCounter(tensors_of(everything))
    with mode, counter:
        step.encode()
        encoded, counter.peak, counter.flops = counter.peak, counter.live, 0
        if args.gradient_accumulation_steps > 1 or args.global_batch_size is not None:
            for parameter in trained:  # gradients of earlier forwards
                parameter.grad = torch.zeros_like(parameter)
        step.loss().backward()
    adapter = gradients = nbytes(trained)
    is_fused = args.optimizer == "AdamW" and dtype_of(args) != torch.float16
    average = 0 if args.ema_decay is None else adapter
    optimizer = optimizer_bytes(trained, args.optimizer) + average
    activations = counter.peak + unpacked
    highest = max(activations, gradients + (0 if is_fused else adapter))
    resident = round(weights) + adapter + optimizer
    caching = max([size + unpacked for size in parts.values()], default=0)
    if step.beside is not None:
        caching = max(caching, resident + parts[step.beside] + encoded)
    return Needs(
        weights=round(weights),
        parts={name: round(part) for name, part in parts.items()},
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        caching=round(caching),
        peak=max(resident + highest, round(caching)),
        trainable=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in tensors_of(everything) if not p.requires_grad),
        flops=counter.flops,
    )


def dtype_of(args: TrainingArguments) -> torch.dtype:
    """Return the dtype of the forward that the arguments or accelerate's launcher set."""
    name = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return DTYPES.get(name, torch.float32)


def optimizer_bytes(trained: Iterable[Tensor], optimizer: str) -> int:
    """Return the bytes of the states that the optimizer `optimizer` keeps for `trained`."""
    total = 0.0
    for parameter in trained:
        size = parameter.numel()
        if optimizer == "adafactor":
            is_matrix = parameter.dim() > 1
            total += 4 * (sum(size // n for n in parameter.shape[-2:]) if is_matrix else size)
        elif optimizer == "AdamW8bit" and size < 4096:
            total += 8 * size
        else:
            total += _STATES[optimizer] * size
    return round(total)


def _norm(module: Any, otherwise: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the output of a norm, in float32 under autocast as on CUDA, unlike on the CPU."""
    if not torch.is_autocast_enabled("cpu"):
        return otherwise(x)
    weights = {name: weight.float() for name, weight in module.named_parameters()}
    with torch.autocast("cpu", enabled=False):
        return functional_call(module, weights, x.float())


def _grouped_product(rows: Tensor, weights: Tensor, ends: Tensor, *_: object) -> Tensor:
    """Return the grouped product of a mixture of experts, in any dtype.

    PyTorch's own version for fake tensors accepts only bfloat16.

    Args:
        rows: (s, i), ordered by expert, or their transpose (o, s).
        weights: (e, i, o), or (s, i) for a gradient of weights.
        ends: (e,), the index after the last row of each expert.
    """
    experts = (len(ends),) if weights.dim() == 2 else ()
    return rows.new_empty(*experts, len(rows), weights.shape[-1])
