"""What losses and samplers ask of a masked language model, whatever wraps it.

The wrappers are DDP, FSDP, torch.compile and PEFT. Prompt tuning and P-tuning put n virtual tokens
before a text, and the model has an output for each of them:

    n virtual tokens, then the l tokens of the text → hidden states and logits (b, n + l, …)

Positions are counted in the text, so the first n outputs are dropped here.

With a vocabulary of 126 464, logits are the largest tensor of a step, and both uses need few of
them: the loss needs masked positions, the sampler one block. So the output head computes fewer
*inside the model's own forward*, by hooks that act only in the thread that set them. The model is
still entered through its outermost `__call__`, so that DDP, FSDP, offload and autocast do their
part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .model_classes import ShiftedQwen2ForCausalLM, traits_of

# Configuration fields of transformers that change logits after the head.
_LOGIT_FIELDS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier_scale",
)


class Backbone:
    """A view of `model` without state of its own.

    Attributes:
        model: the outermost module; every forward enters its `__call__`.
        language_model: the outermost model of transformers in it, or None.
        entered: the modules from `model` to `language_model`, whose forwards call each other.
        is_shifted: True if it was trained to predict the next token (Dream), so that nothing
            predicts the first one.
        traits: the facts about the class of `language_model`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.language_model: PreTrainedModel | None = None
        self.entered: list[nn.Module] = []
        for module in model.modules():
            self.entered.append(module)
            if isinstance(module, PreTrainedModel):
                self.language_model = module
                break
        self.is_shifted = isinstance(self.language_model, ShiftedQwen2ForCausalLM)
        self.traits = traits_of(self.language_model)
        if self.traits.attends_by_blocks and self.virtual_tokens:
            raise ValueError(
                f"the adapter puts {self.virtual_tokens} virtual tokens before a text, which would "
                "shift the blocks of the model's attention: adapt its layers (nara, lora, …)"
            )

    @property
    def block_length(self) -> int | None:
        """The length of the blocks that generation goes by; None if the model has none.

        They are the blocks of the model's attention, or the canvases of DiffusionGemma.
        """
        field = self.traits.block_field
        return self.configured(field) if field else None

    def configured(self, name: str) -> Any:
        """Return a field of the language model's configuration; None if there is none.

        A model of text and images has some fields in the configuration of its text part.
        """
        config = getattr(self.language_model, "config", None)
        if config is None or getattr(config, name, None) is not None:
            return getattr(config, name, None)
        return getattr(config.get_text_config(), name, None)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.model.parameters()).device

    def mask_token_id(self, given: int | None = None) -> int:
        """Return `given`, or the mask token of the configuration.

        Raises:
            ValueError: neither names one, or the model has no masks.
        """
        if not self.traits.has_masks:
            raise ValueError(
                f"{self.traits.title} has random tokens in place of masks, and this function needs "
                "masks: train it with train_scripts/dllm.py, sample it with generate (docs/text.md)"
            )
        mask = self.configured("mask_token_id") if given is None else given
        if mask is None:
            raise ValueError(
                "the model's configuration has no mask_token_id: load it with "
                "load_backbone(…, mask_token_id=N), or pass mask_token_id=N here"
            )
        return int(mask)

    @property
    def virtual_tokens(self) -> int:
        """The number of virtual tokens that an adapter of PEFT puts before each text."""
        for module in self.model.modules():
            if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
                config: Any = module.active_peft_config
                return int(config.num_virtual_tokens)
        return 0

    @property
    def position_limit(self) -> int | None:
        """The tokens of the longest text that the model has positions for; None if unknown."""
        limit = self.configured("max_position_embeddings")
        return None if limit is None else limit - self.virtual_tokens

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        at: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Return logits (b, l, v) of a text (b, l), or (b, k, v) at its places `at` (b, k).

        Logits at some places only cost less. `inputs` are other arguments of the model's forward.
        """
        if at is None:
            return self._of_text(self._forward(input_ids, attention_mask, **inputs), input_ids)
        head = self.head
        if head is None:
            return _at(self.logits(input_ids, attention_mask, **inputs), at)
        with _hooked(head, lambda hidden: _at(self._of_text(hidden, input_ids), at)):
            return self._forward(input_ids, attention_mask, **inputs)

    def losses_in_place_of_logits(
        self,
        head: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        losses_of: Callable[[Tensor], Tensor],
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Run a forward with losses in place of logits, and return the losses (b, n).

        Args:
            losses_of: a function that gets the hidden states (b', l, d) before the `head`, and
                returns losses (b, n). It is called inside the forward.
        """
        entered: list[Tensor] = []

        def enter(hidden: Tensor) -> Tensor:
            entered.append(self._of_text(hidden, input_ids))
            return hidden[:, :1]  # the head's own call only runs other hooks: let it cost nothing

        with _hooked(head, enter, lambda _: losses_of(entered.pop()).unsqueeze(-1)):
            losses = self._forward(input_ids, attention_mask, position_ids=position_ids)
        return losses.squeeze(-1)  # (b, n)

    @property
    def head(self) -> nn.Module | None:
        """The module that makes logits from hidden states; None if hooks on it would be wrong.

        They are wrong if its output isn't the model's (logits are scaled or capped afterwards), or
        if a compiled graph would miss them.
        """
        inner = self.language_model
        if inner is None or any(self.configured(name) not in (None, 1.0) for name in _LOGIT_FIELDS):
            return None
        head = inner.get_output_embeddings()
        for module in (*self.entered, head):
            if getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod"):
                return None
        return head

    def _forward(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Any) -> Tensor:
        inputs["attention_mask"] = attention_mask
        present = {name: value for name, value in inputs.items() if value is not None}
        output = self.model(input_ids, **present)
        return output if isinstance(output, Tensor) else output.logits

    def _of_text(self, states: Tensor, input_ids: Tensor) -> Tensor:
        """Return the part (b, l, …) of `states` (b, n + l, …) that belongs to the text.

        n is 0 if the adapter with virtual tokens is disabled.
        """
        b, length = input_ids.shape
        extra = states.shape[1] - length if states.ndim == 3 and len(states) == b else -1
        if extra != 0 and extra != self.virtual_tokens:
            raise ValueError(
                f"the model made hidden states or logits of shape {tuple(states.shape)}, expected "
                f"({b}, {length}, width): a model that packs its batch, as some do under "
                "FlashAttention, needs another attn_implementation"
            )
        return states[:, extra:]


@contextmanager
def _hooked(
    head: nn.Module,
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Inside, in this thread, `head` gets `before(states)` and returns `after(output)`."""
    thread = threading.get_ident()

    def pre(_: nn.Module, args: tuple) -> tuple | None:
        return (before(args[0]), *args[1:]) if threading.get_ident() == thread else None

    def post(_: nn.Module, __: tuple, output: Tensor) -> Tensor | None:
        return after(output) if after and threading.get_ident() == thread else None

    # The inner pair of hooks: FSDP and DeepSpeed gather the weights before and free them after it.
    handles = [head.register_forward_pre_hook(pre), head.register_forward_hook(post, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """Return `states` (b, l, d) at positions (b, k): (b, k, d)."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the context in `model.eval()`; afterwards each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def without_ddp(model: nn.Module) -> nn.Module:
    """Return the module inside a DistributedDataParallel, which has the same weights.

    DDP's own forward synchronises buffers, so it waits forever if processes run different numbers
    of forwards.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
