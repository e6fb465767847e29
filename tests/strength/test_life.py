"""A strength goes with its adapter: switched, disabled, merged, mixed, copied, saved, deleted, taken away."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from nara_diffusion import core_matrix, set_noise_source, set_strength
from nara_diffusion.noise.ablations import changed_noise, constant_noise, mean_core
from nara_diffusion.noise.needs import is_noise_aware
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import TwoLayers, relative_error
from tests.strength.models import (
    BOTH,
    LEVELS,
    OTHER,
    SCHEDULE,
    at,
    by_numbers,
    model_of,
    set_number,
    strength_by_hand,
    trace,
    with_two,
)


@BOTH
@pytest.mark.parametrize("use_dora", [False, True])
def test_taking_a_strength_away_leaves_no_trace(kind, use_dora, x):
    model = model_of(kind, use_dora=use_dora)
    before = trace(model)
    expected = at(model, x) if kind == "NaRA" else model(x)
    for number in (None, 0.3):
        set_strength(model, "default", SCHEDULE)
        if number is not None:
            set_strength(model, "default", number)
        assert trace(model) != before or kind == "NaRA"
        at(model, x)
        set_strength(model, "default", None)
        assert trace(model) == before
        assert torch.equal(at(model, x) if kind == "NaRA" else model(x), expected)


@BOTH
def test_a_number_multiplies_a_schedule(kind, x):
    model = model_of(kind)
    set_strength(model, "default", SCHEDULE)
    for number in (0.37, 2.0, 1.0):
        set_strength(model, "default", number)
        expected = by_numbers(model, x, {"default": lambda level, by=number: by * SCHEDULE(level)})
        assert relative_error(at(model, x), expected) < 2e-6


@BOTH
def test_a_number_scales_the_update(kind, x):
    model = model_of(kind)
    set_strength(model, "default", 0.37)
    found = at(model, x) if kind == "NaRA" else model(x)
    clone = model_of(kind)
    for module in clone.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= 0.37
    assert torch.equal(found, at(clone, x) if kind == "NaRA" else clone(x))


@BOTH
def test_a_schedule_takes_the_place_of_a_number(kind, x):
    model = model_of(kind)
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x)
    set_strength(model, "default", 0.1)
    set_strength(model, "default", SCHEDULE)
    assert torch.equal(at(model, x), expected)


def test_without_a_level_the_error_says_how_to_tell_it(x):
    model = model_of("LoRA")
    assert not is_noise_aware(model)
    set_strength(model, "default", SCHEDULE)
    assert is_noise_aware(model)
    with pytest.raises(ValueError, match=r"λ is not known, but adapter\(s\) 'default' depend on it: call the model"):
        model(x)


def test_a_source_tells_the_level_of_a_lora_and_outlives_its_schedule(x):
    class Source:
        convention = "mine"

        def __call__(self, module: Any, args: Any, kwargs: Any) -> NoiseSignals:
            return NoiseSignals(LEVELS)

    model = model_of("LoRA")
    set_strength(model, "default", SCHEDULE)
    set_noise_source(model, Source())
    expected = at(model, x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        set_strength(model, "default", None)
        model(x)
        set_strength(model, "default", SCHEDULE)
        assert torch.equal(model(x), expected)


@BOTH
def test_each_of_several_adapters_has_its_strength(kind, x):
    model = with_two(kind)
    set_strength(model, "default", SCHEDULE)
    set_strength(model, "other", OTHER)
    for names in (["default"], ["other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        expected = by_numbers(model, x, {"default": SCHEDULE, "other": OTHER})
        assert relative_error(at(model, x), expected) < 2e-6
    set_number(model, "other", 0.8)
    assert (
        relative_error(at(model, x), by_numbers(model, x, {"default": SCHEDULE, "other": lambda _: torch.tensor(0.8)}))
        < 2e-6
    )


@BOTH
def test_an_unloaded_model_has_no_trace_of_a_strength(kind, x):
    model = model_of(kind)
    set_strength(model, "default", SCHEDULE)
    base = model.unload()
    assert trace(base) == trace(TwoLayers())
    base(x)


@BOTH
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_the_strength_and_are_independent(kind, way, x):
    model = model_of(kind)
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x)
    if way == "deepcopy":
        clone = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        clone = torch.load(buffer, weights_only=False)
    assert torch.equal(at(clone, x), expected)
    set_strength(clone, "default", OTHER)
    assert not torch.equal(at(clone, x), expected)
    assert torch.equal(at(model, x), expected)


def test_weighted_sums_refuse_a_scheduled_lora():
    model = with_two("LoRA")
    set_strength(model, "default", SCHEDULE)
    with pytest.raises(ValueError, match="add_weighted_adapter would ignore the strength of adapter 'default'"):
        model.add_weighted_adapter(["other", "default"], [0.5, 0.5], "sum", "cat")
    assert list(model.peft_config) == ["default", "other"]
    set_strength(model, "default", None)
    model.add_weighted_adapter(["other", "default"], [0.5, 0.5], "sum", "cat")


def test_the_core_that_one_looks_at_is_without_strength():
    model = model_of("NaRA")
    expected = core_matrix(model, LEVELS, module="second")
    set_strength(model, "default", SCHEDULE)
    assert torch.equal(core_matrix(model, LEVELS, module="second"), expected)


def test_ablations_see_the_strength_as_a_part_of_the_core(x):
    model = model_of("LoRA")
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x, 0.33)
    with changed_noise(model, constant_noise(0.33)):
        assert torch.equal(at(model, x), expected)
    grid = torch.linspace(0, 1, 11)
    with mean_core(model, grid), torch.no_grad():
        mean = model(x)
    set_number(model, "default", strength_by_hand(grid).mean().item())
    assert relative_error(mean, model(x)) < 2e-6
