"""Gradient checkpointing in Diffusers' denoisers that are told λ by their timestep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.adapted_denoisers import WARNINGS_OF_DIFFUSERS, adapted_denoiser
from tests.helpers.denoiser_models import inputs_of, tensor_of

pytestmark = WARNINGS_OF_DIFFUSERS


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("UNetMotionModel", ([100, 300], [900, 700])),
        ("SD3Transformer2DModel", ([100.0, 300.0], [900.0, 700.0])),
        ("FluxTransformer2DModel", ([0.1, 0.3], [0.9, 0.7])),
    ],
)
def test_two_forwards_before_one_backward_have_the_gradients_of_no_checkpointing(name, timesteps, reentrant):
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = adapted_denoiser(name).train()
        if checkpointing:
            function = torch.utils.checkpoint.checkpoint
            model.enable_gradient_checkpointing(lambda *args: function(*args, use_reentrant=reentrant))
        inputs = inputs_of(name)
        first = "sample" if "sample" in inputs else "hidden_states"
        inputs[first].requires_grad_()  # as reentrant checkpointing needs
        losses = [tensor_of(model(**inputs, timestep=torch.tensor(t))).square().mean() for t in timesteps]
        sum(losses[1:], losses[0]).backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert any("nara_core" in key for key in expected)
    assert expected.keys() == actual.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=key)
