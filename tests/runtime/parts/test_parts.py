"""A part of an adapted model that is called by itself: it has the λ that is told, and none where none is."""

from __future__ import annotations

import contextvars
import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level, set_noise_source
from nara_diffusion.noise.ablations import mean_core
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import TwoLayers, adapted, default_core, disturb, nara_config, relative_error
from tests.helpers.two_layers import LEVELS, TARGETS, by_hand, expect, parts_in_turn, run
from tests.runtime.channel_calls import expect_no_core

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


@pytest.mark.parametrize("level", [0.3, LEVELS], ids=["shared", "per sample"])
def test_a_part_has_the_level_that_is_told(model: PeftModel, x: Tensor, level: Any) -> None:
    with noise_level(model, level):
        assert relative_error(parts_in_turn(model, x), expect(model, x, level)) < 2e-6
        with noise_level(model, 0.8):
            assert relative_error(parts_in_turn(model, x), expect(model, x, 0.8)) < 2e-6
        assert relative_error(parts_in_turn(model, x), expect(model, x, level)) < 2e-6
    expect_no_core(model.base_model.model.first, x)


@pytest.mark.parametrize("core_sharing", ["module_type", "layer"])
def test_a_part_reads_the_core_of_its_own_group(x: Tensor, core_sharing: str) -> None:
    model = adapted(TwoLayers(), target_modules=TARGETS, core_sharing=core_sharing)
    with noise_level(model, LEVELS):
        assert torch.equal(parts_in_turn(model, x), model(x))


@pytest.mark.parametrize("core_type", ["constant", "identity"])
def test_a_part_whose_core_needs_no_level_works_without_one(x: Tensor, core_type: str) -> None:
    model = adapted(TwoLayers(), target_modules=TARGETS, core_type=core_type)
    assert torch.equal(parts_in_turn(model, x), model(x))


def test_a_source_is_not_asked_by_a_part(model: PeftModel, x: Tensor) -> None:
    set_noise_source(model, lambda module, args, kwargs: NoiseSignals(LEVELS))  # type: ignore[arg-type]
    assert relative_error(run(model, x), expect(model, x, LEVELS)) < 2e-6
    expect_no_core(model.base_model.model.first, x)


def test_a_part_sees_the_core_of_after_an_optimizer_step(model: PeftModel, x: Tensor) -> None:
    """Inside one context; F has gradients, those that a forward of the whole model gives."""
    model.requires_grad_(True)
    whole = copy.deepcopy(model)
    for call, one in ((parts_in_turn, model), (lambda model, x: model(x), whole)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        with noise_level(one, LEVELS):
            for _ in range(3):
                optimizer.zero_grad()
                call(one, x).square().mean().backward()
                optimizer.step()
            assert relative_error(call(one, x), by_hand(one, x, default_core(one, LEVELS))) < 5e-6
    for (name, actual), (_, expected) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert expected.grad.abs().max() > 0, name
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_adapters_that_are_switched_off_or_mixed_in_a_part(model: PeftModel, x: Tensor) -> None:
    root = model.base_model.model
    model.add_adapter("other", nara_config(target_modules=TARGETS, r=3))
    disturb(root.nara_core.cores["other"], seed=5)
    for layer in (root.first, root.second):
        nn.init.normal_(layer.lora_B["other"].weight)

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = root.first, root.second

    names = ["other", "default", "other"]
    with noise_level(model, LEVELS):
        model.base_model.set_adapter(["default", "other"])
        assert torch.equal(parts_in_turn(model, x), model(x))
        with model.base_model._enable_peft_forward_hooks(adapter_names=names):
            mixed = parts_in_turn(model, x)
        torch.testing.assert_close(mixed, model(x, adapter_names=names))
        with model.disable_adapter():
            assert torch.equal(parts_in_turn(model, x), root.second.base_layer(torch.tanh(root.first.base_layer(x))))


def test_the_mean_core_in_a_part(model: PeftModel, x: Tensor) -> None:
    grid = torch.linspace(0, 1, 7)
    mean = default_core(model, grid).mean(0, keepdim=True).expand(3, -1, -1)
    with mean_core(model, grid):
        assert relative_error(parts_in_turn(model, x), by_hand(model, x, mean)) < 5e-6


def test_a_part_inside_a_forward_has_the_level_of_its_own_context(model: PeftModel, x: Tensor) -> None:
    root = model.base_model.model
    inner: list[Tensor] = []

    def call_a_part(*_: Any) -> None:
        handle.remove()
        with noise_level(model, 0.9):
            inner.append(parts_in_turn(model, x))
        with mean_core(model, [0.7]):
            inner.append(parts_in_turn(model, x))

    with torch.no_grad():
        handle = root.second.register_forward_pre_hook(call_a_part)
        with noise_level(model, 0.2):
            outer = model(x)
    for actual, level in zip((outer, *inner), (0.2, 0.9, 0.7), strict=True):
        assert relative_error(actual, expect(model, x, level)) < 2e-6


def test_a_part_inside_a_forward_has_the_level_of_the_context_that_it_runs_in(model: PeftModel, x: Tensor) -> None:
    """A `contextvars.Context` that was copied inside of `noise_level`, before the forward began."""
    inner: list[Tensor] = []
    with noise_level(model, 0.9), torch.no_grad():
        told = contextvars.copy_context()
        set_noise_source(model, lambda module, args, kwargs: NoiseSignals(torch.tensor([0.2])))  # type: ignore[arg-type]

        def call_a_part(*_: Any) -> None:
            handle.remove()
            inner.append(told.run(parts_in_turn, model, x))

        handle = model.base_model.model.second.register_forward_pre_hook(call_a_part)
        outer = contextvars.Context().run(model, x)
    for actual, level in ((outer, 0.2), (inner[0], 0.9)):
        assert relative_error(actual, expect(model, x, level)) < 2e-6, level
