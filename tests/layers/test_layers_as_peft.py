"""With C = I, outputs and gradients are those of PEFT's own LoRA and DoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, disturb, lora_config, nara_config
from tests.helpers.layers.formulas import CONVOLUTIONS, LEVELS, LINEARS, conv1d_of_transformers


def identical_pair(make: Any, **options: Any) -> tuple[Any, Any]:
    """PEFT's adapter and NaRA's at C = I (a zero last layer, but a disturbed rest), with equal weights."""
    torch.manual_seed(3)
    base = make()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    theirs = get_peft_model(OneLayer(base), lora_config(target_modules=["layer"], **options))
    other = make()
    other.load_state_dict(state)
    ours = get_peft_model(OneLayer(other), nara_config(target_modules=["layer"], **options))
    disturb(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return theirs, ours


PARITY = {
    **{name: (make, (3, 6, 7)) for name, make in LINEARS.items()},
    **CONVOLUTIONS,
}

PARITY_CASES = [
    pytest.param(make, shape, use_dora, dropout, lora_bias, id=f"{name}-{use_dora=}-{dropout=}-{lora_bias=}")
    for name, (make, shape) in PARITY.items()
    for use_dora in (False, True)
    for dropout in (0.0, 0.4)
    for lora_bias in (False, True)
    if not lora_bias or not (use_dora or make().bias is None)  # PEFT has no such adapters
]


@pytest.mark.parametrize(("make", "shape", "use_dora", "dropout", "lora_bias"), PARITY_CASES)
def test_with_the_identity_core_outputs_and_gradients_are_those_of_peft(make, shape, use_dora, dropout, lora_bias):
    options = {"use_dora": use_dora, "lora_dropout": dropout, "lora_bias": lora_bias}
    options["fan_in_fan_out"] = make is conv1d_of_transformers
    theirs, ours = identical_pair(make, **options)
    x = torch.randn(shape)
    results = []
    for model in (theirs, ours):
        model.train()
        model.base_model.model.layer.get_base_layer().requires_grad_(True)
        inputs = x.clone().requires_grad_(True)
        torch.manual_seed(11)
        if model is ours:
            with noise_level(model, LEVELS):
                output = model(inputs)
        else:
            output = model(inputs)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if "nara_core" not in n}
        assert all(gradient is not None for gradient in gradients.values()), gradients.keys()
        results.append((output, inputs.grad, gradients))
    (their_output, their_inputs, their_gradients), (our_output, our_inputs, our_gradients) = results
    assert their_gradients.keys() == our_gradients.keys()
    torch.testing.assert_close(our_output, their_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_inputs, their_inputs, rtol=1e-5, atol=1e-5)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(
            our_gradients[name], gradient, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_with_the_identity_core_an_embedding_is_that_of_peft():
    theirs, ours = identical_pair(lambda: nn.Embedding(13, 5))
    ids = torch.randint(13, (3, 6))
    with noise_level(ours, LEVELS):
        torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-5, atol=1e-6)


class ScaledEmbedding(nn.Embedding):
    """As Gemma 3 has it: what is looked up is multiplied by a constant."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def test_with_the_identity_core_a_scaled_and_padded_embedding_is_that_of_peft():
    theirs, ours = identical_pair(lambda: ScaledEmbedding(13, 5, padding_idx=2))
    ids = torch.randint(13, (3, 6))
    results = []
    for model in (theirs, ours):
        if model is ours:
            with noise_level(model, LEVELS):
                output = model(ids)
        else:
            output = model(ids)
        output.square().sum().backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters() if "lora_" in n}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_with_the_identity_core_adapters_with_and_without_dora_combine_as_in_peft(dora, dropout):
    results, x = [], torch.randn(3, 4, 7)
    for config in (lora_config, nara_config):
        torch.manual_seed(3)
        model = get_peft_model(TwoLayers(), config(target_modules=["first"], use_dora=dora[0], lora_dropout=dropout))
        model.add_adapter("other", config(target_modules=["first"], r=2, use_dora=dora[1], lora_dropout=dropout))
        model.base_model.set_adapter(["default", "other"])
        core = {n: p.clone() for n, p in model.named_parameters() if "nara_core" in n}
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.copy_(torch.randn(p.shape, generator=generator).abs() * 0.5)
        torch.manual_seed(8)
        if core:
            with noise_level(model, LEVELS):
                output = model.train()(x)
        else:
            output = model.train()(x)
        output.square().sum().backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters() if "lora_" in n}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-4)
