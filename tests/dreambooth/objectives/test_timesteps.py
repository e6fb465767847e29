"""Draws that depend on (seed, position) alone, with the distributions that they promise."""

import pytest
import torch

from nara_diffusion.dreambooth.objectives.timesteps import draw_indices, draw_noise


def test_a_position_draws_the_same_in_any_batch() -> None:
    positions = [7, 3, 12, 4]
    options = {"seed": 5, "levels": 1000, "stratified": True, "group_size": 4}
    together = draw_indices(positions, **options)
    assert together.tolist() == [draw_indices([p], **options).item() for p in positions]
    noise = draw_noise(positions, (2, 3, 5), seed=5, offset=0.1)
    for row, position in enumerate(positions):
        assert torch.equal(noise[row], draw_noise([position], (2, 3, 5), seed=5, offset=0.1)[0])


def test_seeds_positions_and_purposes_differ() -> None:
    shape = (2, 3, 5)
    draws = [
        draw_noise([4], shape, seed=5),
        draw_noise([4], shape, seed=6),
        draw_noise([5], shape, seed=5),
        draw_noise([4], shape, seed=5, role="class"),
    ]
    flat = torch.stack(draws).flatten(1)
    assert len(flat.unique(dim=0)) == len(draws)
    indices = [draw_indices(range(50), seed=5, levels=1000, role=role) for role in ("instance", "class")]
    assert (indices[0] != indices[1]).sum() > 40


def test_stratified_indices_take_one_stratum_each() -> None:
    drawn = draw_indices(range(80), seed=1, levels=1000, stratified=True, group_size=8).reshape(10, 8)
    for group in drawn:
        assert sorted((group // 125).tolist()) == list(range(8))
    firsts = draw_indices(range(0, 8000, 8), seed=1, levels=1000, stratified=True, group_size=8)
    assert firsts.float().mean().item() == pytest.approx(499.5, abs=30)  # each position alone is uniform


def test_independent_indices_cover_all_levels() -> None:
    drawn = draw_indices(range(4000), seed=2, levels=10)
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 330
    assert counts.max() < 470


def test_noise_and_its_offset() -> None:
    noise = draw_noise(range(400), (2, 4, 4), seed=3)
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    shift = draw_noise(range(400), (2, 4, 4), seed=3, offset=0.3) - noise  # the same ε, and one δ a channel
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert shift[:, :, 0, 0].std().item() == pytest.approx(0.3, abs=0.03)
    assert abs(torch.corrcoef(shift[:, :, 0, 0].T)[0, 1].item()) < 0.15
