"""T-LoRA with its published start: two products of singular vectors, one of them fixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, nara_config, relative_error

STARTS = pytest.mark.parametrize("start", ["residual", "residual_base"])
RANK = 3  # T-LoRA's
MASK = {"core_type": "rank_mask", "rank_mask_step": 2, "rank_mask_min": 2, "r": 2 * RANK}
LEVELS = torch.tensor([0.0, 0.3, 0.6, 0.999])


def residual(start: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = nara_config(target_modules=["first", "second"], lora_a_init=start, **MASK, **changes)
    return get_peft_model(TwoLayers(), config)


def factors(model: Any, name: str) -> tuple[Tensor, Tensor]:
    layer = getattr(model.base_model.model, name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


class Published(nn.Module):
    """T-LoRA on a linear layer, from its formula: α/k (P' diag(m) Q − P0' diag(m) Q0), P' = P diag(σ)."""

    def __init__(self, layer: nn.Linear, Q: Tensor, P: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), scale
        self.Q, self.P = nn.Parameter(Q.clone()), nn.Parameter(P.clone())
        self.Q0, self.P0 = Q.clone(), P.clone()

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        counts = [int((1 - level) * (RANK - 1)) + 1 for level in levels.tolist()]
        m = torch.stack([(torch.arange(RANK) < count).float() for count in counts])
        update = (x @ self.Q.T * m) @ self.P.T - (x @ self.Q0.T * m) @ self.P0.T
        return self.layer(x) + self.scale * update


@STARTS
def test_residual_start_is_base_with_orthogonal_directions(start: str) -> None:
    model, x = residual(start), torch.randn(4, 7)
    with model.disable_adapter():
        expected = model(x)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), expected) < 1e-6
    A, B = factors(model, "first")
    assert torch.equal(A[0::2], A[1::2])
    assert torch.equal(B[:, 0::2], -B[:, 1::2])
    torch.testing.assert_close(A[0::2] @ A[0::2].T, torch.eye(RANK), rtol=0, atol=1e-6)
    products = B[:, 0::2].T @ B[:, 0::2]
    torch.testing.assert_close(products, products.diag().diag(), rtol=0, atol=1e-5)
    assert products.diag().min() > 1e-6


def test_residual_base_start_is_weights_first_triples() -> None:
    model = residual("residual_base")
    A, B = factors(model, "second")
    W = model.base_model.model.second.get_base_layer().weight.double()
    values = torch.linalg.eigvalsh(W @ W.T).flip(0)[:RANK].sqrt()
    torch.testing.assert_close(B[:, 0::2].double().norm(dim=0), values, rtol=1e-5, atol=0)
    torch.testing.assert_close((W @ A[0::2].double().T).float(), B[:, 0::2], rtol=0, atol=1e-5)


def test_residual_base_of_narrow_layer_leaves_directions_zero() -> None:
    config = nara_config(target_modules=["layer"], lora_a_init="residual_base", **{**MASK, "r": 8})
    model: Any = get_peft_model(OneLayer(nn.Linear(7, 3)), config)
    layer = model.base_model.model.layer
    assert layer.lora_A["default"].weight[6:].count_nonzero() == 0
    assert layer.lora_A["default"].weight[:6].norm(dim=1).min() > 0.9


@STARTS
def test_residual_training_equals_formula_with_frozen_half(start: str) -> None:
    model = residual(start)
    models, inputs, targets = [], torch.randn(5, 4, 7), torch.randn(5, 4, 5)
    starts = {name: [t.clone() for t in factors(model, name)] for name in ("first", "second")}
    for name, (A, B) in starts.items():
        layer = getattr(model.base_model.model, name).get_base_layer()
        models.append(Published(layer, A[0::2], B[:, 0::2], 6 / (2 * RANK)))
    expected: Any = nn.ModuleList(models)
    optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (model, expected)]
    for x, target in zip(inputs, targets, strict=True):
        with noise_level(model, LEVELS):
            loss = (model(x) - target).square().mean()
        other = expected[1](torch.tanh(expected[0](x, LEVELS)), LEVELS)
        other = (other - target).square().mean()
        torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
        for value, optimizer in ((loss, optimizers[0]), (other, optimizers[1])):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for name, (A0, B0) in starts.items():
        A, B = factors(model, name)
        assert torch.equal(A[1::2], A0[1::2])
        assert torch.equal(B[:, 1::2], B0[:, 1::2])
        assert (A[0::2] - A0[0::2]).abs().max() > 0.01
    torch.testing.assert_close(factors(model, "second")[0][0::2], expected[1].Q, rtol=0, atol=1e-4)
    x = inputs[0]
    model.eval()
    with noise_level(model, LEVELS), torch.no_grad():
        output = model(x)
    assert relative_error(output, expected[1](torch.tanh(expected[0](x, LEVELS)), LEVELS)) < 1e-4


def test_residual_adapter_folds_and_merges_at_a_level() -> None:
    model, x = residual("residual"), torch.randn(4, 7)
    with torch.no_grad():
        factors(model, "first")[0][0::2] += 0.3
        factors(model, "second")[1][:, 0::2] *= 1.5
    model.eval()
    with noise_level(model, 0.6):
        expected = model(x)
    model.merge_adapter(noise_level=0.6)
    with noise_level(model, 0.6):
        assert relative_error(model(x), expected) < 1e-5


@STARTS
def test_residual_convolution_trains_even_directions_only(start: str) -> None:
    config = nara_config(target_modules=["layer"], lora_a_init=start, **MASK)
    model: Any = get_peft_model(OneLayer(nn.Conv2d(7, 5, (3, 1), padding=(1, 0))), config)
    x = torch.randn(4, 7, 3, 2)
    layer = model.base_model.model.layer
    with noise_level(model, LEVELS):
        output = model(x)
    assert relative_error(output, layer.get_base_layer()(x)) < 1e-6
    output.square().sum().backward()
    A, B = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
    assert A[1::2].count_nonzero() == B[:, 1::2].count_nonzero() == 0
    assert min(A[0::2].abs().amax((1, 2, 3)).min(), B[:, 0::2].abs().amax((0, 2, 3)).min()) > 0


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        (nn.Embedding(7, 5), {}, "'residual_base' are not for embeddings, such as 'layer'"),
        (nn.Linear(7, 5), {"use_dora": True}, "lora_a_init is 'residual', .*core_type='rank_mask'"),
        (nn.Linear(7, 5), {"rank_mask_step": 1}, "lora_a_init is 'residual', .*rank_mask_step=2"),
        (nn.Linear(7, 5), {"core_type": "bins", "core_bins": 2, "rank_mask_min": None}, "lora_a_init is 'residual'"),
    ],
)
def test_residual_of_unfit_layer_or_config_is_refused(layer: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(
            OneLayer(layer), nara_config(target_modules=["layer"], lora_a_init="residual", **{**MASK, **changes})
        )
