"""The masks that training draws, for a level λ that it draws, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nara_diffusion.dllm.masking import mask_answers

MASK = 29


@pytest.mark.parametrize("group_size", [1, 8])
def test_masks_cover_each_position_with_the_levels_probability(group_size: int) -> None:
    """In each eighth of λ, within 5 standard deviations: the draw of λ says nothing else about the masks."""
    count, answer = 4000, 3
    rows = torch.zeros(count, 1 + answer, dtype=torch.long)
    indices = list(range(count))
    options: dict[str, Any] = {"seed": 0, "sample_indices": indices, "group_size": group_size}
    batch = mask_answers(rows, [1] * count, mask_token_id=MASK, **options)
    for part in range(8):
        chosen = (part / 8 < batch.noise_level) & (batch.noise_level <= (part + 1) / 8)
        levels = batch.noise_level[chosen].double()
        deviation = (levels * (1 - levels)).sum().sqrt() / len(levels)
        difference = batch.masked[chosen, 1:].double().mean(0) - levels.mean()  # one each position
        assert (difference.abs() <= 5 * deviation).all()
