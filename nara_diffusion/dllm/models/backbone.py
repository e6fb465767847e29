"""What losses and samplers ask of a masked language model, whatever wraps it (DDP, FSDP,
torch.compile, PEFT).

Prompt tuning and P-tuning put n virtual tokens before a text, and the model has an output for each
of them:

    n virtual tokens, then the l tokens of the text   →   hidden states and logits (b, n + l, …)

Positions are counted in the text, so the first n are dropped here.

A vocabulary of 126 464 makes logits the largest tensor of a step, and both uses need few of them:
the loss (masked
positions) and the sampler (one block). The output head does less *inside the model's own forward*,
by hooks that act in the thread that set them alone: the model is still entered through its
outermost `__call__`, so that DDP, FSDP, offload and autocast do their part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .shifted_logits import ShiftedQwen2ForCausalLM

# Configuration fields of transformers under which a model changes its logits after the head.
_LOGIT_FIELDS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier_scale",
)


class Backbone:
    """A view of `model`; it holds no state of its own.

    Attributes:
        model: the outermost module, which every forward enters by its `__call__`.
        language_model: the outermost model of transformers in it, or None.
        is_shifted: whether it was trained to predict the next token (Dream), so that nothing
            predicts the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.language_model = next(
            (m for m in model.modules() if isinstance(m, PreTrainedModel)), None
        )
        self.is_shifted = isinstance(self.language_model, ShiftedQwen2ForCausalLM)

    def configured(self, name: str) -> Any:
        """The value of a field in the language model's configuration; None if there is none."""
        return getattr(getattr(self.language_model, "config", None), name, None)

    @property
    def device(self) -> torch.device:
        """That of the first parameter."""
        return next(self.model.parameters()).device

    def mask_token_id(self, given: int | None = None) -> int:
        """`given`, or the one in the configuration.

        Raises:
            ValueError: neither names one.
        """
        known = self.configured("mask_token_id") if given is None else given
        if known is None:
            raise ValueError(
                "the model's configuration has no mask_token_id: load it with load_backbone(…, mask_token_id=N), "
                "or pass mask_token_id=N here"
            )
        return int(known)

    def opening_token(self) -> int | None:
        """The token that has to stand before an answer without a prompt, BOS; None if the model
        needs none.

        Raises:
            ValueError: it needs one, and its configuration names none.
        """
        token = self.configured("bos_token_id")
        if self.is_shifted and token is None:
            raise ValueError(
                "there is an empty prompt, and this model predicts the next token, so that nothing predicts the first, "
                "and its configuration has no bos_token_id: begin the prompt with a token, or set "
                "model.config.bos_token_id"
            )
        return int(token) if self.is_shifted else None  # type: ignore[arg-type]

    # positions

    @property
    def virtual_tokens(self) -> int:
        """The number of virtual tokens that an adapter of PEFT puts before each text."""
        for module in self.model.modules():
            if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
                return int(module.active_peft_config.num_virtual_tokens)  # type: ignore[attr-defined]
        return 0

    @property
    def position_limit(self) -> int | None:
        """The longest text, in tokens, whose positions the model can tell apart; None if
        unknown."""
        limit = self.configured("max_position_embeddings")
        return None if limit is None else limit - self.virtual_tokens

    # forwards

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """Logits (b, l, v) of a text (b, l), or (b, k, v) at its positions `at` (b, k), which costs
        less."""
        head = None if at is None else self.head
        if at is None or head is None:
            logits = self._of_text(self._forward(input_ids, attention_mask), input_ids)
            return logits if at is None else _at(logits, at)
        with _hooked(head, lambda hidden: _at(self._of_text(hidden, input_ids), at)):
            return self._forward(input_ids, attention_mask)

    def token_losses(
        self,
        input_ids: Tensor,
        targets: Tensor,
        masked: Tensor,
        attention_mask: Tensor | None = None,
        *,
        chunk_size: int | None = 256,
        cfg_scale: float = 0.0,
    ) -> Tensor:
        """−log p of `targets` (b, l) where `masked` (b, l), else zero: (b, l), float32 or wider.

        Args:
            input_ids: (b, l); for classifier-free guidance (2b, l), the conditional rows first.
            attention_mask: as `input_ids`.
            chunk_size: positions whose logits exist at one time, made anew in backward; None makes
                all at once.
            cfg_scale: w of `guided`.
        """
        head, b = None if chunk_size is None else self.head, len(targets)
        if (
            head is None or chunk_size is None or hasattr(head, "lora_A")
        ):  # an adapted head sees whole rows, for their λ
            logits = self.logits(input_ids, attention_mask).unflatten(0, (-1, b))
            return token_cross_entropy(guided(logits, cfg_scale), targets) * masked
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            kept.append(self._of_text(hidden, input_ids).unflatten(0, (-1, b)))
            return hidden[
                :, :1
            ]  # the head's own call is for the sake of other hooks: let it cost nothing

        def losses_for_logits(_: Tensor) -> Tensor:
            places = masked.flatten().nonzero()[:, 0]  # (m,)
            # with nothing masked, one place that counts zero: every parameter has to get a gradient
            counts = masked.new_ones(len(places)) if len(places) else masked.new_zeros(1)
            places = places if len(places) else places.new_zeros(1)
            hidden, wanted = (
                kept.pop().flatten(1, 2)[:, places],
                targets.flatten()[places],
            )  # (1 or 2, m, d), (m,)

            def loss(hidden: Tensor, wanted: Tensor) -> Tensor:
                return token_cross_entropy(guided(head.forward(hidden), cfg_scale), wanted)

            chunks = [
                checkpoint(loss, *chunk, use_reentrant=False)
                if torch.is_grad_enabled()
                else loss(*chunk)
                for chunk in zip(hidden.split(chunk_size, 1), wanted.split(chunk_size), strict=True)
            ]
            losses = torch.cat(chunks) * counts  # type: ignore[arg-type]
            return (
                losses.new_zeros(masked.numel()).scatter(0, places, losses).view(*masked.shape, 1)
            )

        with _hooked(head, keep, losses_for_logits):
            losses = self._forward(input_ids, attention_mask)  # (b, l, 1)
        if losses.shape != (*masked.shape, 1):
            raise ValueError(
                f"{type(self.language_model).__name__} changes what its output head returns, so that the loss can't be "
                "computed within it: pass chunk_size=None"
            )
        return losses.squeeze(-1)

    @property
    def head(self) -> nn.Module | None:
        """The module that makes logits from hidden states, or None where hooking it would not be
        right: what leaves it isn't what leaves the model (logits scaled or capped afterwards), or a
        compiled graph would miss the hooks.
        """
        inner = self.language_model
        if inner is None or any(self.configured(name) not in (None, 1.0) for name in _LOGIT_FIELDS):
            return None
        head = inner.get_output_embeddings()
        name = next((name for name, module in self.model.named_modules() if module is head), None)
        if head is None or name is None:
            return None
        parts = name.split(".")
        parents = [
            self.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)
        ]
        is_compiled = any(
            m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in parents
        )
        return None if is_compiled else head

    def _forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        output = self.model(
            input_ids, **({} if attention_mask is None else {"attention_mask": attention_mask})
        )
        return output if isinstance(output, Tensor) else output.logits

    def _of_text(self, states: Tensor, input_ids: Tensor) -> Tensor:
        """The part (b, l, …) of `states` (b, n + l, …) that belongs to the text; n is 0 where its
        adapter is off."""
        b, length = input_ids.shape
        extra = states.shape[1] - length if states.ndim == 3 and len(states) == b else -1
        if extra not in (0, self.virtual_tokens):
            raise ValueError(
                f"the model made hidden states or logits of shape {tuple(states.shape)}, expected ({b}, {length}, "
                "width): a model that packs its batch, as some do under FlashAttention, needs another "
                "attn_implementation"
            )
        return states[:, extra:]


