"""The diagonal core against its formula in float64, from a fresh adapter to trained weights."""

from __future__ import annotations

import math

import pytest
import torch

from nara_diffusion import core_matrix, noise_level
from nara_diffusion.cores.diagonal import DiagonalCore
from tests.helpers.adapted import TwoLayers, adapted, nara_config

LEVELS = torch.tensor([0.0, 0.0131, 0.5, 0.777, 1.0])


def test_gains_are_linear_in_the_sinusoid():
    core = DiagonalCore(3, 6)
    assert torch.equal(core(LEVELS), torch.eye(3).expand(5, 3, 3))
    torch.manual_seed(0)
    core.weight.data, core.bias.data = torch.randn(3, 6), torch.randn(3)
    for level, found in zip(LEVELS.tolist(), core(LEVELS).double(), strict=True):
        omega = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
        t = 1000 * level
        e = torch.tensor([*(math.cos(t * w) for w in omega), *(math.sin(t * w) for w in omega)], dtype=torch.float64)
        expected = torch.diag(core.weight.double() @ e + core.bias.double())
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)  # t is 1000 λ, rounded to float32


def test_it_trains_saves_and_loads_by_layer(tmp_path):
    from peft import PeftModel

    options = {"core_type": "diagonal", "core_sharing": "layer", "target_modules": ["first", "second"]}
    model = adapted(TwoLayers(), **options)
    x = torch.randn(5, 7)
    with noise_level(model, LEVELS):
        expected = model(x)
        expected.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "nara_core" in n)
    model.save_pretrained(tmp_path)
    base = TwoLayers()
    base.load_state_dict({k.replace("base_model.model.", "").replace(".base_layer", ""): t
                          for k, t in model.state_dict().items() if "lora" not in k and "nara" not in k})  # fmt: skip
    again = PeftModel.from_pretrained(base, str(tmp_path))
    with noise_level(again, LEVELS), torch.no_grad():
        torch.testing.assert_close(again(x), expected.detach())
    assert not torch.equal(core_matrix(again, 0.3, module="first"), core_matrix(again, 0.3, module="second"))


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="noise_embedding_dim is 5: Fourier features are"):
        nara_config(core_type="diagonal", noise_embedding_dim=5)
