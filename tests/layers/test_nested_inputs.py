"""Jagged nested tensors as inputs of adapted layers: what each sample gives alone, with one λ and with one each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, adapted
from tests.helpers.layers.beside_lora import TARGETS, beside_lora

LENGTHS = (3, 5, 1)
LEVELS = torch.tensor([0.05, 0.5, 0.93])
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
dora = pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])


def jagged(samples: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(samples, layout=torch.jagged)


def draw(*width: int) -> list[Tensor]:
    return [torch.randn(length, *width) for length in LENGTHS]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def one_by_one(model: Any, samples: list[Tensor], levels: Tensor) -> list[Tensor]:
    outputs = []
    for sample, level in zip(samples, levels, strict=True):
        with noise_level(model, level):
            outputs.append(model(sample[None])[0])
    return outputs


@pytest.mark.parametrize("level", [torch.tensor(0.3), LEVELS], ids=["one λ", "a λ each"])
@pytest.mark.parametrize("width", [(7,), (2, 7)], ids=["tokens", "heads"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@dora
def test_a_jagged_batch_gives_what_each_sample_gives_alone(level, width, dropout, use_dora):
    model = adapted(TwoLayers(), target_modules=TARGETS, use_dora=use_dora, lora_dropout=dropout)
    samples = draw(*width)
    expected = one_by_one(model, samples, level.expand(3))
    torch.cat([output.flatten() for output in expected]).square().sum().backward()
    of_samples = gradients(model)
    with noise_level(model, level):
        output = model(jagged(samples))
    output.values().square().sum().backward()
    for one, other in zip(output.unbind(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    of_batch = gradients(model)
    assert of_batch.keys() == of_samples.keys()
    for name, gradient in of_samples.items():
        assert gradient.count_nonzero()
        torch.testing.assert_close(of_batch[name], gradient, rtol=1e-4, atol=1e-4)


@dora
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training with dropout"])
def test_a_jagged_batch_at_the_identity_core_gives_what_pefts_lora_gives(training, use_dora):
    theirs, ours = beside_lora(TwoLayers, use_dora=use_dora, lora_dropout=0.4)
    samples, outputs = draw(7), []
    for model in (theirs.train(training), ours.train(training)):
        torch.manual_seed(3)
        with noise_level(ours, LEVELS):
            outputs.append(model(jagged(samples)).values())
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [torch.tensor(0.3), LEVELS], ids=["one λ", "a λ each"])
def test_a_jagged_batch_of_ids_gives_what_each_sample_gives_alone(level):
    model = adapted(OneLayer(nn.Embedding(13, 5)), target_modules=["layer"])
    samples = [torch.randint(13, (length,)) for length in LENGTHS]
    with noise_level(model, level):
        output = model(jagged(samples))
    expected = one_by_one(model, samples, level.expand(3))
    for one, other in zip(output.unbind(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_jagged_batch_of_another_size_than_the_levels_is_refused():
    model = adapted(TwoLayers(), target_modules=TARGETS)
    with noise_level(model, torch.tensor([0.1, 0.9])), pytest.raises(ValueError, match="noise_level has 2 values, but"):
        model(jagged(draw(7)))


@dora
def test_nested_tensors_of_the_strided_layout_are_refused_by_name(use_dora):
    model = adapted(TwoLayers(), target_modules=TARGETS, use_dora=use_dora)
    with noise_level(model, LEVELS), pytest.raises(ValueError, match=r"nested tensor .*layout=torch\.jagged"):
        model(torch.nested.nested_tensor(draw(7)))
