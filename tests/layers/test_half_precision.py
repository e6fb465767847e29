"""What linear layers in half precision promise of D = C − I.

D h is added to h in the dtype of the layer. The update is as exact as LoRA's, the effect of λ arrives, and the gradient
of D is made in float32.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig, StrengthSchedule, noise_level, set_strength
from nara_diffusion.layers.variants import CoreChannel
from nara_diffusion.noise.rows import ModelRows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "autocast": torch.bfloat16}
half = pytest.mark.parametrize("kind", DTYPES)


def half_precision_linear(config: LoraConfig, kind: str, A: Tensor, B: Tensor, D: Tensor) -> PeftModel:
    """A linear layer without W0 of one NaRA with two knots, D (2, r, r), at λ = 0 and 1; or of one LoRA."""
    base = nn.Linear(A.shape[1], B.shape[0], bias=False)
    nn.init.zeros_(base.weight)
    model = get_peft_model(nn.Sequential(base), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A.clone(), B.clone()
    for name, parameter in model.named_parameters():
        if "deviation" in name:
            parameter.data = D.clone()
    (layer.base_layer if kind == "autocast" else model).to(DTYPES[kind])
    return model


def output_of(model: PeftModel, kind: str, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        if isinstance(model.peft_config["default"], NaraConfig):
            with noise_level(model, torch.tensor([0.0, 1.0])):
                return model(x.to(DTYPES[kind]))
        return model(x.to(DTYPES[kind]))


def update_and_exact(kind: str, use_nara: bool, D: Tensor) -> tuple[Tensor, Tensor]:
    """The update of a half-precision layer at λ = 0 and 1, and the same in float64."""
    generator, r, s = torch.Generator().manual_seed(0), D.shape[-1], 1.5
    A, B, x = (torch.randn(shape, generator=generator).to(DTYPES[kind]) for shape in ((r, 96), (80, r), (2, 40, 96)))
    options: dict[str, Any] = {"r": r, "lora_alpha": r * s, "target_modules": ["0"]}
    core: dict[str, Any] = {"core_type": "knots", "core_knots": 2, "core_scale": 1.0}
    config = NaraConfig(**options, **core) if use_nara else LoraConfig(**options)
    model = half_precision_linear(config, kind, A.float(), B.float(), D)
    output = output_of(model, kind, x)
    C = torch.eye(r, dtype=torch.float64) + D.double()
    A, B, x = A.double(), B.double(), x.double()
    return output.detach().double(), s * torch.einsum("or,brq,qk,blk->blo", B, C, A, x)


def deviation_of_norm(norm: float) -> Tensor:
    D = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3))
    return norm * D / torch.linalg.matrix_norm(D, ord=2)[:, None, None]


@half
def test_half_precision_update_is_exact_and_shows_lambda(kind):
    zero = deviation_of_norm(0.0)
    of_lora, exact = update_and_exact(kind, use_nara=False, D=zero)
    bound = 1.25 * (of_lora - exact).norm() / exact.norm()
    without, exact_without = update_and_exact(kind, use_nara=True, D=zero)
    assert (without - exact).norm() / exact.norm() <= bound
    for norm in (1e-3, 1e-2, 0.05, 0.2, 1.0):
        output, exact = update_and_exact(kind, use_nara=True, D=deviation_of_norm(norm))
        assert (output - exact).norm() / exact.norm() <= bound, norm
        effect = exact - exact_without
        slope = ((output - without) * effect).sum() / effect.square().sum()
        assert norm < 0.05 or 0.95 <= slope <= 1.05, (norm, slope)


@half
def test_strength_removing_most_update_leaves_exact_rest(kind):
    """σ C − I is nearly −I there: rounded, it would be off by a tenth of the update that is left."""
    config = NaraConfig(r=16, lora_alpha=24, target_modules=["0"], core_type="knots", core_knots=2, core_scale=1.0)
    A, B, x = (torch.randn(shape).bfloat16().float() for shape in ((16, 96), (80, 16), (2, 40, 96)))
    model, outputs = half_precision_linear(config, kind, A, B, deviation_of_norm(0.2)), []
    for strength in (1.0, 0.02):
        set_strength(model, "default", StrengthSchedule([(0.0, strength), (1.0, strength)]))
        outputs.append(output_of(model, kind, x).double())
    assert (outputs[1] - 0.02 * outputs[0]).norm() < 0.01 * (0.02 * outputs[0]).norm()


@half
def test_gradient_of_the_deviation_is_summed_in_float32(kind):
    """All products are integers that half precision has, and the sums over 700 positions of two layers need more."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float()

    A, B, x = integers(3, 8), integers(5, 3), integers(2, 700, 8)
    config = NaraConfig(r=3, lora_alpha=3, target_modules=["0"], core_type="knots", core_knots=2, core_scale=1.0)
    model = half_precision_linear(config, kind, A, B, torch.zeros(2, 3, 3))
    output = output_of(model, kind, x)
    slope = integers(*output.shape)
    output.backward(slope.to(output.dtype))
    (D,) = (parameter for name, parameter in model.named_parameters() if "deviation" in name)
    assert D.grad is not None
    assert torch.equal(D.grad, torch.einsum("blo,or,qk,blk->brq", slope, B, A, x))


def test_operand_is_converted_once_per_dtype() -> None:
    holder = SimpleNamespace(schedules={})
    channel, key = CoreChannel(cast(Any, holder), ModelRows()), ("default", "shared")
    D = torch.randn(2, 3, 3)
    with channel.using({key: D}, None):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            operand = channel.operand(key, D, torch.empty(5, dtype=dtype))
            assert operand.dtype == dtype
            assert torch.equal(operand, D.to(dtype))
            assert channel.operand(key, D, torch.empty(7, dtype=dtype)) is operand
            of_lower_rank = channel.operand(key, D[:, :2, :2], torch.empty(5, dtype=dtype))
            assert torch.equal(of_lower_rank, D[:, :2, :2].to(dtype))
