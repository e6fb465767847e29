"""Which weights of a run are on its device: the denoiser's, and others only while they are needed.

    before training    each text encoder in turn; their embeddings are kept in the cache
    training           the denoiser; beside it the autoencoder, for latents that aren't cached yet
    sampling           text encoders in turn, the denoiser, beside it the autoencoder

A pipeline for samples shares its weights with the trained one, so both have the same rules.

Frozen weights of a denoiser can be on the host while other weights run. `--block_swap N` swaps N
blocks, and of the two denoisers of Wan 2.2 only the one that runs is on the device:

    forward of a block       load block i, and ask for block i + 1
    recomputation of it      load block i, and ask for block i − 1
    forward of a denoiser    load it

All other swapped weights are freed then, so a block or denoiser stays until its backward is done. A
frozen weight is needed for the gradient of its layer's input, so each swapped block is checkpointed.
The checkpoint is PyTorch's reentrant one: the other one keeps the graph of the first forward, in
which bitsandbytes stores 4-bit weights. For the same reason, Diffusers' group offloading frees
nothing during a backward.

On a GPU, a stream of its own copies blocks from pinned memory. Weights are copied to the device
only. Adapters, their gradients and the optimizer's states stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .families import Family
from .pipelines import modules_of


class Visit(ModelHook):
    """Bring a model to the device before its forward, after other models have left."""

    def __init__(self, execution_device: torch.device, leaving: Sequence[nn.Module]) -> None:
        self.execution_device = execution_device
        self.leaving = leaving

    def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[Any, Any]:
        for other in self.leaving:
            move(other, torch.device("cpu"))
        move(module, self.execution_device)
        return args, kwargs


def take_turns(
    pipe: Any, family: Family, device: torch.device, staying: Sequence[str], is_tight: bool
) -> None:
    """Let the models of `pipe` visit `device` in turn; the denoiser comes at its first forward.

    On a CPU, everything stays where it is.

    Args:
        staying: models that never leave, such as trained text encoders.
        is_tight: whether the denoiser leaves while a text encoder runs.
    """
    if device == torch.device("cpu"):
        return
    models = modules_of(pipe)
    denoisers = [models.pop(name) for name in family.denoisers]
    for name in staying:
        models.pop(name).to(device)
    vae = models.pop("vae")
    encoders = list(models.values())
    for model in (*encoders, vae):
        move(model, torch.device("cpu"))
        leaving = [encoder for encoder in encoders if encoder is not model]
        if model is not vae:
            leaving += [vae, *denoisers] if is_tight and family.boundary is None else [vae]
        add_hook_to_module(model, Visit(device, leaving))
    hook = Visit(device, [*encoders, vae])
    for denoiser in denoisers:
        denoiser.register_forward_pre_hook(partial(_before_denoiser, hook))
    # the pipeline looks for its device at a model that has a hook
    pipe._exclude_from_cpu_offload = [*family.denoisers, *staying]


def _before_denoiser(hook: Visit, denoiser: nn.Module, _: object) -> None:
    hook.pre_forward(denoiser)


def move(model: nn.Module, device: torch.device) -> None:
    """Move a model, if it isn't there already."""
    if next(model.parameters()).device == device:
        return
    model.to(device)
    for layer in model.modules():  # bitsandbytes leaves 8-bit weights there after a forward
        state: Any = vars(layer).get("state")
        if getattr(state, "CB", None) is not None:
            state.CB, state.SCB = state.CB.to(device), state.SCB.to(device)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model computes on."""
    hook = vars(model).get("_hf_hook")
    return getattr(hook, "execution_device", None) or next(model.parameters()).device


SWAPS: WeakKeyDictionary[nn.Module, Swap] = WeakKeyDictionary()
"""{denoiser: what swaps its weights}."""

Weights = list[tuple[nn.Parameter, Tensor]]
"""Frozen parameters with their values on the host."""


def swappable(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks that `denoiser` repeats, in the order of their definition."""
    names: Any = getattr(denoiser, "_repeated_blocks", None) or denoiser._no_split_modules
    return [module for module in denoiser.modules() if type(module).__name__ in names]


