"""λ's range: an error where the values are on the CPU, NaN elsewhere, where reading them would wait for the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from torch import nn

from nara_diffusion import TimestepNoise, noise_level
from nara_diffusion.cores.registry import BUILT_IN, build_core
from nara_diffusion.noise.level import as_level, host_values
from nara_diffusion.noise.sources import InputIdsNoise
from nara_diffusion.noise.timesteps import DenoiserNoise
from tests.helpers.adapted import adapted, nara_config
from tests.helpers.elsewhere import elsewhere, values_of

NAN = math.nan


class Timed(nn.Module):
    def forward(self, x: Any, timestep: Any = None) -> None: ...


def test_only_values_on_the_cpu_are_read() -> None:
    assert host_values(torch.tensor([[1.0], [2.0]])) == [1.0, 2.0]
    assert host_values(elsewhere([1.0])) is None
    assert host_values(torch.empty(2, device="meta")) is None


@pytest.mark.parametrize("level", [-0.001, 1.001, NAN])
def test_level_outside_range_raises_or_is_nan(level: float) -> None:
    with pytest.raises(ValueError, match=r"noise_level is \[0.25, .*has to lie in \[0, 1\]"):
        as_level([0.25, level])
    assert values_of(as_level(elsewhere([0.0, level, 0.25, 1.0]))) == pytest.approx([0, NAN, 0.25, 1], nan_ok=True)


@pytest.mark.parametrize("timestep", [1001.0, -2.0, NAN])
def test_timestep_outside_range_raises_or_is_nan(timestep: float) -> None:
    source = TimestepNoise("discrete")
    with pytest.raises(ValueError, match=r"timestep is .*gives a λ outside .*'discrete' with N = 1000"):
        source.noise_level(torch.tensor([500.0, timestep]))
    actual = source.noise_level(elsewhere([500.0, timestep, 1000.05, 0.0]))  # a rounding error outside is none
    assert values_of(actual) == pytest.approx([0.5, NAN, 1, 0], nan_ok=True)


@pytest.mark.parametrize("core_type", [name for name in BUILT_IN if name not in ("constant", "identity")])
def test_core_is_nan_where_the_level_is_nan(core_type: str) -> None:
    core = build_core(nara_config(core_type=core_type, core_bins=2, core_sharing="layer"), 4)
    is_nan = core(torch.tensor([0.25, NAN])).isnan()
    diagonal = is_nan.diagonal(dim1=1, dim2=2)
    assert diagonal.tolist() == [[False] * 4, [True] * 4]


def levels_of(source: DenoiserNoise, timestep: torch.Tensor) -> list[float]:
    return values_of(source(Timed(), (None, timestep), {}))


@pytest.mark.parametrize(
    ("timestep", "levels"),
    [
        ([2.5, 1.25], [NAN, NAN]),  # all small, and no whole numbers
        ([2.0, 1.0], [0.002, 0.001]),
        ([250.5, 1.25], [0.2505, 0.00125]),
    ],
)
def test_ambiguous_timestep_elsewhere_is_nan(timestep: list[float], levels: list[float]) -> None:
    assert levels_of(DenoiserNoise("discrete"), elsewhere(timestep)) == pytest.approx(levels, nan_ok=True)
    if levels[0] != levels[0]:
        with pytest.raises(ValueError, match=r"timestep is \[2.5, 1.25\].*may be ¼ ln σ"):
            levels_of(DenoiserNoise("discrete"), torch.tensor(timestep))


def test_schedulers_decide_small_timesteps_elsewhere() -> None:
    discrete, continuous = DDIMScheduler(), EDMEulerScheduler()
    timestep = elsewhere([0.5])
    assert levels_of(DenoiserNoise("discrete", schedulers=[discrete]), timestep) == pytest.approx([0.0005])
    assert math.isnan(levels_of(DenoiserNoise("discrete", schedulers=[discrete, continuous]), timestep)[0])
    with pytest.raises(ValueError, match=r"timestep is torch.float32 on cpu.*EDMEulerScheduler passes ¼ ln σ"):
        levels_of(DenoiserNoise("discrete", schedulers=[continuous]), timestep)


def test_text_without_an_answer_is_nan_elsewhere() -> None:
    ids = torch.tensor([[1, 9, 9, 3], [1, 2, 9, 9]])
    padding = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    source = InputIdsNoise([1, 2], mask_token_id=9)
    with pytest.raises(ValueError, match="none of the 4 tokens in row 1 of input_ids belongs to an answer"):
        source(nn.Identity(), (ids, padding), {})
    actual = source(nn.Identity(), (elsewhere(ids, torch.long), elsewhere(padding, torch.long)), {})
    assert values_of(actual) == pytest.approx([2 / 3, NAN], nan_ok=True)


def test_model_at_level_outside_range_returns_nan() -> None:
    model = adapted(nn.Sequential(nn.Linear(7, 5)), target_modules=["0"])
    with noise_level(model, elsewhere([0.25, 1.5])):
        actual = model(torch.randn(2, 7))
    assert actual.as_subclass(torch.Tensor).isnan().all(1).tolist() == [False, True]
