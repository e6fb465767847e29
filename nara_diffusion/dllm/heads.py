"""The output head of a language model, run at chosen positions only.

A vocabulary of 126 464 makes logits the largest tensor of a training step, and two uses need few of them: the loss
(masked positions) and the sampler (one block). The head therefore does less *inside the model's own forward*: hooks
on the head module, the one that `get_output_embeddings()` names, see its hidden states (b, l, d). The model is still
entered through its outermost `__call__`, so that DDP, FSDP, offload and autocast do their part.

- `cross_entropy_in_head`: the head returns the cross-entropy (b, l, 1) in place of logits (b, l, v), computed at the
  masked positions in chunks; a chunk's logits are computed again in backward, so that one chunk's are alive at a time.
- `logits_at`: the head returns (b, k, v) at k chosen positions of each row.

Where the head isn't known, or where what leaves it isn't what leaves the model (logits scaled or capped afterwards;
a compiled model, whose graph would keep or miss the hooks), `head_of` is None and callers take all logits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from nara_diffusion.dllm.virtual_tokens import of_text
from nara_diffusion.noise import find_holders
from nara_diffusion.recompute import CheckpointWithCore

# Configuration fields of transformers under which a model changes its logits after the head.
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


def language_model(model: nn.Module) -> PreTrainedModel | None:
    """The outermost transformers model in `model`, whatever wraps it (DDP, FSDP, torch.compile, PEFT), or None."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


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
    """Within, a forward of `model` on `length` tokens returns logits (b, k, v) for `positions` (b, k) among them.

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


@contextmanager
def cross_entropy_in_head(
    model: nn.Module, head: nn.Module, targets: torch.Tensor, masked: torch.Tensor, *, chunk_size: int
) -> Iterator[None]:
    """Within, `head` returns the cross-entropy (b, l, 1), zero where not `masked`, instead of logits (b, l, v).

    Args:
        model: what the head is a part of.
        head: `head_of(model)`.
        targets: (b, l) tokens to predict.
        masked: (b, l) bool.
        chunk_size: positions whose logits are alive at one time.
    """
    thread = threading.get_ident()
    hidden_states: list[torch.Tensor] = []
    recompute = _checkpoint_of(model)

    def keep_hidden(module: nn.Module, args: tuple) -> tuple | None:
        if threading.get_ident() != thread:
            return None
        hidden_states.append(of_text(model, _hidden_states(args, len(masked)), masked.shape[1]))
        return (args[0][:, :1], *args[1:])  # the head's own call is for the sake of other hooks: let it cost nothing

    def replace_logits(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if threading.get_ident() != thread:
            return None
        hidden = hidden_states.pop()
        return _masked_cross_entropy(module, hidden, targets, masked, chunk_size=chunk_size, recompute=recompute)

    # The inner pair of hooks: after FSDP and DeepSpeed have gathered the weights, before they let go of them.
    handles = [
        head.register_forward_pre_hook(keep_hidden),
        head.register_forward_hook(replace_logits, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checkpoint_of(model: nn.Module) -> Callable[..., torch.Tensor]:
    """Checkpointing under which an adapted head sees, in backward, the C(λ) of its own forward."""
    recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    for holder in find_holders(model):
        recompute = CheckpointWithCore(recompute, holder.channel)
    return recompute


def _masked_cross_entropy(
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    masked: torch.Tensor,
    *,
    chunk_size: int,
    recompute: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """(b, l, d) → (b, l, 1).

    An adapted head may treat each sample in its own way (λ), so its chunks keep the batch dimension, at the price of
    filling rows up to the longest; any other head sees the masked positions of all rows as one row.
    """
    shape = masked.shape
    if not isinstance(head, BaseTunerLayer):
        hidden, targets, masked = hidden.flatten(0, 1)[None], targets.reshape(1, -1), masked.reshape(1, -1)
    counts = masked.sum(1)
    width = max(int(counts.max()), 1)  # with nothing masked, still one column: every parameter has to get a gradient
    order = (~masked).byte().argsort(dim=1, stable=True)[:, :width]  # (b, k) masked positions first, then others
    valid = torch.arange(width, device=masked.device) < counts[:, None]  # (b, k)
    chosen = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))  # (b, k, d)
    chosen_targets = targets.gather(1, order)  # (b, k)

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_cross_entropy(head.forward(hidden), targets)  # (b, c, d) → (b, c, v) → (b, c)

    columns = max(chunk_size // hidden.shape[0], 1)
    losses = []
    for chunk in zip(chosen.split(columns, 1), chosen_targets.split(columns, 1), strict=True):
        losses.append(recompute(chunk_loss, *chunk) if torch.is_grad_enabled() else chunk_loss(*chunk))
    loss = torch.cat(losses, 1).masked_fill(~valid, 0.0)  # (b, k)
    return loss.new_zeros(masked.shape).scatter(1, order, loss).view(*shape, 1)


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log p(target), computed in float32 at least: (…, v), (…) → (…)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
