"""A Python number that becomes λ or a timestep has the same value whatever torch's default dtype is.

Everything is computed twice on one float32 model: with float32 as default dtype, and with another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import (
    StrengthSchedule,
    TimestepNoise,
    core_matrix,
    noise_level,
    set_strength,
    to_lora,
    to_lora_bins,
)
from nara_diffusion.dllm import masked_diffusion_loss, read_noise_from_input_ids
from tests.helpers.adapted import TwoLayers, adapted

OTHERS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
STEP = StrengthSchedule([(0.3, 1.0), (0.3, -2.0)])
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def in_context(model: Any, level: Any = 0.3) -> Tensor:
    with noise_level(model, level):
        return model(X)


def at_a_step(model: Any) -> Tensor:
    set_strength(model, "default", STEP)
    return in_context(model, [0.3, 0.2999, 0.31])


def merged(model: Any) -> Tensor:
    model.merge_adapter(noise_level=0.3)
    return model.base_model.model.first.get_base_layer().weight


def folded(model: Any) -> Tensor:
    bins = to_lora_bins(model, 3)
    factors = [lora.layers["first"].B.flatten() for lora in (to_lora(model, 0.3), *bins.loras)]
    points = [level for schedule in bins.schedules for level, _ in schedule.points]
    return torch.cat([*factors, torch.tensor(points, dtype=torch.float32)])


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "a number": in_context,
    "a list": lambda model: in_context(model, [0.3, 0.7, 0.1]),
    "a list with tensors": lambda model: in_context(model, [0.3, torch.tensor(0.7, dtype=torch.float32), 0.1]),
    "a step of the strength": at_a_step,
    "core_matrix": lambda model: core_matrix(model, 0.3),
    "merging": merged,
    "exporting": folded,
}


@OTHERS
def test_a_number_is_the_same_level_under_any_default_dtype(dtype: torch.dtype) -> None:
    def model() -> Any:
        torch.manual_seed(3)
        return adapted(TwoLayers(), target_modules=["first"], fan_in_fan_out=False)

    for way in WAYS:
        expected, model_now = WAYS[way](model()), model()
        with default_dtype(dtype):
            found = WAYS[way](model_now)
        assert found.dtype == expected.dtype, way
        assert torch.equal(found, expected), way


@OTHERS
def test_timesteps_and_schedules_read_numbers_in_float32(dtype: torch.dtype) -> None:
    late = StrengthSchedule([(0.7, 1.0), (0.7, 0.0)])
    with default_dtype(dtype):
        assert TimestepNoise().noise_level(999).tolist() == [torch.tensor(0.999, dtype=torch.float32).item()]
        assert TimestepNoise().noise_level(700.3).item() == pytest.approx(0.7003, abs=1e-7)
        assert TimestepNoise("sigma").noise_level(0.3).item() == pytest.approx(0.3, abs=1e-7)
        assert STEP([0.3, 0.29999]).tolist() == [-2.0, 1.0]
        assert STEP([0.3, 0.2]).dtype == torch.float32
        assert [late(TimestepNoise().noise_level(t)).item() for t in (700, 699)] == [0.0, 1.0]


@OTHERS
def test_a_counted_share_of_masks_is_not_rounded(dtype: torch.dtype, tiny_llama: Any) -> None:
    """3 of 10, and a loss at a number."""
    model = adapted(tiny_llama, target_modules=["q_proj"])
    mask = model.config.mask_token_id
    ids = torch.tensor([[5, 6, mask, 7, mask, 8, 9, mask, 3, 2, 4, 11], [5, 6, mask, 7, 1, 8, 9, 3, 3, 2, 4, 11]])

    @torch.no_grad()
    def outputs() -> list[Tensor]:
        loss = masked_diffusion_loss(model, ids, torch.tensor([2, 2]), noise_level=0.3, seed=1).per_sample
        with read_noise_from_input_ids(model, 2):
            return [loss, model(ids).logits]

    expected = outputs()
    with default_dtype(dtype):
        found = outputs()
    assert [one.dtype for one in found] == [other.dtype for other in expected]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
