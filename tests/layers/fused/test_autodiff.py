"""Ways to differentiate other than `backward`, through an adapted model: with C = I, as through PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call

from nara_diffusion import noise_level
from nara_diffusion.noise.level import find_holders
from tests.helpers.adapted import TwoLayers
from tests.helpers.layers.beside_lora import assert_alike, beside_lora

pytestmark = [
    pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"]),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning"),  # torch.func asks for it
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching"),
]


def forward_mode(call: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
        assert tangent is not None
        return tangent.clone()


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Any]] = {
    "forward_ad": forward_mode,
    "torch.func.jvp": lambda call, x, direction: torch.func.jvp(call, (x,), (direction,))[1],
    "torch.func.vjp": lambda call, x, direction: torch.func.vjp(call, x)[1](call(x))[0],
    "torch.func.grad": lambda call, x, direction: torch.func.grad(lambda x: call(x).square().sum())(x),
    "torch.func.vmap": lambda call, x, direction: torch.func.vmap(call)(torch.stack([x, direction])),
    "torch.func.jacrev": lambda call, x, direction: torch.func.jacrev(call)(x),
    "torch.func.jacfwd": lambda call, x, direction: torch.func.jacfwd(call)(x),
    "torch.func.hessian": lambda call, x, direction: torch.func.hessian(lambda x: call(x).square().sum())(x),
    "functional.jvp": lambda call, x, direction: torch.autograd.functional.jvp(call, x, direction)[1],
    "functional.hvp": lambda call, x, v: torch.autograd.functional.hvp(lambda x: call(x).square().sum(), x, v)[1],
    "functional.jacobian": lambda call, x, direction: torch.autograd.functional.jacobian(call, x),
    "vectorized jacobian": lambda call, x, direction: torch.autograd.functional.jacobian(call, x, vectorize=True),
    "forward-mode jacobian": lambda call, x, direction: torch.autograd.functional.jacobian(
        call, x, vectorize=True, strategy="forward-mode"
    ),
    "vectorized hessian": lambda call, x, direction: torch.autograd.functional.hessian(
        lambda x: call(x).square().sum(), x, vectorize=True
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_else_differentiates_gives_what_it_gives_for_lora(way, use_dora):
    x, direction = torch.randn(2, 3, 4, 7)
    theirs, ours = beside_lora(TwoLayers, use_dora=use_dora)

    def call(x: Tensor) -> Tensor:
        with noise_level(ours, 0.4):
            return ours(x)

    assert_alike({"": way(theirs, x, direction).detach()}, {"": way(call, x, direction).detach()})


def test_per_sample_gradients_of_the_factors_are_those_of_lora(use_dora):
    x = torch.randn(3, 4, 7)

    def per_sample(model: Any) -> dict[str, Tensor]:
        factors = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}

        def loss(factors: dict[str, Tensor], sample: Tensor) -> Tensor:
            if not find_holders(model):
                return functional_call(model, factors, (sample[None],)).square().sum()
            with noise_level(model, 0.4):
                return functional_call(model, factors, (sample[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, x)

    theirs, ours = beside_lora(TwoLayers, use_dora=use_dora)
    assert_alike(per_sample(theirs), per_sample(ours))


def test_a_backward_pass_of_many_gradients_at_once_is_many_of_one(use_dora):
    _, model = beside_lora(TwoLayers, use_dora=use_dora)
    trainable = [p for p in model.parameters() if p.requires_grad and p.dim() > 0]
    with noise_level(model, torch.tensor([0.1, 0.5, 0.9])):
        y = model(torch.randn(3, 4, 7))
    of_y = torch.randn(2, *y.shape)
    at_once = torch.autograd.grad(y, trainable, of_y, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        alone = torch.autograd.grad(y, trainable, of_y[i], retain_graph=True)
        for one, other in zip(at_once, alone, strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-5, atol=1e-5)
