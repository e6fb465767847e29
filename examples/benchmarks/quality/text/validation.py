"""The loss over ten bins of λ, on masks that are the same for every model: what the methods are compared by.

Of each validation question the benchmark sees two rows: with mask m at λ in (0, 1/2) and with the complementary mask at
1 − λ. Question i of n takes the λ of stratum i mod 5 of ten, so that each bin holds n / 5 rows; within it λ is
stratified again. Masks are independent in each token, as in training: the complement of an empty one is the wholly
masked answer, from which generation starts. A row without a masked token has no loss, and would tell nothing. Below
1/2, where many would be, such a mask is drawn anew, and each row, whose answer has a tokens, counts by the probability
that its mask isn't empty, w = 1 − (1 − λ)^a. In bin k, over its rows i,

    loss_k = Σ_i w_i Σ_{j masked} − log p(x_ij | masked x_i)  /  Σ_i w_i |masked_i|         nats a masked token

with w = 1 from λ = 1/2 on. The validation loss is the mean of the ten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from nara_diffusion.dllm.answer_places import answer_positions
from nara_diffusion.dllm.loss import masked_cross_entropy
from nara_diffusion.dllm.mask_draws import MIN_NOISE_LEVEL
from nara_diffusion.dllm.masking import MaskedBatch
from nara_diffusion.dllm.models.backbone import evaluating
from quality.text.data import Rows

BINS = 10
CENTRES = [(k + 0.5) / BINS for k in range(BINS)]
SEED = 11  # of the masks
BATCH = 64  # rows; more at once leave the processor's cache


@dataclass(frozen=True)
class ValidationSet:
    """Attributes:
    batches: masked rows, sorted by width.
    bins: (2n,) the bin of each row, in the batches' order.
    weights: (2n,) w, how much it counts.
    """

    batches: list[MaskedBatch]
    bins: torch.Tensor
    weights: torch.Tensor


def validation_set(rows: Rows, mask_token_id: int) -> ValidationSet:
    """The 2 n masked rows of `rows`."""
    levels, masks, weights = _draw(len(rows), rows.answer_length)  # (2n,), (2n, a), (2n,)
    source = torch.arange(len(rows)).repeat(2)
    order = rows.prompt_lengths[source].argsort(stable=True)
    batches = [_masked(rows, source[c], levels[c], masks[c], mask_token_id) for c in order.split(BATCH)]
    bins = (levels[order] * BINS).long().clamp(max=BINS - 1)
    return ValidationSet(batches, bins, weights[order])


def _draw(n: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """λ (2n,), masks (2n, length) and weights (2n,); row n + i complements what was drawn
    for row i, before an empty mask was drawn anew."""
    generator = torch.Generator().manual_seed(SEED)
    half, groups = BINS // 2, math.ceil(n / (BINS // 2))
    index = torch.arange(n)
    within = torch.stack([torch.randperm(groups, generator=generator) for _ in range(half)])  # (5, n / 5)
    u = (within[index % half, index // half] + torch.rand(n, generator=generator)) / groups  # (n,) in its stratum
    levels = ((index % half + u) / BINS).clamp(min=MIN_NOISE_LEVEL)  # (n,) in (0, 1/2)
    masks = torch.rand(n, length, generator=generator) < levels[:, None]
    complements = ~masks
    while (empty := ~masks.any(1)).any():
        again = torch.rand(n, length, generator=generator) < levels[:, None]
        masks[empty] = again[empty]
    weights = torch.cat([1 - (1 - levels) ** length, torch.ones(n)])
    return torch.cat([levels, 1 - levels]), torch.cat([masks, complements]), weights


def _masked(rows: Rows, source: torch.Tensor, level: torch.Tensor, mask: torch.Tensor, mask_id: int) -> MaskedBatch:
    batch = rows.batch(source)
    input_ids, lengths = batch["input_ids"], batch["answer_lengths"]
    answer = answer_positions(input_ids, batch["prompt_lengths"], answer_lengths=lengths)
    masked = torch.zeros_like(answer).masked_scatter(answer, mask)
    ends = batch["prompt_lengths"] + lengths
    positions = torch.arange(input_ids.shape[1])
    attention = None if bool((ends == input_ids.shape[1]).all()) else (positions < ends[:, None]).long()
    return MaskedBatch(input_ids.masked_fill(masked, mask_id), input_ids, masked, answer, level, attention)


@torch.no_grad()
def binned_losses(model: nn.Module, validation: ValidationSet) -> list[float]:
    """The loss of `model` in each bin."""
    sums, counts = [], []
    with evaluating(model):
        for batch in validation.batches:
            sums.append(masked_cross_entropy(model, batch, chunk_size=None).sum(1).double())
            counts.append(batch.masked.sum(1).double())
    weights = validation.weights.double()
    total, count = weights * torch.cat(sums), weights * torch.cat(counts)
    bins = [validation.bins == k for k in range(BINS)]
    return [(total[chosen].sum() / count[chosen].sum()).item() for chosen in bins]
