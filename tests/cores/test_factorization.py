"""Theorem 4.1: updates that share their spaces have shared factors, and a core for each."""

from __future__ import annotations

import pytest
import torch

from nara_diffusion import shared_factors
from tests.helpers.adapted import relative_error


def updates_of_rank(n: int, d_out: int, d_in: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """n matrices that share column and row spaces of dimension `rank`."""
    B, A = torch.randn(d_out, rank, dtype=torch.float64), torch.randn(rank, d_in, dtype=torch.float64)
    return torch.einsum("or,nrq,qi->noi", B, torch.randn(n, rank, rank, dtype=torch.float64), A).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_shared_factors_reproduce_every_update_at_the_smallest_rank(dtype, tolerance):
    for n, d_out, d_in, rank in [(1, 9, 6, 2), (3, 9, 6, 4), (5, 6, 11, 6), (2, 40, 30, 7), (4, 7, 7, 1)]:
        updates = updates_of_rank(n, d_out, d_in, rank, dtype)
        B, cores, A = shared_factors(updates)
        assert (B.shape, cores.shape, A.shape) == ((d_out, rank), (n, rank, rank), (rank, d_in))
        assert {t.dtype for t in (B, cores, A)} == {dtype}
        torch.testing.assert_close(B.T @ B, torch.eye(rank, dtype=dtype), atol=1e-5, rtol=0)
        torch.testing.assert_close(A @ A.T, torch.eye(rank, dtype=dtype), atol=1e-5, rtol=0)
        assert relative_error(torch.einsum("or,nrq,qi->noi", B, cores, A), updates) < tolerance


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("updates", "rank"),
    [
        (torch.cat([random(1, 12, 2) @ random(1, 2, 10), random(1, 12, 3) @ random(1, 3, 10)]), 5),
        (random(12, 1) @ random(4, 1, 10), 4),
        (random(3, 5, 8), 8),
        (torch.zeros(2, 5, 4), 1),
    ],
    ids=["spaces without a common direction", "one column space, four rows", "one side exhausted", "zero"],
)
def test_the_rank_is_that_of_the_larger_joint_space_and_no_more(updates, rank):
    B, cores, A = shared_factors(updates)
    assert cores.shape == (len(updates), rank, rank)
    torch.testing.assert_close(B @ cores @ A, updates, rtol=0, atol=1e-12)


def test_a_smaller_rank_keeps_the_leading_directions():
    updates = updates_of_rank(3, 9, 8, 4, torch.float64)
    B, cores, A = shared_factors(updates, rank=2)
    assert cores.shape == (3, 2, 2)
    U = torch.linalg.svd(torch.cat(list(updates), dim=1))[0][:, :2]
    V = torch.linalg.svd(torch.cat(list(updates), dim=0))[2][:2]
    expected = U @ U.T @ updates @ V.T @ V
    assert relative_error(B @ cores @ A, expected) < 1e-12


def test_shared_factors_refuses_what_it_cannot_factor():
    for updates, rank, message in [
        (torch.randn(5, 4), None, r"shape \(5, 4\)"),
        (torch.ones(2, 5, 4, dtype=torch.int64), None, "int64"),
        (torch.randn(2, 5, 4).bfloat16(), None, "bfloat16"),
        (torch.randn(2, 5, 4), 0, r"rank is 0: it has to lie between 1 and .* 5"),
        (torch.randn(2, 5, 4), 6, "rank is 6"),
        (torch.full((2, 5, 4), float("nan")), None, "NaN"),
        (torch.randn(0, 5, 4), None, r"shape \(0, 5, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            shared_factors(updates, rank)
