"""The sampler's choices, one at a time."""

from __future__ import annotations

import pytest
import torch

from nara_diffusion.dllm.remasking import RowRandom, above, confidence_of, highest, sample_tokens


def random(rows: int) -> RowRandom:
    return RowRandom(torch.Generator().manual_seed(0), rows, torch.device("cpu"))


def test_rows_have_streams_of_their_own() -> None:
    together, alone = random(3), random(3)
    first, second = (together.uniform(torch.tensor([0, 1, 2]), 4) for _ in range(2))
    alone.uniform(torch.tensor([0, 2]), 4)
    assert torch.equal(alone.uniform(torch.tensor([2]), 4)[0], second[2])
    assert torch.equal(alone.uniform(torch.tensor([1]), 4)[0], first[1])
    assert len({*first.flatten().tolist(), *second.flatten().tolist()}) == 24


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_distributed_as_softmax_of_logits_over_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    n = 40000
    tokens = sample_tokens(logits.expand(1, n, 4), temperature, random(1), torch.tensor([0]))
    shares = torch.bincount(tokens[0], minlength=4) / n
    assert torch.allclose(shares, (logits / temperature).softmax(0), atol=4 * (0.25 / n) ** 0.5)


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.tensor([0.0, float("-inf"), 0.0]).expand(1, 1000, 3)
    assert (sample_tokens(logits, 3.0, random(1), torch.tensor([0])) != 1).all()
    assert sample_tokens(logits, 0.0, None, torch.tensor([0])).max() == 0


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