@contextmanager
def _hooked(
    head: nn.Module,
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Inside, in this thread, `head` gets `before(hidden states)`, and `after(its output)` leaves
    it."""
    thread = threading.get_ident()

    def pre(_: nn.Module, args: tuple) -> tuple | None:
        return (before(args[0]), *args[1:]) if threading.get_ident() == thread else None

    def post(_: nn.Module, __: tuple, output: Tensor) -> Tensor | None:
        return after(output) if after is not None and threading.get_ident() == thread else None

    # The inner pair of hooks: after FSDP and DeepSpeed have gathered the weights, before they let
    # go of them.
    handles = [head.register_forward_pre_hook(pre), head.register_forward_hook(post, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """(b, l, d) at positions (b, k): (b, k, d)."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def guided(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, (1 + w) · l − w · l̃ of l and l̃ = `logits` (2, …), l̃ with the
    prompt masked; of one set of logits (1, …) those."""
    if len(logits) == 1:
        return logits[0]
    conditional, unconditional = logits
    return unconditional + (scale + 1) * (conditional - unconditional)


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p(target), computed in float32 at least: (…, v), (…) → (…)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(
        targets
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` within; afterwards each module is in the mode it had, also where modules
    differ."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def without_ddp(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel, which has the same weights.

    DDP's own forward synchronises buffers, so it waits for ever if processes run different numbers
    of forwards.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
