"""Steps that reuse what blocks gave at an earlier step: whatever runs has the λ of its own step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import nn

from tests.diffusers.reference import ATTENTION, ROUNDING, adapt, compare_calls, follow, latents, watch
from tests.helpers.adapted import relative_error
from tests.helpers.small_pipelines import small_flux, small_sd, small_sdxl


def reuse_deep_blocks(unet: Any, interval: int = 2) -> list[int]:
    """As DeepCache does: the deep blocks run at every `interval`-th step; in between, their last outputs serve.

    Returns:
        A list with the number of times that the deep blocks ran.
    """
    count, ran = {"step": -1}, [0]
    unet.register_forward_pre_hook(lambda *_: count.__setitem__("step", count["step"] + 1))
    for block in (unet.down_blocks[1], unet.mid_block, unet.up_blocks[0]):
        kept: dict[str, Any] = {}

        def forward(*args: Any, _run: Any = block.forward, _kept: dict[str, Any] = kept, **kwargs: Any) -> Any:
            if count["step"] % interval == 0:
                ran[0] += 1
                _kept["output"] = _run(*args, **kwargs)
            return _kept["output"]

        block.forward = forward
    return ran


@pytest.mark.parametrize("make", [small_sd, small_sdxl])
def test_deep_blocks_that_are_skipped_at_every_other_step(make):
    pipe = make()
    unet, plain = adapt(pipe.unet)
    ran = reuse_deep_blocks(unet)
    reuse_deep_blocks(plain)
    errors, levels = compare_calls(unet, plain), watch(unet)
    latents(pipe, num_inference_steps=5)
    assert ran[0] == 3 * ((len(levels) + 1) // 2)
    assert max(errors) < ROUNDING


def test_blocks_that_are_called_past_the_root_raise():
    """What a cache would run by itself, outside of a forward of the whole model, has no λ."""
    unet, _ = adapt(small_sd().unet, ATTENTION)
    hidden, temb, text = torch.randn(2, 16, 4, 4), torch.randn(2, 32), torch.randn(2, 5, 16)
    with pytest.raises(RuntimeError, match=r"No C\(λ\) has reached layer 'mid_block\.attentions\.0"):
        unet.mid_block(hidden, temb, encoder_hidden_states=text)
    with pytest.raises(RuntimeError, match=r"No C\(λ\) has reached layer"):
        unet.forward(torch.randn(2, 4, 8, 8), 500, text)


CACHES: dict[str, Any] = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=100.0),
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "MagCache": lambda pipe: MagCacheConfig(
        mag_ratios=[1.0] * 6, threshold=1.0, max_skip_steps=1, retention_ratio=0.2, num_inference_steps=6
    ),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_diffusers(name):
    """The whole run equals that of a plain copy with the same cache, whose weights follow λ."""
    pipe = small_flux()
    transformer, plain = adapt(pipe.transformer, ATTENTION)

    results = []
    for model in (transformer, plain):
        pipe.transformer = model
        if model is plain:
            follow(plain, transformer, level=lambda t: float(torch.as_tensor(t).unique()), position=3)
        uncached = latents(pipe, num_inference_steps=6)
        model.enable_cache(CACHES[name](pipe))
        results.append(latents(pipe, num_inference_steps=6))
        assert not torch.equal(results[-1], uncached)
        model.disable_cache()
    assert relative_error(*results) < 1e-3


def test_a_copy_of_an_adapted_unet_made_by_a_cache_has_its_own_level():
    """Some keep a second copy of the model, for another guidance or resolution."""
    unet, _ = adapt(small_sd().unet, ATTENTION)
    clone: nn.Module = copy.deepcopy(unet)
    first, second = watch(unet), watch(clone)
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        outputs = [model(sample, t, text).sample for model, t in ((unet, 100), (clone, 900), (unet, 100))]
    assert (first, second) == ([[pytest.approx(0.1)]] * 2, [[pytest.approx(0.9)]])
    assert torch.equal(outputs[0], outputs[2])
