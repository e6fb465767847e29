"""Gradient checkpointing in Diffusers' denoisers that are told λ by their timestep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.denoisers.adapted import WARNINGS_OF_DIFFUSERS, adapted_denoiser
from tests.helpers.denoisers.levels import ARGUMENTS, EXPECTED, ONE_LEVEL
from tests.helpers.denoisers.models import class_of, inputs_of, tensor_of, timestep_for

pytestmark = WARNINGS_OF_DIFFUSERS

CHECKPOINTED = [name for name in EXPECTED if class_of(name)._supports_gradient_checkpointing]
FIRST_INPUTS = ("sample", "hidden_states", "x", "bb_ca")
NOT_BACKWARDS = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel", "WanAnimate2Transformer3DModel")
"""PyTorch's flex attention has no backward on a CPU."""


def gradients(name: str, timesteps: list[list[float]], reentrant: bool | None) -> dict[str, Tensor]:
    """Of two forwards before one backward; `reentrant` None runs without checkpointing."""
    model = adapted_denoiser(name).train()
    if reentrant is not None:
        function = torch.utils.checkpoint.checkpoint
        model.enable_gradient_checkpointing(
            lambda *args, **options: function(*args, use_reentrant=reentrant, **options)
        )
    inputs, argument = inputs_of(name), ARGUMENTS.get(name, "timestep")
    if reentrant:  # which needs an input with a gradient
        inputs[next(key for key in FIRST_INPUTS if key in inputs)].requires_grad_()
    told = [timestep_for(model, torch.tensor(t)) for t in timesteps]
    losses = []
    for timestep in told:
        torch.manual_seed(7)  # dropout
        losses.append(tensor_of(model(**inputs, **{argument: timestep})).square().mean())
    sum(losses[1:], losses[0]).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_same(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    assert any("nara_core" in key for key in expected)
    assert expected.keys() == actual.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=key)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("UNetMotionModel", [[100, 300], [900, 700]]),
        ("SD3Transformer2DModel", [[100.0, 300.0], [900.0, 700.0]]),
        ("FluxTransformer2DModel", [[0.1, 0.3], [0.9, 0.7]]),
    ],
)
def test_two_forwards_before_one_backward_have_the_gradients_of_no_checkpointing(name, timesteps, reentrant):
    assert_same(gradients(name, timesteps, None), gradients(name, timesteps, reentrant))


@pytest.mark.parametrize("name", [name for name in CHECKPOINTED if name not in NOT_BACKWARDS])
def test_each_class_has_the_gradients_of_no_checkpointing(name):
    first, second = list(EXPECTED[name])[1:3]
    batch = 1 if name.startswith("MiniMaxH3") else 2
    unequal = [[float(first), float(second)], [float(second), float(first)]]
    equal = [[float(first)] * batch, [float(second)] * batch]
    timesteps = equal if name in ONE_LEVEL else unequal
    assert_same(gradients(name, timesteps, None), gradients(name, timesteps, False))
