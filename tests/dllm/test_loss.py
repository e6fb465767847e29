"""The training objective and the loss over λ are LLaDA's sums, by hand in float64, with the masks drawn.

    L = 1/B Σ_i 1/(λ_i n_i) Σ_{j masked} − log p(x_ij)

n_i is the length of answer i. The masks are read off the model's own input.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from nara_diffusion.dllm import masked_diffusion_loss, noise_level_curve
from tests.acceptance._text import ByHand, adapted_pair
from tests.helpers.answers import MASK, PROMPTS, ROWS, VOCABULARY, batch, inputs_of, surprise


@pytest.fixture(scope="module")
def pair() -> tuple[Any, ByHand]:
    return adapted_pair(VOCABULARY)


def check_loss(by_hand: ByHand, result: Any, rows: list[int]) -> None:
    """Each share of the loss, and which positions were masked."""
    expected = []
    for i, mask, level in zip(rows, result.masked, result.noise_level.tolist(), strict=True):
        masked = mask.nonzero()[:, 0].tolist()
        assert set(masked) <= set(range(PROMPTS[i], len(ROWS[i])))  # neither prompt nor padding
        expected.append(surprise(by_hand, ROWS[i], masked, level) / level / (len(ROWS[i]) - PROMPTS[i]))
    assert result.per_sample.tolist() == pytest.approx(expected, rel=1e-4)
    assert float(result.loss.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_loss_at_given_levels_matches_manual_sum(pair: Any) -> None:
    model, by_hand = pair
    levels = torch.tensor([0.9, 0.4, 0.65])
    result = masked_diffusion_loss(model, **batch(), noise_level=levels, seed=4, chunk_size=3)
    assert torch.equal(result.noise_level, levels)
    assert result.masked.any(1).all()
    check_loss(by_hand, result, [0, 1, 2])


def test_loss_draws_each_stratum_once_in_any_split(pair: Any) -> None:
    """As over two processes: λ and masks are those of the sample's place in the stream."""
    model, by_hand = pair
    indices = list(range(8, 16))
    rows = [i % 3 for i in indices]
    options: dict[str, Any] = {"seed": 6, "group_size": 8}
    full = masked_diffusion_loss(model, **batch(rows), sample_indices=indices, **options)
    check_loss(by_hand, full, rows)
    strata = ((full.noise_level.double() - 1e-3) / (1 - 1e-3) * 8).floor().sort().values
    assert strata.tolist() == list(range(8))
    assert full.noise_level.argsort().tolist() != list(range(8))
    for part in (slice(0, 5), slice(5, 8)):
        half = masked_diffusion_loss(model, **batch(rows[part]), sample_indices=indices[part], **options)
        assert torch.equal(half.noise_level, full.noise_level[part])
        width = half.masked.shape[1]
        assert torch.equal(half.masked, full.masked[part, :width])
        assert not full.masked[part, width:].any()
    other = masked_diffusion_loss(model, **batch(rows), sample_indices=indices, seed=7, group_size=8)
    assert not torch.equal(other.noise_level, full.noise_level)


def test_loss_with_complementary_masks_trains_tokens_once(pair: Any) -> None:
    model, by_hand = pair
    result = masked_diffusion_loss(model, **batch(), seed=2, complementary=True)
    first, second = result.masked.chunk(2)
    answers = [[PROMPTS[i] <= j < len(ROWS[i]) for j in range(first.shape[1])] for i in range(3)]
    assert torch.equal(first ^ second, torch.tensor(answers))
    assert torch.equal(first | second, torch.tensor(answers))
    levels = result.noise_level
    torch.testing.assert_close(levels[3:], 1 - levels[:3])
    assert len(set(levels.tolist())) == 6
    check_loss(by_hand, result, [0, 1, 2, 0, 1, 2])


def test_curve_at_each_level_matches_manual_ratio(pair: Any) -> None:
    """Σ_i 1/n_i Σ_{j masked} − log p over Σ_i 1/n_i Σ_{j masked} 1; masks grow with λ."""
    model, by_hand = pair
    rows = [{"input_ids": ids, "prompt_length": n} for ids, n in zip(ROWS, PROMPTS, strict=True)]
    levels, masks = [0.2, 0.4, 0.5, 0.6, 0.8, 1.0], []
    with inputs_of(model) as seen:
        curve = noise_level_curve(model, rows, levels, batch_size=2, seed=1, progress=False)
    for number, (level, loss) in enumerate(zip(levels, curve, strict=True)):
        total = count = 0.0
        masks.append([{j for j, token in enumerate(ids) if token == MASK} for ids in seen[3 * number : 3 * number + 3]])
        for row, prompt, masked in zip(ROWS, PROMPTS, masks[-1], strict=True):
            total += surprise(by_hand, row, sorted(masked), level) / (len(row) - prompt)
            count += len(masked) / (len(row) - prompt)
        assert loss == pytest.approx(total / count, rel=1e-4)
    assert masks[-1] == [set(range(n, len(row))) for n, row in zip(PROMPTS, ROWS, strict=True)]
    for fewer, more in pairwise(masks):
        assert all(low <= high for low, high in zip(fewer, more, strict=True))
    assert len({tuple(map(len, sizes)) for sizes in masks}) >= 4


@pytest.mark.parametrize("lengths", [[3], [3, 4, 5], [3.0, 4.0], 3])
def test_loss_refuses_wrong_number_of_lengths(pair: Any, lengths: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt_lengths is .*: pass a whole number for each of the 2 rows"):
        masked_diffusion_loss(pair[0], torch.ones(2, 9, dtype=torch.long), lengths)
