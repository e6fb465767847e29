"""Gradients of each sample at B, against autograd on one sample after the other."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion.check.gradients import BinnedGradients


class Layers(nn.Module):
    """Tokens (b, l, 5) and vectors (b, 5) → linear layers; pictures (b, 3, h, w) → a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.vector = nn.Linear(5, 4), nn.Linear(5, 7)
        self.picture = nn.Conv2d(3, 6, 3, stride=2, padding=1)

    def forward(self, tokens: Tensor, picture: Tensor) -> Tensor:
        """Losses (b,) that mix all three."""
        first = self.tokens(tokens).tanh().square().mean((1, 2))
        second = self.picture(picture).tanh().mean((1, 2, 3))
        return first * self.vector(tokens[:, 0]).sin().sum(1) + second**2 * 3


def adapted() -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    model = Layers().requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["tokens", "vector", "picture"])
    inject_adapter_in_model(config, model)
    factors = {name: layer.lora_B["default"] for name, layer in model.named_children()}
    for factor in factors.values():
        nn.init.normal_(factor.weight)
    return model, factors


def test_binned_gradients_equal_autograd_of_one_sample_after_the_other() -> None:
    model, factors = adapted()
    tokens, picture = torch.randn(9, 3, 5), torch.randn(9, 3, 6, 8)
    levels = torch.tensor([0.1, 0.9, 0.2, 0.3, 1.0, 0.45, 0.0, 0.6, 0.7])
    gradients = BinnedGradients(factors, bins=2)
    with gradients.watching():
        for part in (slice(0, 4), slice(4, 9)):  # samples of a bin are spread over two forwards
            gradients.add(model(tokens[part], picture[part]), levels[part])
    halves = {(0, 0): [0, 3, 6], (0, 1): [2, 5], (1, 0): [1, 7], (1, 1): [4, 8]}
    assert gradients.counts.tolist() == [[3, 2], [2, 2]]
    for name, factor in factors.items():
        sums = torch.zeros(2, 2, factor.weight.numel(), dtype=torch.float64)
        for cell, samples in halves.items():
            for i in samples:
                loss = model(tokens[i : i + 1], picture[i : i + 1]).sum()
                sums[cell] += torch.autograd.grad(loss, factor.weight)[0].flatten().double()
        torch.testing.assert_close(
            gradients.grams()[name], torch.einsum("khp,ljp->khlj", sums, sums), rtol=1e-4, atol=1e-7
        )
        assert not factor._forward_hooks


def test_binned_gradients_at_the_start_are_those_at_the_weight_seen_through_a() -> None:
    """At B = 0: g = s G Aᵀ, with G the gradient at W itself."""
    model, factors = adapted()
    for factor in factors.values():
        nn.init.zeros_(factor.weight)
    layer = model.tokens
    layer.get_base_layer().weight.requires_grad_(True)
    tokens, picture = torch.randn(1, 3, 5), torch.randn(1, 3, 6, 8)
    gradients = BinnedGradients({"tokens": factors["tokens"]}, bins=1)
    with gradients.watching():
        losses = model(tokens, picture)
        (whole,) = torch.autograd.grad(losses.sum(), layer.get_base_layer().weight, retain_graph=True)
        gradients.add(losses, torch.tensor([0.5]))
    expected = 3 * whole @ layer.lora_A["default"].weight.T  # s = 6 / 2
    assert gradients.grams()["tokens"][0, 0, 0, 0].item() == pytest.approx(expected.square().sum().item(), rel=1e-4)


def test_binned_gradients_where_a_layer_mixes_samples_are_refused() -> None:
    model, factors = adapted()
    tokens = torch.randn(2, 3, 5)
    gradients = BinnedGradients({"vector": factors["vector"]}, bins=2)
    with gradients.watching():
        losses = model.vector(tokens.flatten(0, 1)).view(2, -1).sum(1)
        with pytest.raises(ValueError, match=r"vector gets 6 rows for 2 samples.*leave it out"):
            gradients.add(losses, torch.tensor([0.1, 0.9]))
