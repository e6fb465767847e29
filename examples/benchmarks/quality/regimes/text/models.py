"""The language models that are adapted, and the arguments of their training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion import noise_level
from nara_diffusion.dllm import load_backbone
from nara_diffusion.dllm.masking import MaskedBatch
from nara_diffusion.noise.level import find_holders
from nara_diffusion.training.adapters import build_adapter
from nara_diffusion.training.arguments import AdapterArguments, OptimizationArguments
from nara_diffusion.training.parser import option
from quality.assets import ASSETS
from quality.images.held_out import BINS
from quality.images.settings import BASE
from quality.options import arguments_of
from quality.wrong_noise import changed_noise, constant_noise, exchanged_noise

DEFAULTS: dict[str, Any] = {"train_batch_size": 32, "lr_scheduler": "cosine", "lr_warmup_steps": 0.05}


@dataclass
class TextArguments(AdapterArguments, OptimizationArguments):
    """Those of train_scripts/dllm.py that a run of a regime has."""

    seed: int = option(0, "Of weights and data.")


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
        adapter = {} if method == BASE else {"adapter": method}
        return arguments_of(TextArguments, DEFAULTS | dict(options) | adapter | {"seed": seed})

    def adapted(self, method: str, args: Any) -> Any:
        model = copy.deepcopy(load(self.name)[0])
        if method == BASE:
            return model.requires_grad_(False)
        return build_adapter(model, args, noise_convention=self.convention)

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
        own = self.step * self.bias[(BINS * batch.noise_level).long().clamp(max=BINS - 1)]  # (b,)
        return logits + own[:, None, None] * nn.functional.one_hot(batch.input_ids, logits.shape[-1])


class ControlledLanguageModel(nn.Module):
    """A language model that is told the λ of a control in training."""

    def __init__(self, model: Any, control: str | None, seed: int) -> None:
        super().__init__()
        self.model = model
        changes = {
            "constant": constant_noise,
            "shuffled": exchanged_noise(torch.Generator().manual_seed(seed)),
        }
        self.change = None if control is None else changes[control]

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


@cache
def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A folder of examples/assets; never changed."""
    return load_backbone(str(ASSETS / name))
