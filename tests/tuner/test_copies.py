"""Copies of adapted models, by deepcopy and by pickle, work and are independent."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, adapted, disturb
from tests.helpers.files.saved_adapters import LEVELS, TARGETS, base_model, output


def through_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "PeftModel"])
def test_a_copy_works_and_is_independent(copy_of, wrapped):
    model: nn.Module = adapted(base_model(), target_modules=TARGETS)
    if not wrapped:
        model = model.base_model.model  # type: ignore[union-attr, assignment]
    x = torch.randn(3, 7)
    expected = output(model, x)
    clone = copy_of(model)
    assert torch.equal(output(clone, x), expected)
    disturb(clone, seed=9)
    changed = output(clone, x)
    assert not torch.equal(changed, expected)
    assert torch.equal(output(model, x), expected)
    with noise_level(model, LEVELS):
        with pytest.raises(ValueError, match="λ is not known"):
            clone(x)  # the level of the original is not that of the copy
        with noise_level(clone, LEVELS.flip(0)):
            assert torch.equal(model(x), expected)
    output_of_clone = output(clone, x)
    del model
    assert torch.equal(output(clone, x), output_of_clone)


def test_a_copy_made_while_a_level_is_set_does_not_have_it():
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"])
    with noise_level(model, 0.4):
        clone = copy.deepcopy(model)
        with pytest.raises(ValueError, match="λ is not known"):
            clone(torch.randn(2, 7))
