"""Monte-Carlo estimates of the likelihood of answers (LLaDA, arXiv 2502.09992, equation 6):

    log p(x | prompt)  ≥  − E_k E_masks (n / k) Σ_{j masked} − log p(x_j | masked x)
    k ~ U{1 … n}, masks of k tokens

Drawing the number of masked tokens, k, gives less variance than drawing a probability. k is also
stratified: sample s of S takes k from the s-th part of {1 … n}. If n tokens have at most S possible
masks (2ⁿ − 1 ≤ S), all of them are run, each with weight 1 / (n · C(n, k)), so the result is not
random. The model runs at λ = k / n.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import comb

import numpy as np
import torch
from torch import nn

from .answer_places import answer_positions
from .loss import masked_cross_entropy
from .masking import MaskedBatch
from .models.backbone import Backbone, evaluating, without_ddp
from .tokenizer import mask_in_a_text


def log_likelihood(
    model: nn.Module,
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int],
    *,
    answer_lengths: torch.Tensor | Sequence[int] | None = None,
    samples: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    sample_indices: Sequence[int] | None = None,
    cfg_scale: float = 0.0,
    mask_token_id: int | None = None,
    differentiable: bool = False,
) -> torch.Tensor:
    """Return the lower bound of log p above, in nats, for each answer: (b,) float64.

    Args:
        model: the outermost module.
        input_ids: (b, l) prompt, answer, padding on the right.
        prompt_lengths: (b,) the number of tokens before each answer, at least 1 if the model
            predicts the next token (Dream).
        answer_lengths: (b,) the number of tokens of each answer. By default answers end at l.
        samples: S, the number of masks for each answer.
        batch_size: the number of masked sequences in one forward. They may belong to several
            answers.
        seed: the seed of the masks.
        sample_indices: (b,), by default 0 … b − 1. The masks of row i depend only on (seed,
            sample_indices[i]) and on the length of the answer, so rows with equal index and length
            get the same masks.
        cfg_scale: w of classifier-free guidance, as in `generate`. With 0, there is no guidance.
        differentiable: True to keep the graph of all samples and rows, for example for a preference
            loss. A few samples are then enough, with another seed in each step. The model keeps its
            mode and its DDP wrapper.

    Raises:
        ValueError: a text contains the mask token, or the model's attention is by blocks (LLaDA2, SDAR, …).
            See also `answer_positions`.
    """
    model = model if differentiable else without_ddp(model)
    backbone = Backbone(model)
    if backbone.traits.attends_by_blocks:
        raise ValueError(
            f"{type(backbone.language_model).__name__} sees a text block by block, and this bound "
            "is one of models that see all of it: use noise_level_curve for a loss"
        )
    mask = backbone.mask_token_id(mask_token_id)
    answers = answer_positions(input_ids, prompt_lengths, answer_lengths=answer_lengths)
    until_end = answers.flip(1).cumsum(1).flip(1) > 0  # (b, l)
    holding = (until_end & (input_ids == mask)).any(1)  # (b,)
    if holding.any():
        raise ValueError(f"row {int(holding.nonzero()[0])} {mask_in_a_text(mask)}")
    indices = range(len(input_ids)) if sample_indices is None else sample_indices
    widths = until_end.sum(1).tolist()  # of prompt and answer
    device = input_ids.device
    bounds = torch.zeros(len(input_ids), dtype=torch.float64, device=device)
    mode = nullcontext() if differentiable else evaluating(model)
    with torch.set_grad_enabled(differentiable), mode:
        for width in set(widths):  # no text needs padding
            masks, weights, sources = [], [], []
            for row, index in enumerate(indices):
                if widths[row] == width:
                    random = np.random.default_rng((seed, index))
                    of_row, shares = weighted_masks(answers[row, :width], samples, random)
                    masks += of_row
                    weights += shares
                    sources += [row] * len(of_row)
            for start in range(0, len(masks), batch_size):
                chosen = slice(start, start + batch_size)
                rows, masked = (
                    torch.tensor(sources[chosen], device=device),
                    torch.stack(masks[chosen]),
                )
                targets, answer = input_ids[rows, :width], answers[rows, :width]
                share = masked.sum(1).float() / answer.sum(1)  # (s,), λ
                seen = targets.masked_fill(masked, mask)
                batch = MaskedBatch(seen, targets, masked, answer, share, None)
                losses = masked_cross_entropy(model, batch, cfg_scale=cfg_scale, mask_token_id=mask)
                weight = torch.stack(weights[chosen]).to(device)
                loss = losses.double().sum(1) / share.double()  # (s,)
                bounds.index_add_(0, rows, -loss * weight)
    return bounds


def weighted_masks(
    answer: torch.Tensor, samples: int, random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks (m, l) of an `answer` (l,), and their weights (m,), which sum to 1.

    If there are at most `samples` possible masks, return all of them. Otherwise return `samples`
    masks, with the number of masked tokens stratified.
    """
    n = int(answer.sum())
    if n < 63 and 2**n - 1 <= samples:
        chosen = (torch.arange(1, 2**n)[:, None] >> torch.arange(n)) & 1 > 0  # (2ⁿ − 1, n)
        shares = [1 / (n * comb(n, k)) for k in chosen.sum(1).tolist()]
        weights = torch.tensor(shares, dtype=torch.float64)
    else:
        places = (
            np.arange(samples) + random.random(samples)
        ) / samples  # one in each S-th of [0, 1)
        counts = 1 + np.minimum((places * n).astype(np.int64), n - 1)
        ranks = random.random((samples, n)).argsort(1).argsort(1)  # (S, n)
        chosen = torch.from_numpy(ranks < counts[:, None])
        weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
    masks = torch.zeros(len(chosen), len(answer), dtype=torch.bool, device=answer.device)
    masks[:, answer] = chosen.to(answer.device)
    return masks, weights
