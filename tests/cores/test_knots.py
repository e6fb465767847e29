"""The interpolated core: between knots and at them, where its gradient goes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from nara_diffusion import core_matrix, noise_level
from nara_diffusion.cores.knots import KnotsCore
from tests.helpers.adapted import TwoLayers, disturb, nara_config, relative_error


def test_c_is_linear_between_two_knots_and_exact_at_each() -> None:
    torch.manual_seed(0)
    core = KnotsCore(3, 4, scale=0.7)
    torch.nn.init.normal_(core.deviation)
    deviation = core.deviation.detach().double()
    knots = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0])
    at_knots = torch.eye(3, dtype=torch.float64) + 0.7 * deviation
    torch.testing.assert_close(core(knots).double(), at_knots, rtol=0, atol=2e-6)
    between = core(torch.tensor([0.1, 0.5, 0.9])).double()
    by_hand = [
        0.7 * at_knots[0] + 0.3 * at_knots[1],
        (at_knots[1] + at_knots[2]) / 2,
        0.3 * at_knots[2] + 0.7 * at_knots[3],
    ]
    assert relative_error(between, torch.stack(by_hand)) < 1e-6


def test_it_starts_as_the_identity_at_every_noise_level() -> None:
    assert torch.equal(KnotsCore(5, 3, scale=1.0)(torch.linspace(0, 1, 7)), torch.eye(5).expand(7, 5, 5))


def test_a_noise_level_trains_the_two_knots_beside_it_alone() -> None:
    core = KnotsCore(2, 5, scale=1.0)
    core(torch.tensor([0.6])).square().sum().backward()
    gradient = core.deviation.grad
    assert gradient is not None
    assert gradient.flatten(1).abs().sum(1).ne(0).tolist() == [False, False, True, True, False]


def test_each_layer_has_knots_of_its_own_with_sharing_by_layer() -> None:
    model = get_peft_model(
        TwoLayers(),
        nara_config(target_modules=["first", "second"], core_type="knots", core_knots=3, core_sharing="layer"),
    )
    disturb(model)
    level = torch.tensor([0.2, 0.8])
    first, second = (core_matrix(model, level, module=f"base_model.model.{name}") for name in ("first", "second"))
    assert (first - second).abs().amax() > 1e-2
    assert (first[0] - first[1]).abs().amax() > 1e-2
    with noise_level(model, 0.3):
        low = model(torch.ones(1, 2, 7))
    with noise_level(model, 0.9):
        assert not torch.equal(low, model(torch.ones(1, 2, 7)))


@pytest.mark.parametrize(
    ("knots", "message"), [(1, "2 or more"), (0, "pass a positive integer"), (2.5, "pass a positive")]
)
def test_fewer_than_two_knots_are_refused(knots: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nara_config(core_type="knots", core_knots=knots)
