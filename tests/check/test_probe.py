"""Whether a layer's input tells λ: against data of which it is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nara_diffusion.check.probe import Forward, _ridge, probe, r_squared, token_at, tokens_of


def test_what_is_linear_in_the_level_is_found_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.rand(900, generator=generator)
    noise = torch.randn(900, 5, generator=generator)
    seen = noise.clone()
    seen[:, 3] = 7 * levels - 2
    assert r_squared(seen, levels) > 0.999
    assert r_squared(noise, levels) < 0.02


def test_half_of_the_variance_gives_half_an_r_squared() -> None:
    generator = torch.Generator().manual_seed(1)
    known, hidden = torch.randn(2, 20000, generator=generator)
    assert r_squared(known[:, None], known + hidden) == pytest.approx(0.5, abs=0.03)


def test_r_squared_of_few_samples_with_many_features_chooses_a_penalty_that_overfits_less() -> None:
    generator = torch.Generator().manual_seed(3)
    noise, levels = torch.randn(300, 150, generator=generator), torch.rand(300, generator=generator)
    assert r_squared(noise, levels) < -0.3
    assert r_squared(noise, levels, (1e-2, 1.0, 10.0)) == pytest.approx(0, abs=0.06)
    wide = torch.cat([noise, noise.flip(0), 3 * levels[:, None].repeat(1, 40)], 1)  # more features than samples
    assert r_squared(wide, levels, (1e-2, 1.0, 10.0)) > 0.9


def test_r_squared_equals_the_normal_equations_and_leaves_one_out() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(30, 6, generator=generator).double(), torch.randn(30, generator=generator).double()
    x, y = x - x.mean(0), y - y.mean()
    choices = []
    for penalty in (0.02, 0.3, 4.0):
        errors = []
        for i in range(len(x)):
            others = torch.arange(len(x)) != i
            mean_x, mean_y = x[others].mean(0), y[others].mean()
            centred = x[others] - mean_x
            weights = torch.linalg.solve(
                centred.T @ centred + 30 * penalty * torch.eye(6), centred.T @ (y[others] - mean_y)
            )
            errors.append((y[i] - mean_y - (x[i] - mean_x) @ weights).square().item())
        choices.append((sum(errors), penalty))
    best = min(choices)[1]
    expected = torch.linalg.solve(x.T @ x + 30 * best * torch.eye(6), x.T @ y)
    torch.testing.assert_close(_ridge(x, y, (0.02, 0.3, 4.0)), expected)


def test_probe_leaves_out_samples_without_a_place() -> None:
    layer = nn.Linear(1, 1)
    levels = torch.rand(60, generator=torch.Generator().manual_seed(5))
    x = torch.stack([levels, torch.full((60,), 1e6)], 1)[..., None]  # (b, 2, 1)
    place = torch.where(torch.arange(60) % 7 == 0, -1.0, 0.2)
    x[place < 0, 0] = 1e6

    def run() -> torch.Tensor:
        layer(x)
        return levels

    assert probe({"layer": layer}, [Forward(run, place)])["layer"] > 0.99


def test_a_constant_input_tells_nothing_and_breaks_nothing() -> None:
    assert r_squared(torch.ones(60, 2), torch.linspace(0, 1, 60)) == pytest.approx(0, abs=0.05)


def test_the_token_is_that_at_its_place() -> None:
    x = torch.arange(2 * 4 * 3).view(2, 4, 3)
    assert torch.equal(token_at(x, torch.tensor([0.0, 0.99])), torch.stack([x[0, 0], x[1, 3]]))


def test_each_layer_is_judged_by_what_it_was_given() -> None:
    """The first layer sees λ in its second token alone; the second layer sees only zeros."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    generator = torch.Generator().manual_seed(2)

    def forward(place: float) -> Forward:
        levels = torch.rand(60, generator=generator)
        x = torch.zeros(60, 2, 2)
        x[:, 1, 0] = levels

        def run() -> torch.Tensor:
            first(x)
            second(torch.zeros_like(x))
            return levels

        return Forward(run, torch.full((60,), place))

    layers = {"first": first, "second": second}
    found = probe(layers, [forward(0.6), forward(0.9)])
    assert found["first"] > 0.99
    assert found["second"] == pytest.approx(0, abs=0.1)
    assert probe(layers, [forward(0.1)] * 2)["first"] == pytest.approx(0, abs=0.1)
    assert not first._forward_pre_hooks


def test_tokens_of_a_convolution_are_its_pixels() -> None:
    x = torch.arange(2 * 3 * 2 * 5.0).view(2, 3, 2, 5)
    tokens = tokens_of(nn.Conv2d(3, 4, 1), x)  # (b, h w, c)
    assert torch.equal(tokens[1, 7], x[1, :, 1, 2])
    assert torch.equal(tokens_of(nn.Linear(3, 4), x[:, :, 0, 0]), x[:, None, :, 0, 0])
