"""What losses and samplers ask of a masked language model, whatever wraps it (DDP, FSDP, torch.compile, PEFT).

Prompt tuning and P-tuning put n virtual tokens before a text, and the model has an output for each of them:

    n virtual tokens, then the l tokens of the text   →   hidden states and logits (b, n + l, …)

Positions are counted in the text, so the first n are dropped here.

A table of learned positions has no row for a position beyond its end. Rotary positions have no end, but a model that
never saw positions beyond `max_position_embeddings` predicts badly there.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .output_head import cross_entropy_in_head, inputs_at, token_cross_entropy
from .shifted_logits import ShiftedLogits

# Configuration fields of transformers under which a model changes its logits after the head.
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


class Backbone:
    """A view of `model`; it holds no state of its own.

    Attributes:
        model: the outermost module, which every forward enters by its `__call__`.
        language_model: the outermost model of transformers in it, or None.
        is_shifted: whether it was trained to predict the next token (Dream), so that nothing predicts the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.language_model = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        self.is_shifted = isinstance(self.language_model, ShiftedLogits)

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
        """The token that has to stand before an answer without a prompt, BOS; None if the model needs none.

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
    def position_table(self) -> int | None:
        """The number of positions in the table of learned positions; None if there is none."""
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                reserved = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
                return module.num_embeddings - reserved
        return None

    @property
    def position_limit(self) -> int | None:
        """The longest text, in tokens, whose positions the model can tell apart; None if unknown."""
        limits = (self.position_table, self.configured("max_position_embeddings"))
        known = [limit for limit in limits if limit is not None]  # tables can have more rows than positions
        return min(known) - self.virtual_tokens if known else None

    # forwards

    def logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, at: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (b, l, v) of a text (b, l), or (b, k, v) at its positions `at` (b, k), which costs less."""
        if at is None:
            return self._of_text(self._forward(input_ids, attention_mask), input_ids)
        head = self.head
        if head is None:
            logits = self.logits(input_ids, attention_mask)
            return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
        with inputs_at(head, at, lambda hidden: self._of_text(hidden, input_ids)):
            return self._forward(input_ids, attention_mask)

    def token_losses(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        masked: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        chunk_size: int | None = 256,
    ) -> torch.Tensor:
        """−log p of `targets` (b, l) where `masked` (b, l), else zero: (b, l), float32 or wider.

        Args:
            chunk_size: positions whose logits exist at one time; None computes all logits at once.
        """
        head = None if chunk_size is None else self.head
        if (
            head is None or chunk_size is None or hasattr(head, "lora_A")
        ):  # an adapted head sees whole rows, for their λ
            return token_cross_entropy(self.logits(input_ids, attention_mask), targets) * masked
        only_text = lambda hidden: self._of_text(hidden, input_ids)  # noqa: E731
        with cross_entropy_in_head(head, targets, masked, chunk_size, only_text):
            losses = self._forward(input_ids, attention_mask)  # (b, l, 1)
        if losses.shape != (*masked.shape, 1):
            raise ValueError(
                f"{type(self.language_model).__name__} changes what its output head returns, so that the loss can't be "
                'computed within it: pass logits="all"'
            )
        return losses.squeeze(-1)

    @property
    def head(self) -> nn.Module | None:
        """The module that makes logits from hidden states, or None where hooking it would not be right: what leaves it
        isn't what leaves the model (logits scaled or capped afterwards), or a compiled graph would miss the hooks.
        """
        inner = self.language_model
        if inner is None or any(self.configured(name) not in (None, 1.0) for name in _LOGIT_FIELDS):
            return None
        head = inner.get_output_embeddings()
        name = next((name for name, module in self.model.named_modules() if module is head), None)
        if head is None or name is None:
            return None
        parts = name.split(".")
        parents = [self.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
        is_compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in parents)
        return None if is_compiled else head

    def _forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        output = self.model(input_ids, **({} if attention_mask is None else {"attention_mask": attention_mask}))
        return output if isinstance(output, torch.Tensor) else output.logits

    def _of_text(self, states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The part (b, l, …) of `states` (b, n + l, …) that belongs to the text; n is 0 where its adapter is off."""
        b, length = input_ids.shape
        extra = states.shape[1] - length if states.ndim == 3 and len(states) == b else -1
        if extra not in (0, self.virtual_tokens):
            raise ValueError(
                f"the model made hidden states or logits of shape {tuple(states.shape)}, expected ({b}, {length}, "
                "width): a model that packs its batch, as some do under FlashAttention, needs another "
                "attn_implementation"
            )
        return states[:, extra:]
