"""The regimes "blind" and "seen": fine-tuning a language model that can't tell which tokens were lost, or that can.

loss = mean over ten bins of λ of the mean − log p of the tokens that count          on questions that no training sees
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.dllm.masking import MaskedBatch
from quality.images.held_out import BINS
from quality.regimes.text.corruption import Corruption, token_losses
from quality.regimes.text.data import TextData
from quality.regimes.text.models import ControlledLanguageModel, LanguageBackbone, logits_of

HELD_OUT_SEED = 11  # of noise levels and noise


@dataclass(frozen=True)
class Denoising:
    """Attributes:
    corruption: what is done to answers.
    load: of the questions.
    kind: of backbone.
    """

    corruption: Corruption
    load: Callable[[], TextData]
    kind: type[LanguageBackbone] = LanguageBackbone

    @property
    def backbone(self) -> LanguageBackbone:
        return self.kind(self.corruption.backbone, self.corruption.convention)

    def loss(self, denoiser: ControlledLanguageModel, args: Any) -> Callable[[int], Tensor]:
        """The loss of step number n, whose questions and noise follow from the seed and the number."""
        batch_of = self.batches(args)

        def loss(number: int) -> Tensor:
            batch = batch_of(number)
            return self.corruption.objective(token_losses(denoiser(batch), batch), batch)

        return loss

    def batches(self, args: Any) -> Callable[[int], MaskedBatch]:
        """The batch of step number n.

        Args:
            args: `seed` and `train_batch_size` are read.
        """
        rows, size, seed = self.load().train, args.train_batch_size, args.seed
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))

        def batch(number: int) -> MaskedBatch:
            indices = torch.arange(number * size, (number + 1) * size)
            chosen = rows.batch(order[indices % len(rows)])
            return self.corruption.corrupt(chosen, seed=seed, sample_indices=indices.tolist())

        return batch

    def held_out(self) -> Iterator[MaskedBatch]:
        """One batch a bin of λ, the same for every method and seed."""
        rows = self.load().held_out
        for index, chosen in enumerate(torch.arange(len(rows)).chunk(BINS)):
            order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(index))
            level = (index + (order + 0.5) / len(chosen)) / BINS  # (n,)
            options = {"seed": HELD_OUT_SEED, "sample_indices": chosen.tolist(), "noise_level": level}
            yield self.corruption.corrupt(rows.batch(chosen), **options)

    @torch.no_grad()
    def figures(self, model: Any) -> dict[str, Any]:
        """losses: of each bin, nats a token that counts; score: their mean, by which rates are chosen."""
        losses = []
        for batch in self.held_out():
            counted = self.corruption.counted(batch)
            losses.append(token_losses(logits_of(model, batch), batch)[counted].mean().item())
        return {"losses": losses, "score": fmean(losses)}
