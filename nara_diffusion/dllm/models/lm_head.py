"""The output head of a language model, run at chosen positions only.

A vocabulary of 126 464 makes logits the largest tensor of a training step, and two uses need few of them: the loss
(masked positions) and the sampler (one block). The head therefore does less *inside the model's own forward*: hooks
on the head module, the one that `get_output_embeddings()` names, see its hidden states (b, l, d). The model is still
entered through its outermost `__call__`, so that DDP, FSDP, offload and autocast do their part.

- `losses_in_head`: the head returns losses (b, l, 1), such as the cross-entropy, in place of logits (b, l, v), computed
  at the masked positions in chunks; a chunk's logits are computed again in backward, so that one chunk's are alive at a
  time.
- `hidden_states_in_head`: the input (b, l, d) of the head, without its logits.
- `logits_at`: the head returns (b, k, v) at k chosen positions of each row.

Where the head isn't known, or where what leaves it isn't what leaves the model (logits scaled or capped afterwards;
a compiled model, whose graph would keep or miss the hooks), `head_of` is None and callers take all logits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from nara_diffusion.runtime.checkpointing import CheckpointWithCore
from nara_diffusion.runtime.modules import find_holders

from .virtual_tokens import of_text

# Configuration fields of transformers under which a model changes its logits after the head.
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


def language_model(model: nn.Module) -> PreTrainedModel | None:
    """The outermost transformers model in `model`, whatever wraps it (DDP, FSDP, torch.compile, PEFT), or None."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def configured(model: nn.Module, name: str) -> Any:
    """The value of a field in the language model's configuration; None if there is none."""
    return getattr(getattr(language_model(model), "config", None), name, None)


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that makes logits from hidden states, or None where hooking it would not be right."""
    inner = language_model(model)
    if inner is None or any(getattr(inner.config, name, None) not in (None, 1.0) for name in _LOGIT_FIELDS):
        return None
    head = inner.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or name is None:
        return None
    parents = [model.get_submodule(".".join(name.split(".")[:depth])) for depth in range(name.count(".") + 2)]
    return None if any(_is_compiled(module) for module in parents) else head


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _hidden_states(args: tuple, rows: int) -> torch.Tensor:
    hidden = args[0]
    if hidden.ndim != 3 or len(hidden) != rows:
        raise ValueError(
            f"the output head got hidden states of shape {tuple(hidden.shape)}, expected ({rows}, length, width): a "
            "model that packs its batch, as some do under FlashAttention, needs another attn_implementation"
        )
    return hidden


@contextmanager
def logits_at(model: nn.Module, positions: torch.Tensor, length: int) -> Iterator[bool]:
    """Inside, a forward of `model` on `length` tokens returns logits (b, k, v) at `positions` (b, k) of them.

    Yields False, and changes nothing, where the head can't be reached.
    """
    head = head_of(model)
    if head is None:
        yield False
        return
    thread = threading.get_ident()

    def select(module: nn.Module, args: tuple) -> tuple | None:
        if threading.get_ident() != thread:
            return None
        hidden = of_text(model, _hidden_states(args, len(positions)), length)  # (b, l, d)
        index = positions[..., None].expand(-1, -1, hidden.shape[-1])  # (b, k, d)
        return (hidden.gather(1, index), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield True
    finally:
        handle.remove()


@dataclass(frozen=True)
class HeadLoss:
    """A loss that the head computes in place of logits.

    Attributes:
        at: (b, l) bool, the positions that have it; it is zero at others.
        inputs: tensors (b, l, …) with values for each position.
        loss: (head, hidden states (n, c, d), *inputs (n, c, …)) → (n, c).
    """

    at: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    loss: Callable[..., torch.Tensor]


def cross_entropy_loss(targets: torch.Tensor, masked: torch.Tensor) -> HeadLoss:
    """−log p of the tokens `targets` (b, l) where `masked` (b, l)."""

    def loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_cross_entropy(head.forward(hidden), targets)  # (n, c, d) → (n, c, v) → (n, c)

    return HeadLoss(masked, (targets,), loss)


@contextmanager
def hidden_states_in_head(model: nn.Module, head: nn.Module, rows: int, length: int) -> Iterator[list[torch.Tensor]]:
    """Inside, each forward of `model` on `rows` texts of `length` l appends the input (b, l, d) of `head` to the list
    and computes the logits of one position only.

    Args:
        model: what the head is a part of.
        head: `head_of(model)`.
    """
    thread = threading.get_ident()
    hidden_states: list[torch.Tensor] = []

    def keep_hidden(module: nn.Module, args: tuple) -> tuple | None:
        if threading.get_ident() != thread:
            return None
        hidden_states.append(of_text(model, _hidden_states(args, rows), length))
        return (args[0][:, :1], *args[1:])  # the head's own call is for the sake of other hooks: let it cost nothing

    handle = head.register_forward_pre_hook(keep_hidden)
    try:
        yield hidden_states
    finally:
        handle.remove()


@contextmanager
def losses_in_head(model: nn.Module, head: nn.Module, losses: Sequence[HeadLoss], *, chunk_size: int) -> Iterator[None]:
    """Inside, `head` returns the sum (b, l, 1) of `losses` instead of logits (b, l, v).

    Args:
        model: what the head is a part of.
        head: `head_of(model)`.
        losses: the losses to compute, at different positions as a rule.
        chunk_size: positions whose logits are alive at one time.
    """
    thread = threading.get_ident()
    recompute = _checkpoint_of(model)
    rows, length = losses[0].at.shape

    # The inner pair of hooks: after FSDP and DeepSpeed have gathered the weights, before they let go of them.
    with hidden_states_in_head(model, head, rows, length) as hidden_states:

        def replace_logits(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if threading.get_ident() != thread:
                return None
            hidden = hidden_states.pop()
            parts = [_loss_at(module, hidden, loss, chunk_size=chunk_size, recompute=recompute) for loss in losses]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

        handle = head.register_forward_hook(replace_logits, prepend=True)
        try:
            yield
        finally:
            handle.remove()


def _checkpoint_of(model: nn.Module) -> Callable[..., torch.Tensor]:
    """Checkpointing under which an adapted head sees, in backward, the C(λ) of its own forward."""
    recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    for holder in find_holders(model):
        recompute = CheckpointWithCore(recompute, holder.channel)
    return recompute


def _loss_at(
    head: nn.Module,
    hidden: torch.Tensor,
    loss: HeadLoss,
    *,
    chunk_size: int,
    recompute: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """(b, l, d) → (b, l, 1).

    An adapted head may treat each sample in its own way (λ), so its chunks keep the batch dimension, at the price of
    filling rows up to the longest; any other head sees the chosen positions of all rows as one row.
    """
    at, values = loss.at, (hidden, *loss.inputs)
    if not isinstance(head, BaseTunerLayer):
        at, values = at.reshape(1, -1), tuple(value.flatten(0, 1)[None] for value in values)
    counts = at.sum(1)
    width = max(int(counts.max()), 1)  # with nothing chosen, still one column: every parameter has to get a gradient
    order = (~at).byte().argsort(dim=1, stable=True)[:, :width]  # (n, k) chosen positions first, then others
    valid = torch.arange(width, device=at.device) < counts[:, None]  # (n, k)
    columns = max(chunk_size // len(at), 1)
    chunk_loss = partial(loss.loss, head)
    results = []
    for chunk in zip(*(_at_positions(value, order).split(columns, 1) for value in values), strict=True):
        results.append(recompute(chunk_loss, *chunk) if torch.is_grad_enabled() else chunk_loss(*chunk))
    result = torch.cat(results, 1).masked_fill(~valid, 0.0)  # (n, k)
    return result.new_zeros(at.shape).scatter(1, order, result).view(*loss.at.shape, 1)


def _at_positions(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(n, l, …) at positions `order` (n, k) → (n, k, …)."""
    index = order.view(*order.shape, *(1 for _ in values.shape[2:]))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log p(target), computed in float32 at least: (…, v), (…) → (…)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
