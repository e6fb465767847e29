"""D of planned levels is computed at once, and is that of each forward's own λ, whatever changes inside."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import StrengthSchedule, noise_level, set_strength
from nara_diffusion.noise.context import find_holders
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config, relative_error

PLAN = torch.tensor([0.0, 0.3, 0.55, 0.8, 1.0])
X = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Any:
    return adapted(TwoLayers(), target_modules=["first", "second"])


@pytest.fixture
def calls(model: Any) -> list[int]:
    """The number of levels in each call of the core."""
    sizes: list[int] = []
    core = find_holders(model)[0].cores_of("default")["shared"]
    core.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    return sizes


def output(model: Any, level: Any) -> Tensor:
    with noise_level(model, level), torch.no_grad():
        return model(X)


def test_planned_levels_take_one_call_of_the_core(model: Any, calls: list[int]) -> None:
    levels = (PLAN[3], PLAN[1:4], PLAN[[1, 1, 1]], PLAN[[4, 0, 4]])
    expected = [output(model, level) for level in levels]
    calls.clear()
    with find_holders(model)[0].planning(PLAN):
        for level, alone in zip(levels, expected, strict=True):
            assert relative_error(output(model, level), alone) < 1e-6
        assert calls == [len(PLAN)]
        output(model, 0.31)
        with noise_level(model, PLAN[3]):
            model(X).sum().backward()
        assert calls == [len(PLAN), 1, 1]
    output(model, PLAN[3])
    assert calls == [len(PLAN), 1, 1, 1]


def add_schedule(model: Any) -> None:
    set_strength(model, "default", StrengthSchedule([(0, 0.5), (1, 1.5)]))


def switch_adapter(model: Any) -> None:
    model.add_adapter("other", nara_config(target_modules=["second"]))
    disturb(model, "other", seed=5)
    model.set_adapter("other")


def replace_adapter(model: Any) -> None:
    switch_adapter(model)
    model.delete_adapter("default")
    model.add_adapter("default", nara_config(target_modules=["first", "second"]))
    disturb(model, "default", seed=6)
    model.set_adapter("default")


@torch.no_grad()
def change_cores(model: Any) -> None:
    for parameter in find_holders(model)[0].cores.parameters():
        parameter.mul_(1.5)


@pytest.mark.parametrize("change", [add_schedule, switch_adapter, replace_adapter, change_cores])
def test_plan_follows_changes_of_adapters_inside(model: Any, change: Callable[[Any], None]) -> None:
    with find_holders(model)[0].planning(PLAN):
        former = output(model, PLAN[2])
        change(model)
        inside = output(model, PLAN[2])
    assert relative_error(inside, former) > 1e-2
    assert relative_error(inside, output(model, PLAN[2])) < 1e-6


def test_second_plan_has_the_changed_weights(model: Any) -> None:
    outputs = []
    for seed in (1, 2):
        disturb(model, seed=seed)
        with find_holders(model)[0].planning(PLAN):
            outputs.append(output(model, PLAN[2]))
    assert relative_error(outputs[1], output(model, PLAN[2])) < 1e-6
    assert relative_error(*outputs) > 1e-2


def test_plan_is_that_of_its_thread(model: Any, calls: list[int]) -> None:
    with find_holders(model)[0].planning(PLAN):
        thread = Thread(target=output, args=(model, PLAN[2]))
        thread.start()
        thread.join()
    assert calls == [1]
