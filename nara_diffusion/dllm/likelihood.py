"""Monte-Carlo likelihood of answers under a masked language model (arXiv 2502.09992, equation 6).

    log p(x | prompt)  ≥  − E_{k ~ U{1 … n}}  E_{masks of k tokens}  (n / k) Σ_{j masked} − log p(x_j | masked x)

Drawing the number of masked tokens, k, has less variance than drawing a probability, and k is stratified: sample s of S
takes k from the s-th part of {1 … n}. The model is told λ = k / n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from nara_diffusion.dllm.loss import mask_token_of, masked_cross_entropy
from nara_diffusion.dllm.masking import MaskedBatch, answer_positions
from nara_diffusion.dllm.modes import evaluating, without_ddp


@torch.no_grad()
def log_likelihood(
    model: nn.Module,
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int],
    *,
    attention_mask: torch.Tensor | None = None,
    answer_lengths: torch.Tensor | Sequence[int] | None = None,
    samples: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    mask_token_id: int | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """The lower bound above, in nats, for each answer: (b,) float64.

    Args:
        model: the outermost module.
        input_ids: (b, l) prompt, answer, padding on the right.
        prompt_lengths, attention_mask, answer_lengths: as for `masked_diffusion_loss`.
        samples: S, masks an answer.
        batch_size: masks of one answer that go through the model together.
        seed: the masks of row i depend on (seed, i) and on the answer's length alone.

    Raises:
        ValueError: as `answer_positions`; or samples or batch_size below 1.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples is {samples} and batch_size {batch_size}: both have to be 1 at least")
    mask = mask_token_of(model, mask_token_id)
    model = without_ddp(model)
    answers = answer_positions(input_ids, prompt_lengths, attention_mask=attention_mask, answer_lengths=answer_lengths)
    estimates = []
    with evaluating(model):
        for i in tqdm(range(len(input_ids)), desc="likelihood", unit="row", disable=not progress):
            end = int(answers[i].nonzero().max()) + 1  # one answer at a time, so without its padding
            tokens, answer = input_ids[i, :end], answers[i, :end]
            masks, counts = stratified_masks(answer, samples, np.random.default_rng((seed, i)))  # (S, l), (S,)
            losses = []
            for masked, count in zip(masks.split(batch_size), counts.split(batch_size), strict=True):
                batch = _masked_batch(tokens, answer, masked, count, mask)
                token_loss = masked_cross_entropy(model, batch).double()  # (s, l)
                losses.append(token_loss.sum(1) * answer.sum() / count)
            estimates.append(-torch.cat(losses).mean())
    return torch.stack(estimates)


def stratified_masks(
    answer: torch.Tensor, samples: int, random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (S, l) of k (S,) tokens of an `answer` (l,), k stratified over 1 … n."""
    n = int(answer.sum())
    places = (np.arange(samples) + random.random(samples)) / samples  # one in each S-th of [0, 1)
    counts = torch.from_numpy(1 + np.minimum((places * n).astype(np.int64), n - 1)).to(answer.device)
    order = torch.from_numpy(random.random((samples, n)).argsort(1).argsort(1)).to(answer.device)  # ranks (S, n)
    masks = torch.zeros(samples, len(answer), dtype=torch.bool, device=answer.device)
    masks[:, answer] = order < counts[:, None]
    return masks, counts


def _masked_batch(
    tokens: torch.Tensor, answer: torch.Tensor, masked: torch.Tensor, counts: torch.Tensor, mask_token_id: int
) -> MaskedBatch:
    targets = tokens.expand(len(masked), -1)
    return MaskedBatch(
        input_ids=targets.masked_fill(masked, mask_token_id),
        targets=targets,
        masked=masked,
        answer=answer.expand(len(masked), -1),
        noise_level=(counts / answer.sum()).float(),
        attention_mask=None,
    )
