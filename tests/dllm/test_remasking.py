"""The sampler's choices, one at a time."""

from __future__ import annotations

import pytest
import torch

from nara_diffusion.dllm.remasking import above, confidence_of, highest, sample_tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_distributed_as_softmax_of_logits_over_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    n = 40000
    tokens = sample_tokens(logits.expand(1, n, 4), temperature, torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens[0], minlength=4) / n
    assert torch.allclose(shares, (logits / temperature).softmax(0), atol=4 * (0.25 / n) ** 0.5)


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.tensor([0.0, float("-inf"), 0.0]).expand(1, 1000, 3)
    assert (sample_tokens(logits, 3.0, torch.Generator().manual_seed(0)) != 1).all()
    assert sample_tokens(logits, 0.0, None).max() == 0


def test_confidence_is_the_softmax_even_in_low_precision() -> None:
    logits = torch.randn(2, 3, 5)
    tokens = torch.randint(0, 5, (2, 3))
    expected = logits.bfloat16().float().softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(confidence_of(logits.bfloat16(), tokens), expected)


def test_highest_and_above_choose_among_masks_only() -> None:
    rank = torch.tensor([[0.9, 0.1, 0.5, 0.6], [0.2, 0.3, 0.1, 0.0]])
    masked = torch.tensor([[False, True, True, True], [False, False, True, False]])
    assert highest(rank, masked, 2).tolist() == [[False, False, True, True], [False, False, True, False]]
    assert highest(rank, masked, 9).tolist() == masked.tolist()
    assert above(rank, masked, 0.4).tolist() == [[False, False, True, True], [False, False, True, False]]
    assert above(rank, masked, 0.8).tolist() == [[False, False, False, True], [False, False, True, False]]
    assert not above(rank, torch.zeros_like(masked), 0.0).any()
