"""A Python number that becomes λ or a timestep has the same value whatever torch's default dtype is.

Everything is computed twice on one float32 model: with float32 as default dtype, and with another one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiscreteDDIMScheduler
from torch import Tensor

from nara_diffusion import (
    StrengthSchedule,
    TimestepNoise,
    core_matrix,
    noise_level,
    set_strength,
    to_lora,
)
from nara_diffusion.dllm import masked_diffusion_loss, read_noise_from_input_ids
from nara_diffusion.noise.blocks import BlockNoise
from nara_diffusion.noise.canvas_source import CanvasNoise
from tests.helpers.adapted import TwoLayers, adapted

STEP = StrengthSchedule([(0.3, 1.0), (0.3, -2.0)])
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
MASK = 49
IDS = torch.tensor([[5, 6, MASK, 7, MASK, 8, 9, MASK, 3, 2, 4, 11], [5, 6, MASK, 7, 1, 8, 9, 3, 3, 2, 4, 11]])


def in_context(model: Any, level: Any = 0.3) -> Tensor:
    with noise_level(model, level):
        return model(X)


def at_a_step(model: Any) -> Tensor:
    set_strength(model, "default", STEP)
    return in_context(model, [0.3, 0.2999, 0.31])


def folded(model: Any) -> Tensor:
    loras = [to_lora(model, 0.3), to_lora(model, "best")]
    return torch.cat([lora.layers["first"].B.flatten() for lora in loras])


def counted(llama: Any) -> Tensor:
    """λ as a share of 3 of 10 masks."""
    with read_noise_from_input_ids(llama, 2):
        return llama(IDS).logits


def after_a_step(_: Any) -> Tensor:
    """λ after the first of six steps of a canvas."""
    scheduler, source = DiscreteDDIMScheduler(), CanvasNoise(list)
    scheduler.set_timesteps(6)
    source.stepped(scheduler, {"timestep": 0}, None)
    assert source.local.level is not None
    return source.local.level


def in_a_block(llama: Any) -> Tensor:
    """λ of a prompt's block, and of a block with two of three masks left."""
    model, scheduler = llama.get_base_model(), SimpleNamespace(_transfer_schedule=torch.ones(3).long())
    source = BlockNoise(lambda: [scheduler])
    ids = torch.tensor([[5, 6, 7, MASK, MASK, MASK]])
    inputs = {"attention_mask": torch.ones_like(ids), "position_ids": ids}
    source(model, (ids,), inputs)
    return source(model, (ids.where(torch.arange(6) != 4, 8),), inputs)


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "a number": in_context,
    "a list": lambda model: in_context(model, [0.3, 0.7, 0.1]),
    "a list with tensors": lambda model: in_context(model, [0.3, torch.tensor(0.7, dtype=torch.float32), 0.1]),
    "a step of the strength": at_a_step,
    "core_matrix": lambda model: core_matrix(model, 0.3),
    "exporting": folded,
    "a timestep": lambda _: TimestepNoise().noise_level(700.3),
    "a whole timestep": lambda _: TimestepNoise().noise_level(999),
    "a sigma": lambda _: TimestepNoise("sigma").noise_level(0.3),
    "a schedule": lambda _: STEP([0.3, 0.29999]),
    "a step at a timestep": lambda _: StrengthSchedule([(0.7, 1.0), (0.7, 0.0)])(TimestepNoise().noise_level(700)),
}
OF_TEXT: dict[str, Callable[[Any], Tensor]] = {
    "a loss": lambda llama: masked_diffusion_loss(llama, IDS, torch.tensor([2, 2]), noise_level=0.3, seed=1).per_sample,
    "a share of masks": counted,
    "a step of a canvas": after_a_step,
    "a block": in_a_block,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_number_is_same_level_under_any_default_dtype(dtype: torch.dtype, tiny_llama: Any) -> None:
    def model() -> Any:
        torch.manual_seed(3)
        return adapted(TwoLayers(), target_modules=["first"])

    llama = adapted(tiny_llama, target_modules=["q_proj"])
    assert llama.config.mask_token_id == MASK
    assert WAYS["a step at a timestep"](None).item() == 0.0
    ways = [(name, way, model(), model()) for name, way in WAYS.items()]
    ways += [(name, way, llama, llama) for name, way in OF_TEXT.items()]
    expected = [way(one) for _, way, one, _ in ways]
    torch.set_default_dtype(dtype)
    try:
        levels = [way(other) for _, way, _, other in ways]
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, *_), one, other in zip(ways, levels, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
