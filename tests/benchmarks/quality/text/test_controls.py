"""What cores read under each control, seen where they read it."""

import copy

import pytest
import torch
from quality.text.controls import CONSTANT, check_control, exchanged_noise, while_evaluating, while_training
from quality.text.methods import adapted
from quality.text.recipe import Recipe
from quality.text.validation import CENTRES

from nara_diffusion import noise_level
from nara_diffusion.cores.hypernetwork import HypernetworkCore
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import disturb

LEVELS = torch.tensor([0.1, 0.35, 0.6, 0.85])


@pytest.fixture
def spied(task, monkeypatch):
    """A disturbed NaRA on the shipped model, and the λ that its core reads."""
    model = adapted(copy.deepcopy(task.model), "nara", Recipe.of(rank=2, core_scale=1.0))
    disturb(model)
    read, forward = [], HypernetworkCore.forward
    monkeypatch.setattr(
        HypernetworkCore, "forward", lambda core, level, *rest: (read.append(level), forward(core, level, *rest))[1]
    )
    return model, read


def logits(model):
    with noise_level(model, LEVELS), torch.no_grad():
        return model(torch.arange(24).view(4, 6)).logits


def test_constant_reads_one_level_in_training_and_in_evaluation(spied):
    model, read = spied
    for context in (while_training(model, "constant", 0), while_evaluating(model, "constant")):
        with context:
            logits(model)
        assert read.pop().tolist() == [CONSTANT] * 4


def test_shuffled_reads_another_samples_level_in_training_and_the_true_one_in_evaluation(spied):
    model, read = spied
    with while_training(model, "shuffled", 0):
        logits(model)
        logits(model)
    first, second = read
    for level in read:
        assert torch.equal(level.sort().values, LEVELS)
        assert (level != LEVELS).all()
    assert not torch.equal(first, second)
    read.clear()
    with while_evaluating(model, "shuffled"):
        logits(model)
    assert torch.equal(read[0], LEVELS)


def test_reversed_reads_one_minus_the_level(spied):
    model, read = spied
    with while_evaluating(model, "reversed"):
        logits(model)
    torch.testing.assert_close(read[0], 1 - LEVELS)


def test_mean_core_is_the_same_for_all_levels_and_none_of_theirs(spied):
    model, read = spied
    with while_evaluating(model, "mean_core"):
        mean = logits(model)
        with noise_level(model, 0.9), torch.no_grad():
            other = model(torch.arange(24).view(4, 6)).logits
    torch.testing.assert_close(mean, other)
    assert (mean - logits(model)).abs().max() > 1e-3
    assert read[0].tolist() == pytest.approx(CENTRES)


def test_mean_core_knows_densities_too(task):
    model = adapted(copy.deepcopy(task.model), "nara", Recipe.of(rank=2, core_input="both"))
    disturb(model)
    with while_evaluating(model, "mean_core"), noise_level(model, 0.3, mask_density=0.4), torch.no_grad():
        mean = model(torch.arange(6)[None]).logits
    with noise_level(model, 0.3, mask_density=0.4), torch.no_grad():
        assert (model(torch.arange(6)[None]).logits - mean).abs().max() > 1e-4


def test_exchange_moves_both_signals_of_a_sample_together():
    level, density = torch.arange(9.0) / 9, torch.arange(9.0) / 18
    found = exchanged_noise(torch.Generator().manual_seed(2))(NoiseSignals(level, density))
    assert (found.noise_level != level).all()
    assert torch.equal(found.mask_density, found.noise_level / 2)


def test_controls_are_of_methods_that_know_the_noise():
    check_control("nara_dora", "shuffled")
    check_control("lora", None)
    with pytest.raises(ValueError, match="control is 'mean_core', expected none or one of constant, shuffled"):
        check_control("nara", "mean_core")
    with pytest.raises(ValueError, match="method 'lora' knows no λ that control 'constant' could replace"):
        check_control("lora", "constant")
