"""Modular pipelines: the three methods, and λ at each step of a denoising block with its guider."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks
from torch import Tensor

from tests.diffusers.reference import ATTENTION, ROUNDING, adapt, compare_calls, watch
from tests.helpers.denoisers.models import denoiser


def modular_wan() -> Any:
    """Wan's denoising blocks, without those of text and pixels."""
    pipe: Any = WanBlocks().sub_blocks["denoise"].init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    transformer = denoiser("WanTransformer3DModel", in_channels=16, out_channels=16)  # as Wan's VAE has
    pipe.update_components(transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text = [torch.randn(1, 5, 8, generator=generator) for _ in range(2)]
    call = {"num_inference_steps": 4, "height": 32, "width": 32, "num_frames": 5, "generator": generator}
    return pipe(prompt_embeds=text[0], negative_prompt_embeds=text[1], output="latents", **call)


def test_a_block_reads_the_sigma_of_each_of_its_steps():
    pipe = modular_wan()
    model, plain = adapt(pipe.transformer, ATTENTION)
    errors, levels = compare_calls(model, plain), watch(model)
    latents(pipe)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:4] for _ in range(2)]  # the guider's two forwards
    assert levels == [[pytest.approx(sigma, abs=1e-6)] for sigma in sigmas]
    assert max(errors) < ROUNDING


def test_an_adapter_is_saved_loaded_and_unloaded(tmp_path):
    pipe = modular_wan()
    plain = latents(pipe)
    adapt(pipe.transformer, ATTENTION)
    expected = latents(pipe)
    assert not torch.allclose(expected, plain, atol=1e-3)
    pipe.save_nara_weights(tmp_path)
    other = modular_wan()
    other.load_nara_weights(tmp_path, adapter_name="own")
    assert torch.equal(latents(other), expected)
    other.set_adapters("own", 0.0)
    assert torch.equal(latents(other), plain)
    other.unload_nara_weights()
    assert torch.equal(latents(other), plain)
    assert not any("nara" in key or "lora" in key for key in other.transformer.state_dict())


def test_a_pipeline_without_its_denoiser_says_so(tmp_path):
    pipe: Any = WanBlocks().sub_blocks["decode"].init_pipeline()
    with pytest.raises(ValueError, match=r"has none of unet, transformer, .*one of which a NaRA adapts"):
        pipe.load_nara_weights(tmp_path)
