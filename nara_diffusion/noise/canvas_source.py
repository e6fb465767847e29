"""Read λ from DiffusionGemma's samplers: the share of the canvas that is not yet committed.

    sampler                    λ of the call after step i of N
    BlockRefinementScheduler   1 − fraction of positions that are committed
    EntropyBoundScheduler      1 − fraction of positions that step i accepted
    DiscreteDDIMScheduler      1 − (i + 1)/N, also after corrector sweeps
    `generate` (transformers)  1 − fraction of positions that step i accepted

λ is 1 at the first call of a block. At that call, the encoder has run, there are no logits to
condition on, and the scheduler's next step is step 0. The Diffusers schedulers are those of the
pipelines that loaded the adapter. They reveal λ only while they step. At the first call of a block,
this module therefore replaces `step` and `step_correct` on the current scheduler *instance*, until
the adapter is unloaded. It finds the sampler of `generate` when the model instance prepares it.

Each later call must follow a new step and be conditioned on the logits of that step. In all other
calls λ is unknown, and likewise in a forward that reads a prompt and a canvas at once.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from copy import deepcopy
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from .sources import CORRUPTED_SHARE

_STEPS = ("step", "step_correct")
_REMEDY = "call the model inside `with noise_level(model, value):`"


class CanvasNoise:
    """Compute λ for one adapted DiffusionGemma from the arguments of its decoder.

    Args:
        schedulers: returns the current schedulers of the pipelines that loaded adapters.

    Attributes:
        watched: the replaced methods of schedulers.
    """

    convention = CORRUPTED_SHARE

    def __init__(self, schedulers: Callable[[], list[Any]]) -> None:
        self.schedulers = schedulers
        self.watched: list[WatchedStep] = []
        self.local = _State()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.schedulers,)  # a copy has its own samplers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return λ (1,) or (b,) for one call of the decoder.

        Raises:
            ValueError: no sampler is running, or the sampler has not stepped since the last call.
        """
        state, schedulers = self.local, self.schedulers()
        sampler = None if state.sampler is None else state.sampler()
        if state.reads_prompt or (sampler is None and not schedulers):
            raise ValueError(
                "λ can't be read: no sampler is running (DiffusionGemmaPipeline with an adapter from "
                f"pipe.load_nara_weights, or generate): {_REMEDY}."
            )
        logits = kwargs.get("self_conditioning_logits")
        if state.prefix_is_new and logits is None:
            self._begin_block(schedulers, sampler)
            return torch.ones(1)
        if sampler is not None and sampler.accepted_token_mask is not state.seen:
            state.seen = sampler.accepted_token_mask
            return _left(sampler.accepted_token_mask)
        level, state.level = state.level, None
        last = None if state.logits is None else state.logits()
        if level is None or last is None or logits is not last:
            raise ValueError(
                "λ can't be read: the sampler has not stepped since the last call, or this call is not "
                f"conditioned on the logits of that step: {_REMEDY}."
            )
        return level

    def _begin_block(self, schedulers: list[Any], sampler: object) -> None:
        self.local.level, self.local.begins_block = None, sampler is None
        self.local.seen = getattr(sampler, "accepted_token_mask", None)
        for scheduler in schedulers:
            for name in filter(partial(hasattr, scheduler), _STEPS):
                step = getattr(scheduler, name)
                if not isinstance(step, WatchedStep):
                    step = WatchedStep(scheduler, name)
                    setattr(scheduler, name, step)
                if self not in step.sources:
                    step.sources.append(self)
                    self.watched.append(step)

    def stepped(self, scheduler: Any, bound: dict[str, Any], output: Any) -> None:
        """Record λ for the next call, given a step or a corrector sweep that was just made.

        Raises:
            ValueError: the scheduler is unknown, or the block began without a step 0.
        """
        state, kinds = self.local, [kind.__name__ for kind in type(scheduler).__mro__]
        if state.begins_block and int(bound["timestep"]) != 0:
            raise ValueError(
                "The last call was taken for the first of a block and ran at λ = 1, but the step after it "
                f"has timestep {int(bound['timestep'])}, not 0: {_REMEDY}."
            )
        state.begins_block = False
        if "BlockRefinementScheduler" in kinds:
            state.level = _left(scheduler._committed)
        elif "EntropyBoundScheduler" in kinds:
            accepted = output[1] if isinstance(output, tuple) else output.accepted_index
            state.level = _left(accepted)
        elif "DiscreteDDIMScheduler" in kinds:
            done = (int(bound["timestep"]) + 1) / scheduler.num_inference_steps
            state.level = torch.tensor([1 - done], dtype=torch.float32)
        else:
            raise ValueError(f"λ of {kinds[0]} is not known: {_REMEDY}.")

    def forget(self) -> None:
        """Restore the original methods of all schedulers."""
        for step in self.watched:
            step.sources.remove(self)
            attributes = vars(step.scheduler)
            if not step.sources and attributes.get(step.name) is step:
                del attributes[step.name]
                attributes.update(step.before)
        self.watched.clear()


class _State(threading.local):
    """The state of the sampler in one thread.

    Attributes:
        sampler: weak reference to the sampler of the `generate` call in progress.
        seen: the sampler's mask at the last call.
        level: λ for the next call; None if the sampler has not stepped since the last call.
        logits: weak reference to the logits of the last step.
        begins_block: True if the last call was the first of a block and a scheduler must step next.
        prefix_is_new: True if the decoder has not run since the encoder ran.
        reads_prompt: True if the current forward also reads a prompt.
    """

    sampler: weakref.ref[Any] | None = None
    seen: Tensor | None = None
    level: Tensor | None = None
    logits: weakref.ref[Tensor] | None = None
    begins_block: bool = False
    prefix_is_new: bool = False
    reads_prompt: bool = False


class WatchedStep:
    """Call a scheduler's method, then report the call to the sources of λ of the adapted models.

    The replacement keeps the method's signature, because the pipeline reads it.
    """

    def __init__(self, scheduler: Any, name: str) -> None:
        self.sources: list[CanvasNoise] = []
        self.scheduler, self.name = scheduler, name
        attributes = vars(scheduler)
        self.before = {name: attributes[name]} if name in attributes else {}
        self.method = getattr(scheduler, name)
        update_wrapper(self, self.method, updated=())

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return deepcopy(self.method, memo)  # a copied scheduler is not watched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.method(*args, **kwargs)
        bound = inspect.signature(self.method).bind(*args, **kwargs).arguments
        for source in self.sources:
            if self.name == "step":
                logits = output[-1] if isinstance(output, tuple) else output.pred_logits
                source.local.logits = weakref.ref(logits)
            source.stepped(self.scheduler, bound, output)
        return output


def _left(done: Tensor) -> Tensor:
    """Return the fraction of positions (b, c) that are not `done`, as (b,)."""
    return 1 - done.float().mean(-1)
