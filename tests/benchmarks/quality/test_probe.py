"""Whether a layer's input tells λ: against data of which it is known."""

from __future__ import annotations

import pytest
import torch
from quality.probe import RIDGE, Forward, _ridge, probe, r_squared, token_at, tokens_of
from torch import nn


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


def test_ridge_equals_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(30, 6, generator=generator).double(), torch.randn(30, generator=generator).double()
    expected = torch.linalg.solve(x.T @ x + 30 * RIDGE * torch.eye(6), x.T @ y)
    torch.testing.assert_close(_ridge(x, y), expected)


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
