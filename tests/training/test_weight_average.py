"""The average of the weights by its formula in float64, and that it never touches what is trained."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nara_diffusion.training.weight_average import AVERAGE, WeightAverage


def model_of(seed: int, rows: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, rows), nn.Linear(rows, 2))
    model[0].bias.requires_grad_(False)
    return model


def move(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Other weights; a copy of those that are trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    return weights_of(model)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_average_is_that_of_the_formula(decay: float) -> None:
    model = model_of(0)
    average = WeightAverage(model, decay)
    expected = {name: torch.zeros_like(value).double() for name, value in weights_of(model).items()}
    for n in range(1, 31):
        now = move(model, n)
        average.update()
        d = 0.0 if n == 1 else min(decay, n / (n + 9))
        expected = {name: d * value + (1 - d) * now[name].double() for name, value in expected.items()}
    with average.applied():
        for name, value in weights_of(model).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_applied_gives_back_the_own_weights_after_an_error_too() -> None:
    model = model_of(0)
    average = WeightAverage(model, 0.5)
    for n in range(3):
        own = move(model, n)
        average.update()
    frozen = model[0].bias.clone()

    def look() -> None:
        with average.applied():
            assert all((value != own[name]).any() for name, value in weights_of(model).items())
            assert torch.equal(model[0].bias, frozen)
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert all(torch.equal(value, own[name]) for name, value in weights_of(model).items())


def test_average_goes_on_from_a_file_with_the_same_bits(tmp_path: Path) -> None:
    def go(model: nn.Module, average: WeightAverage, steps: range) -> None:
        for n in steps:
            move(model, n)
            average.update()

    whole = model_of(0)
    average = WeightAverage(whole, 0.3)
    go(whole, average, range(3))
    average.save(tmp_path)
    resumed = model_of(0)
    resumed.load_state_dict(whole.state_dict())
    other = WeightAverage(resumed, 0.3)
    other.load(tmp_path)
    go(whole, average, range(3, 6))
    go(resumed, other, range(3, 6))
    with average.applied(), other.applied():
        assert all(torch.equal(value, weights_of(resumed)[name]) for name, value in weights_of(whole).items())


def test_files_of_another_run_are_refused(tmp_path: Path) -> None:
    average = WeightAverage(model_of(0), 0.5)
    with pytest.raises(ValueError, match=f"has no {AVERAGE}, in which a run with use_ema keeps"):
        average.load(tmp_path)
    average.save(tmp_path)
    with pytest.raises(ValueError, match="holds the average of 3 tensors, which aren't the 3 trained ones"):
        WeightAverage(model_of(0, rows=6), 0.5).load(tmp_path)
    fewer = model_of(0)
    fewer[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="holds the average of 3 tensors, which aren't the 2 trained ones"):
        WeightAverage(fewer, 0.5).load(tmp_path)
