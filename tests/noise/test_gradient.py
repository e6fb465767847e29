"""λ that requires a gradient: C(λ) and the output are differentiated by it, as any input is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from torch import Tensor

from nara_diffusion import TimestepNoise, noise_level, set_noise_source
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import TwoLayers, adapted
from tests.helpers.layers.recomputation import at
from tests.helpers.two_layers import LEVELS, TARGETS, expect


@pytest.fixture
def model() -> PeftModel:
    return adapted(TwoLayers(), target_modules=TARGETS)


def loss_at(model: PeftModel, x: Tensor, level: Tensor) -> Tensor:
    with noise_level(model, level):
        return model(x).square().sum()


def slope_by_hand(model: PeftModel, x: Tensor, levels: Tensor) -> Tensor:
    """d loss / d λ in float64, of each sample."""
    levels = levels.double().requires_grad_()
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    model.state_dict = lambda: state  # type: ignore[method-assign]
    try:
        return torch.autograd.grad(expect(model, x, levels).square().sum(), levels)[0]
    finally:
        del model.state_dict


@pytest.mark.parametrize("form", ["per sample", "shared", "0-d", "list"])
def test_level_that_requires_a_gradient_gets_that_of_the_formula(model: PeftModel, form: str) -> None:
    x = torch.randn(3, 7)
    levels = LEVELS if form == "per sample" else torch.full((3,), 0.4)
    expected = slope_by_hand(model, x, levels)
    leaf = {"per sample": levels, "shared": levels[:1], "0-d": levels[0], "list": levels}[form].clone().requires_grad_()
    loss_at(model, x, list(leaf.unbind()) if form == "list" else leaf).backward()  # type: ignore[arg-type]
    assert leaf.grad is not None
    actual = leaf.grad if len(leaf.shape) and len(leaf) == 3 else leaf.grad.reshape(1)
    torch.testing.assert_close(
        actual.double(), expected if len(actual) == 3 else expected.sum(0, keepdim=True), rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # torch's own forward-mode differentiation
def test_transforms_of_torch_func_differentiate_by_the_level(model: PeftModel) -> None:
    x = torch.randn(3, 7)
    expected = slope_by_hand(model, x, LEVELS)

    def loss(level: Tensor) -> Tensor:
        return loss_at(model, x, level)

    model.requires_grad_(False)
    tangent = torch.tensor([1.0, -2.0, 0.5])
    gradient = torch.func.grad(loss)(LEVELS)
    _, slope = torch.func.jvp(loss, (LEVELS,), (tangent,))
    found = {
        "grad": gradient,
        "jacrev": torch.func.jacrev(loss)(LEVELS),
        "jacfwd": torch.func.jacfwd(loss)(LEVELS),
    }
    for name, actual in found.items():
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(slope.double(), expected @ tangent.double(), rtol=1e-4, atol=1e-5)


def test_vmap_over_levels_gives_each_its_own_output(model: PeftModel) -> None:
    x = torch.randn(3, 7)
    model.requires_grad_(False)
    losses = torch.func.vmap(lambda level: loss_at(model, x, level))(LEVELS)
    for level, actual in zip(LEVELS, losses, strict=True):
        torch.testing.assert_close(actual, loss_at(model, x, level))
    with pytest.raises(ValueError, match=r"noise_level is \[.*1.5.*\[0, 1\]"):
        torch.func.vmap(lambda level: loss_at(model, x, level))(LEVELS + 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_of_the_level_through_checkpointed_blocks(reentrant: bool, tiny_llama) -> None:
    model = adapted(tiny_llama, target_modules=["q_proj", "down_proj"]).train()
    ids = torch.randint(0, 49, (3, 8), generator=torch.Generator().manual_seed(1))

    def slopes() -> Tensor:
        leaf = LEVELS.clone().requires_grad_()
        at(model, leaf, lambda model: model(ids).logits.square().mean())().backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = slopes()
    enable = getattr(tiny_llama, "activation_checkpointing_enable", tiny_llama.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    assert expected.abs().max() > 0
    torch.testing.assert_close(slopes(), expected, rtol=1e-4, atol=1e-7)


def test_gradient_of_a_timestep_reaches_the_core() -> None:
    """Also where all samples have the same timestep, of which each gets its own gradient."""
    unet = UNet2DConditionModel(
        block_out_channels=(8,), layers_per_block=1, sample_size=4, norm_num_groups=4, cross_attention_dim=6,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    model = adapted(unet, target_modules=["to_q", "to_v"])
    sample, text = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 6)

    def loss(timestep: Tensor) -> Tensor:
        output = model(sample, timestep, text).sample
        return (output.square().sum((1, 2, 3)) * torch.tensor([1.0, 3.0])).sum()

    for values in ([400.25, 400.25], [100.5, 700.25]):
        leaf = torch.tensor(values, requires_grad=True)
        loss(leaf).backward()
        assert leaf.grad is not None
        with_core = leaf.grad
        step = 0.25
        for index in range(2):
            moved = [torch.tensor(values), torch.tensor(values)]
            moved[0][index] -= step
            moved[1][index] += step
            with torch.no_grad():
                slope = (loss(moved[1]) - loss(moved[0])) / (2 * step)
            torch.testing.assert_close(with_core[index], slope, rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(torch.func.grad(loss)(torch.tensor(values)), with_core, rtol=1e-4, atol=1e-6)


def test_source_of_one_s_own_may_have_a_gradient(model: PeftModel) -> None:
    x = torch.randn(3, 7)
    leaf = (1000 * LEVELS).requires_grad_()
    source = TimestepNoise()

    class Told:
        convention = source.convention

        def __call__(self, module: Any, args: Any, kwargs: Any) -> NoiseSignals:
            return NoiseSignals(source.noise_level(leaf))

    set_noise_source(model, Told())
    model(x).square().sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double() * 1000, slope_by_hand(model, x, LEVELS), rtol=1e-4, atol=1e-5)
