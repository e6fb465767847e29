"""T-LoRA's rank mask and Multi-LoRA's bins at every timestep. (tests/acceptance/test_layer_formula.py has layers.)"""

from __future__ import annotations

import torch

from nara_diffusion.cores.simple import BinsCore, RankMaskCore

STEPS = 1000
GRID = torch.arange(STEPS + 1) / STEPS  # every λ that a discrete schedule of 1000 steps can have, and 1


def test_active_rank_at_every_timestep_is_that_of_integers() -> None:
    for rank in [1, 2, 5, 16, 33, 64, 100, 320, 999]:
        steps = torch.arange(STEPS + 1)
        levels = (GRID, 1 - (STEPS - steps) / STEPS, steps * (1 / STEPS))  # three roundings of t / 1000
        for least in {1, 2, rank // 3, rank // 2, rank - 1, rank} & set(range(1, rank + 1)):
            expected = (rank - least) * (STEPS - steps) // STEPS + least
            for level in levels:
                assert torch.equal(RankMaskCore(rank, least).active_rank(level).long(), expected), least


def test_chosen_bin_at_every_timestep_is_that_of_integers() -> None:
    steps = torch.arange(STEPS + 1)
    for bins in range(1, 129):
        expected = (steps * bins // STEPS).clamp(max=bins - 1)
        assert torch.equal(BinsCore(bins, bins).chosen_bin(GRID).long(), expected), bins
