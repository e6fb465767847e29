"""The language models that are adapted, and the arguments of their training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.dllm.masking import MaskedBatch
from nara_diffusion.noise.context import find_holders
from quality.images.held_out import BINS
from quality.text.runs import TextArguments, adapted, text_arguments
from quality.wrong_noise import changed_noise, training_change

DEFAULTS: dict[str, Any] = {"train_batch_size": 32, "lr_scheduler": "cosine", "lr_warmup_steps": 0.05}


@dataclass(frozen=True)
class LanguageBackbone:
    """Attributes:
    name: a folder of examples/assets.
    convention: the name of λ's definition.
    """

    name: str
    convention: str
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "all": ("all-linear",),
    }

    def arguments(self, method: str, seed: int, options: Mapping[str, Any]) -> TextArguments:
        return text_arguments(method, seed, DEFAULTS | dict(options))

    def adapted(self, method: str, args: Any) -> Any:
        return adapted(self.name, method, args, noise_convention=self.convention)

    def controlled(self, model: Any, control: str | None, seed: int) -> ControlledLanguageModel:
        return ControlledLanguageModel(model, control, seed)


@dataclass(frozen=True)
class BiasedBackbone(LanguageBackbone):
    """With b(λ) beside the adapter."""

    def adapted(self, method: str, args: Any) -> Any:
        return Biased(super().adapted(method, args))


class Biased(nn.Module):
    """Adds b(λ) to the logit of the token that is seen in each place: a number for each of `BINS` bins of λ."""

    step = 10.0
    """b = `step` · a parameter: a rate that suits LoRA moves it as far as Bayes' rule needs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.bias = nn.Parameter(torch.zeros(BINS))

    def forward(self, batch: MaskedBatch) -> Tensor:
        """Logits (b, l, v)."""
        logits = logits_of(self.model, batch)
        bias = self.step * self.bias[(BINS * batch.noise_level).long().clamp(max=BINS - 1)]  # (b,)
        return logits + bias[:, None, None] * nn.functional.one_hot(batch.input_ids, logits.shape[-1])


class ControlledLanguageModel(nn.Module):
    """A language model that is told the λ of a control in training."""

    def __init__(self, model: Any, control: str | None, seed: int) -> None:
        super().__init__()
        self.model = model
        self.change = training_change(control, seed)

    def forward(self, batch: MaskedBatch) -> Tensor:
        """Logits (b, l, v)."""
        with nullcontext() if self.change is None else changed_noise(self.model, self.change):
            return logits_of(self.model, batch)


def logits_of(model: Any, batch: MaskedBatch) -> Tensor:
    """Logits (b, l, v) of `model`, which is told the batch's λ if it is noise-aware."""
    if isinstance(model, Biased):
        return model(batch)
    with _told(model, batch.noise_level):
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def _told(model: nn.Module, level: Tensor) -> AbstractContextManager[None]:
    aware = any(holder.needs_noise for holder in find_holders(model))
    return noise_level(model, level) if aware else nullcontext()
