"""Products of bins' gradients, against gradients whose products are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nara_diffusion.check.comparison import compare_bins


def grams_of(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(gram, counts) of a bin's two halves of samples (n, p) each."""
    sums = torch.stack([torch.stack([half.sum(0) for half in halves]) for halves in samples]).double()  # (K, 2, p)
    counts = torch.tensor([[len(half) for half in halves] for halves in samples])
    return torch.einsum("khp,ljp->khlj", sums, sums), counts


def exact(*gradients: list[float], numbers: int = 4) -> tuple[Tensor, Tensor]:
    """Bins without noise."""
    return grams_of([(torch.tensor([g]).repeat(numbers, 1),) * 2 for g in gradients])


def test_comparison_of_gradients_at_a_known_angle_has_their_cosine_and_loss() -> None:
    angle = 0.8
    gram, counts = exact([2.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)])
    found = compare_bins([gram], counts)
    assert found.cosines[0][1] == pytest.approx(math.cos(angle))
    assert found.energy == pytest.approx((4 + 9) / 2)
    assert found.common == pytest.approx((4 + 9 + 12 * math.cos(angle)) / 4)
    assert found.lost_share == pytest.approx(1 - found.common / found.energy)
    assert found.reliability == pytest.approx(1)


def test_comparison_of_equal_gradients_loses_nothing_and_of_opposite_ones_all() -> None:
    same = compare_bins(*_one(exact([1.0, 2.0], [1.0, 2.0], [1.0, 2.0])))
    opposite = compare_bins(*_one(exact([1.0, 2.0], [-1.0, -2.0])))
    assert (same.lost_share, opposite.lost_share) == (pytest.approx(0, abs=1e-12), pytest.approx(1))


def test_comparison_weights_bins_by_their_samples() -> None:
    gram, counts = grams_of([(torch.tensor([[1.0]]).repeat(n, 1),) * 2 for n in (12,)] + [(torch.zeros(4, 1),) * 2])
    found = compare_bins([gram], counts)
    assert found.weights.tolist() == [0.75, 0.25]
    assert found.energy == pytest.approx(0.75)
    assert found.common == pytest.approx(0.75**2)


def test_comparison_of_noisy_gradients_has_the_expectation_of_exact_ones() -> None:
    """Means of 4 + 5 samples whose noise is far larger than they are: products of one half with itself would be too."""
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([[1.0, 0.5, 0.0], [0.2, -0.6, 0.4]])
    energies, commons, naive = [], [], []
    for _ in range(6000):
        samples = [tuple(g + 3 * torch.randn(n, 3, generator=generator) for n in (4, 5)) for g in true]
        gram, counts = grams_of(samples)  # type: ignore[arg-type]
        found = compare_bins([gram], counts)
        energies.append(found.energy)
        commons.append(found.common)
        naive.append(sum(torch.cat(halves).mean(0).square().sum() for halves in samples) / 2)
    energy, common = true.square().sum(1).mean().item(), true.mean(0).square().sum().item()
    for values, expected in ((energies, energy), (commons, common)):
        error = torch.tensor(values).std().item() / math.sqrt(len(values))
        assert sum(values) / len(values) == pytest.approx(expected, abs=4 * error)
        assert 4 * error < 0.35
    assert sum(naive) / len(naive) > energy + 2  # 3 · 3² / 9 of noise


def test_comparison_adds_the_layers() -> None:
    first, counts = exact([1.0, 0.0], [0.0, 1.0])
    second, _ = exact([2.0], [2.0])
    both, _ = exact([1.0, 0.0, 2.0], [0.0, 1.0, 2.0])
    torch.testing.assert_close(compare_bins([first, second], counts).products, compare_bins([both], counts).products)


def test_comparison_leaves_bins_without_samples_out() -> None:
    gram, counts = grams_of([(torch.ones(n, 2),) * 2 for n in (4, 3, 6)])
    assert compare_bins([gram], counts).bins == [0, 2]


def test_comparison_of_one_bin_is_refused() -> None:
    gram, counts = grams_of([(torch.ones(4, 2),) * 2, (torch.ones(1, 2),) * 2])
    with pytest.raises(ValueError, match=r"lie in 1 of 2 bins.*more samples, or a wider window"):
        compare_bins([gram], counts)


def _one(made: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Tensor]:
    return [made[0]], made[1]
