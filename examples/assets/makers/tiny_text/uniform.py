"""The objective of a uniform-state language model: random tokens in place of masks, as UDLM and GIDD have them.

    λ ~ U(ε, 1), one a sequence;   token j of the answer is replaced, with probability λ, by one of `noise_tokens`
    loss_i = mean over all tokens j of answer i of − log p(x_ij | corrupted x_i)

No token says that it was replaced, so that the model has to infer λ, and which tokens to believe, from the sequence.
Most of the tokenizer's vocabulary are bytes that answers hardly ever have: if they replaced tokens, they could be
counted as masks are. So tokens are replaced by those that answers are written in, as in models of characters, whose
vocabulary has no others (UDLM's, of text8 and of DNA).
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase, digits
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from nara_diffusion.dllm.masking import MaskedBatch, mask_answers
from nara_diffusion.dreambooth.draws import torch_generator

from .tokenizer import EOS, EOT


def noise_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids (n,) that answers are written in: of lower-case letters, digits and the space, and of both ends."""
    characters = tokenizer([*ascii_lowercase, *digits, " "], add_special_tokens=False)["input_ids"]
    return torch.tensor([*(token for (token,) in characters), *tokenizer.convert_tokens_to_ids([EOT, EOS])])


def uniform_corruption(
    input_ids: Tensor,
    prompt_lengths: Tensor,
    tokens: Tensor,
    *,
    seed: int,
    sample_indices: Sequence[int] | Tensor,
    **options: Any,
) -> MaskedBatch:
    """A batch whose `masked` positions hold random ones of `tokens`; a function of the seed and the samples' indices.

    Args:
        options: of `mask_answers`: noise_level, answer_lengths, ….
    """
    key = {"seed": seed, "sample_indices": sample_indices}
    batch = mask_answers(input_ids, prompt_lengths, mask_token_id=0, **key, **options)
    width = input_ids.shape[1]
    drawn = [
        torch.randint(len(tokens), (width,), generator=torch_generator(seed, "uniform tokens", int(index)))
        for index in sample_indices
    ]
    random = tokens[torch.stack(drawn)].to(input_ids.device)  # (b, l)
    return MaskedBatch(**{**vars(batch), "input_ids": torch.where(batch.masked, random, input_ids)})


def uniform_loss(model: nn.Module, batch: MaskedBatch) -> Tensor:
    """The loss (b,) of each sequence."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()  # (b, l, v)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    losses = losses.view(batch.targets.shape) * batch.answer  # (b, l)
    return losses.sum(1) / batch.answer.sum(1)
