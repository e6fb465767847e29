"""The whole measurement on a linear model, of which it is known whether a static update serves all λ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion.check.measurement import Batch, CheckSettings, CheckTask, measure
from nara_diffusion.check.verdict import LIKELY, UNLIKELY, judge

SETTINGS = CheckSettings(samples=400, steps=80, step_samples=20, learning_rate=0.05)
D_IN, D_OUT, RANK = 7, 5, 6


def task(needed: Callable[[Tensor], Tensor], tells_noise: bool = False, batch_size: int = 20) -> CheckTask:
    """y = W x is to become y = (W + f(λ) M) x; the last feature of x is λ if `tells_noise`, else always 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False)).requires_grad_(False)
    weight, change = model[0].weight.clone(), torch.randn(D_OUT, D_IN)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]), model)

    def batch(positions: Sequence[int]) -> Batch:
        generator = torch.Generator().manual_seed(positions[0])
        levels = torch.rand(len(positions), generator=generator)
        x = torch.randn(len(positions), 3, D_IN, generator=generator)
        x[..., -1] = levels[:, None] if tells_noise else 0
        place = torch.rand(len(positions), generator=generator)

        def loss() -> SimpleNamespace:
            wanted = x @ weight.T + needed(levels)[:, None, None] * (x @ change.T)
            errors = (model(x) - wanted).square().mean((1, 2))
            return SimpleNamespace(loss=errors.mean(), per_sample=errors, noise_level=levels)

        return Batch(loss, place)  # type: ignore[arg-type]

    return CheckTask(model, batch, batch_size)


def test_measure_finds_no_conflict_where_one_update_serves_all_levels() -> None:
    found = measure(task(torch.ones_like), SETTINGS, progress=False)
    assert found.before.lost_share == pytest.approx(0, abs=0.05)
    assert found.conflict_ratio < 0.01
    assert judge(found).answer == UNLIKELY
    assert found.r_squared["0"] == pytest.approx(0, abs=0.1)


def test_measure_finds_the_conflict_where_the_update_turns_round_with_the_level() -> None:
    """f(λ) = 1 − 2λ: a static update can do nothing, and a gradient's energy is the same before and after."""
    found = measure(task(lambda levels: 1 - 2 * levels), SETTINGS, progress=False)
    assert found.before.lost_share == pytest.approx(1, abs=0.05)
    assert found.conflict_ratio == pytest.approx(1, abs=0.15)
    assert found.after.cosines[0][4] == pytest.approx(-1, abs=0.05)
    assert judge(found).answer == LIKELY


def test_measure_reads_the_level_where_an_input_holds_it() -> None:
    found = measure(task(torch.ones_like, tells_noise=True), SETTINGS, progress=False)
    assert found.r_squared["0"] > 0.99


def test_measure_gives_the_same_numbers_again() -> None:
    first, again = (measure(task(lambda levels: levels), SETTINGS, progress=False) for _ in range(2))
    assert torch.equal(first.after.products, again.after.products)
    assert first.r_squared == again.r_squared


def test_measure_without_a_layer_that_has_matrices_is_refused() -> None:
    empty = CheckTask(nn.Linear(2, 2), lambda positions: pytest.fail("nothing to measure"), 4)
    with pytest.raises(ValueError, match="no linear layer and no convolution"):
        measure(empty, SETTINGS, progress=False)


def test_measure_of_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="no longer a finite number: lower the learning rate"):
        measure(task(lambda levels: levels / 0), SETTINGS, progress=False)
