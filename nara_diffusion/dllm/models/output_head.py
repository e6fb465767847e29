"""The output head of a language model, run at chosen positions only.

A vocabulary of 126 464 makes logits the largest tensor of a training step, and two uses need few of them: the loss
(masked positions) and the sampler (one block). The head therefore does less *inside the model's own forward*, by hooks
on the head module: the model is still entered through its outermost `__call__`, so that DDP, FSDP, offload and autocast
do their part. The hooks act in the thread that set them alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

OfText = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states (b, n + l, d) → those of the text, (b, l, d)."""


@contextmanager
def inputs_at(head: nn.Module, positions: torch.Tensor, of_text: OfText) -> Iterator[None]:
    """Inside, `head` gets its hidden states at `positions` (b, k) of the text, and so returns logits (b, k, v)."""
    thread = threading.get_ident()

    def select(module: nn.Module, args: tuple) -> tuple | None:
        if threading.get_ident() != thread:
            return None
        hidden = of_text(args[0])
        return (hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def cross_entropy_in_head(
    head: nn.Module, targets: torch.Tensor, masked: torch.Tensor, chunk_size: int, of_text: OfText
) -> Iterator[None]:
    """Inside, `head` returns −log p of `targets` (b, l) where `masked` (b, l), else zero, as (b, l, 1), in place of
    logits (b, l, v).

    Logits are made for `chunk_size` positions at a time, and once more in backward, so that one chunk's are alive.
    """
    thread = threading.get_ident()
    kept: list[torch.Tensor] = []

    def keep_hidden(module: nn.Module, args: tuple) -> tuple | None:
        if threading.get_ident() != thread:
            return None
        kept.append(of_text(args[0]))
        return (args[0][:, :1], *args[1:])  # the head's own call is for the sake of other hooks: let it cost nothing

    def losses_for_logits(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if threading.get_ident() != thread:
            return None
        places = masked.flatten().nonzero()[:, 0]  # (m,)
        # with nothing masked, one place that counts zero: every parameter has to get a gradient
        counts = masked.new_ones(len(places)) if len(places) else masked.new_zeros(1)
        places = places if len(places) else places.new_zeros(1)
        hidden, wanted = kept.pop().flatten(0, 1)[places], targets.flatten()[places]
        loss = lambda hidden, wanted: token_cross_entropy(module.forward(hidden), wanted)  # noqa: E731
        chunks = [
            checkpoint(loss, *chunk, use_reentrant=False) if torch.is_grad_enabled() else loss(*chunk)
            for chunk in zip(hidden.split(chunk_size), wanted.split(chunk_size), strict=True)
        ]
        losses = torch.cat(chunks) * counts  # type: ignore[arg-type]
        return losses.new_zeros(masked.numel()).scatter(0, places, losses).view(*masked.shape, 1)

    # The inner pair of hooks: after FSDP and DeepSpeed have gathered the weights, before they let go of them.
    handles = [
        head.register_forward_pre_hook(keep_hidden),
        head.register_forward_hook(losses_for_logits, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log p(target), computed in float32 at least: (…, v), (…) → (…)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
