"""The objective of a uniform-state language model: random tokens in place of masks, as UDLM and GIDD have them.

    λ ~ U(ε, 1), one a sequence;   token j of the answer is replaced, with probability λ, by one of the vocabulary
    loss_i = mean over all tokens j of answer i of − log p(x_ij | corrupted x_i)

No token says that it was replaced, so that the model has to infer λ, and which tokens to believe, from the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nara_diffusion.dllm.masking import MaskedBatch, mask_answers
from nara_diffusion.dreambooth.seeding import torch_generator


def uniform_corruption(
    input_ids: Tensor, prompt_lengths: Tensor, vocabulary: int, *, seed: int, sample_indices: Sequence[int] | Tensor
) -> MaskedBatch:
    """A batch whose `masked` positions hold random tokens; a function of the seed and the samples' indices alone."""
    batch = mask_answers(input_ids, prompt_lengths, mask_token_id=0, seed=seed, sample_indices=sample_indices)
    width = input_ids.shape[1]
    drawn = [
        torch.randint(vocabulary, (width,), generator=torch_generator(seed, "uniform tokens", int(index)))
        for index in sample_indices
    ]
    tokens = torch.stack(drawn).to(input_ids.device)  # (b, l)
    return MaskedBatch(**{**vars(batch), "input_ids": torch.where(batch.masked, tokens, input_ids)})


def uniform_loss(model: nn.Module, batch: MaskedBatch) -> Tensor:
    """The loss (b,) of each sequence."""
    logits = model(input_ids=batch.input_ids).logits.float()  # (b, l, v)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    losses = losses.view(batch.targets.shape) * batch.answer  # (b, l)
    return losses.sum(1) / batch.answer.sum(1)
