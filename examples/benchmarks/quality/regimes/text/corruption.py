"""How tokens of answers are lost: replaced by random ones, so that nothing shows which, or masked, so that λ shows.

    replaced   −  mean over all tokens j of the answer of log p(x_j | y)            λ is the share that is replaced
    masked     −  sum over masked tokens of log p(x_j | y) / (λ · tokens)           λ is the share that is masked

The first is the objective that uniform-tiny was pre-trained with (tiny_text/uniform.py), the second LLaDA's.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.dllm.masking import MaskedBatch, mask_answers
from nara_diffusion.noise.sources import MASKED_SHARE
from quality.running import MAKERS
from quality.text.runs import load

sys.path.append(str(MAKERS))

from tiny_text.uniform import noise_tokens, uniform_corruption

REPLACED_SHARE = "replaced_share"
"""λ's definition: the share of the answer's tokens that random ones replaced."""


@dataclass(frozen=True)
class Corruption:
    """Attributes:
    backbone: of examples/assets, a model that was pre-trained so.
    convention: the name of λ's definition.
    corrupt: rows, `seed`, `sample_indices` and a `noise_level` (b,) or None → a batch, whose `masked` are lost.
    counts_all: whether tokens that weren't lost count too, as they do where nothing shows which were.
    """

    backbone: str
    convention: str
    corrupt: Callable[..., MaskedBatch]
    counts_all: bool

    def counted(self, batch: MaskedBatch) -> Tensor:
        """(b, l) bool, the tokens whose loss counts."""
        return batch.answer if self.counts_all else batch.masked

    def objective(self, token_losses: Tensor, batch: MaskedBatch) -> Tensor:
        """The mean over the batch of the losses above, from those of the tokens (b, l)."""
        sums = (token_losses * self.counted(batch)).sum(1) / batch.answer.sum(1)  # (b,)
        return (sums if self.counts_all else sums / batch.noise_level).mean()


def token_losses(logits: Tensor, batch: MaskedBatch) -> Tensor:
    """− log p (b, l) of the clean tokens, from logits (b, l, v)."""
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none")
    return losses.view(batch.targets.shape)


def _replaced(rows: dict[str, Tensor], **options: Any) -> MaskedBatch:
    return uniform_corruption(**rows, tokens=noise_tokens(load(REPLACED.backbone)[1]), **options)


def _masked(rows: dict[str, Tensor], **options: Any) -> MaskedBatch:
    model, _ = load(MASKED.backbone)
    return mask_answers(**rows, mask_token_id=model.config.mask_token_id, **options)


def _told(rows: dict[str, Tensor], *, at_start: bool = False, **options: Any) -> MaskedBatch:
    """As `_replaced`, with ⌊10 λ⌋ in place of the first digit of each prompt, or of the token that starts it."""
    batch = _replaced(rows, **options)
    digits = token_ids(string.digits)  # (10,)
    input_ids = batch.input_ids.clone()
    first = 0 if at_start else (torch.isin(input_ids, digits) & ~batch.answer).int().argmax(1)  # (b,)
    input_ids[torch.arange(len(input_ids)), first] = digits[(10 * batch.noise_level).long().clamp(max=9)]
    return replace(batch, input_ids=input_ids)


def token_ids(characters: str) -> Tensor:
    """Of each character (n,)."""
    tokenizer = load(REPLACED.backbone)[1]
    return torch.tensor(tokenizer(list(characters), add_special_tokens=False)["input_ids"])[:, 0]


REPLACED = Corruption("uniform-tiny", REPLACED_SHARE, _replaced, counts_all=True)
TOLD = replace(REPLACED, corrupt=_told)
TOLD_AT_START = replace(REPLACED, corrupt=partial(_told, at_start=True))
MASKED = Corruption("llada-tiny", MASKED_SHARE, _masked, counts_all=False)