def chosen_blocks(denoiser: nn.Module, count: int) -> list[nn.Module]:
    """Return `count` blocks at equal distances, so that others run while one is loaded.

    Raises:
        ValueError: the model has fewer blocks.
    """
    blocks = swappable(denoiser)
    if count > len(blocks):
        raise ValueError(
            f"block_swap is {count}, but the model has {len(blocks)} blocks: give at most that many."
        )
    return [blocks[i * len(blocks) // count] for i in range(count)]


def place_denoisers(
    pipes: Sequence[DiffusionPipeline], family: Family, count: int, device: torch.device
) -> None:
    """Put the denoisers on `device`: `count` blocks in turn, or one of two denoisers.

    Args:
        pipes: pipelines with the same frozen weights, without adapters.
    """
    has_experts = family.boundary is not None and device.type != "cpu"
    swap = Swap(pipes[0], family, count, device) if count or has_experts else None
    for pipe in pipes:
        if swap is not None:
            swap.attach(pipe)
        for name in family.denoisers:
            getattr(pipe, name).to(device)


class Swap:
    """The swapped weights of pipelines that share them.

    Args:
        pipe: a pipeline with frozen denoisers, without adapters.
        count: the number of blocks to swap; 0 swaps the denoisers.
        device: the device that they run on.
    """

    def __init__(
        self, pipe: DiffusionPipeline, family: Family, count: int, device: torch.device
    ) -> None:
        self.family, self.count, self.device = family, count, device
        self.stream = torch.Stream(device=device) if count and device.type != "cpu" else None
        self.weights: list[Weights] = []
        self.copied: dict[int, Any] = {}  # {loaded part: event at the end of its copy}
        for part in self.parts(pipe):
            # bitsandbytes' own class of 4-bit weights doesn't copy
            hosts = [(p, p.data.as_subclass(Tensor).cpu()) for p in part.parameters()]
            if device.type != "cpu":
                hosts = [(parameter, host.pin_memory()) for parameter, host in hosts]
            self.weights.append(hosts)
        self.free(range(len(self.weights)))

    def parts(self, pipe: DiffusionPipeline) -> list[nn.Module]:
        """Return the blocks or denoisers of `pipe` that are swapped."""
        if self.count:
            return chosen_blocks(getattr(pipe, self.family.denoiser), self.count)
        return [getattr(pipe, name) for name in self.family.denoisers]

    def attach(self, pipe: DiffusionPipeline) -> None:
        """Swap the weights of `pipe`, which are those of this object."""
        for name in self.family.denoisers:
            denoiser: Any = getattr(pipe, name)
            SWAPS[denoiser] = self
            if self.count:
                denoiser.enable_gradient_checkpointing(recomputed)
        for number, part in enumerate(self.parts(pipe)):
            part.register_forward_pre_hook(partial(self.enter, number))

    def enter(self, number: int, *_: object) -> None:
        """Bring a part to the device, free the others, and start to copy the next block."""
        following = number
        if self.count:  # a reentrant checkpoint has gradients in the backward only
            following += -1 if torch.is_grad_enabled() else 1
        self.free(self.copied.keys() - {number, following})
        self.load(number)
        self.load(following)
        if self.stream is not None:
            present = torch.accelerator.current_stream()
            present.wait_event(self.copied[number])
            for parameter, _host in self.weights[number]:
                parameter.data.record_stream(present)

    def load(self, number: int) -> None:
        """Start to copy a part to the device, unless it is there or there is no such part."""
        if number in self.copied or not 0 <= number < len(self.weights):
            return
        with self.stream or torch.no_grad():
            for parameter, host in self.weights[number]:
                parameter.data = host.to(self.device, non_blocking=True, copy=True)
            self.copied[number] = self.stream and self.stream.record_event()

    def free(self, numbers: Iterable[int]) -> None:
        """Free the copies of parts on the device."""
        for number in numbers:
            self.copied.pop(number, None)
            for parameter, host in self.weights[number]:
                parameter.data = torch.empty(0, dtype=host.dtype, device=self.device)

    @contextmanager
    def whole(self, denoiser: nn.Module) -> Iterator[None]:
        """Keep all blocks on the device inside the context, or a denoiser on the CPU.

        Two denoisers don't fit on the device.
        """
        place = self.device if self.count else torch.device("cpu")
        self.copied.clear()
        for weights in self.weights:
            for parameter, host in weights:
                parameter.data = host.to(place)
        denoiser.to(place)
        try:
            yield
        finally:
            self.free(range(len(self.weights)))
            denoiser.to(self.device)


@contextmanager
def resident(*denoisers: nn.Module) -> Iterator[None]:
    """Keep the weights of models whole inside the context: adapters are made from them."""
    with ExitStack() as stack:
        for denoiser in denoisers:
            if denoiser in SWAPS:
                stack.enter_context(SWAPS[denoiser].whole(denoiser))
        yield


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`, and again in the backward, even if nothing in `args` has a gradient."""

    def differentiable(needed: Tensor, *args: Any) -> Any:
        output = function(*args)
        tensors = output if isinstance(output, tuple) else (output,)
        if not torch.is_grad_enabled() or any(x is not None and x.requires_grad for x in tensors):
            return output
        return tuple(x if x is None else x + 0 * needed for x in tensors)  # nothing is trained here

    return checkpoint(differentiable, torch.ones((), requires_grad=True), *args, use_reentrant=True)
