"""λ after an adapter has come in through the loaders, and after another has taken its place by hotswap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nara_diffusion import TimestepNoise, set_noise_source
from tests.diffusers.reference import ROUNDING, UNET_TARGETS, compare_calls, latents, watch
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import small_flux, small_sdxl


def saved(folder: Path, seed: int, make: Any = small_sdxl, part: str = "unet", **changes: Any) -> Any:
    """A pipeline with an adapter of its own, frequencies included, which is saved in `folder`."""
    pipe = make()
    torch.manual_seed(seed)
    model = getattr(pipe, part)
    model.add_adapter(nara_config(**{"target_modules": UNET_TARGETS, **changes}))
    disturb(model, seed)
    pipe.save_nara_weights(folder)
    return pipe


def test_the_level_after_loading_and_after_hotswap(tmp_path):
    pipes = [saved(tmp_path / str(seed), seed) for seed in (1, 2)]
    expected = [latents(each) for each in pipes]
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    pipe, plain = small_sdxl(), small_sdxl().unet
    pipe.load_nara_weights(tmp_path / "1", adapter_name="default")  # type: ignore[attr-defined]
    errors = compare_calls(pipe.unet, plain)
    assert torch.equal(latents(pipe), expected[0])
    pipe.load_nara_weights(tmp_path / "2", adapter_name="default", hotswap=True)  # type: ignore[attr-defined]
    levels = watch(pipe.unet)
    assert torch.equal(latents(pipe), expected[1])
    pipe.scheduler.set_timesteps(3)
    assert levels == [[pytest.approx(float(t) / 1000)] for t in pipe.scheduler.timesteps]
    assert len(errors) == 6
    assert max(errors) < ROUNDING


def test_a_flow_adapter_is_refused_by_a_pipeline_of_discrete_timesteps(tmp_path):
    saved(tmp_path, 1, small_flux, "transformer", target_modules=["to_q", "to_v"])
    with pytest.raises(ValueError):  # noqa: PT011  (it has a part for a transformer, which the pipeline has not)
        small_sdxl().load_nara_weights(tmp_path)  # type: ignore[attr-defined]


def test_an_adapter_trained_in_edm_terms_is_read_in_them_after_loading(tmp_path):
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q"], noise_convention="edm"))
    disturb(pipe.unet)
    pipe.save_nara_weights(tmp_path)  # type: ignore[attr-defined]
    loaded = small_sdxl()
    loaded.load_nara_weights(tmp_path, adapter_name="default")  # type: ignore[attr-defined]
    levels = watch(loaded.unet)
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 40)
    added = {"text_embeds": torch.randn(1, 24), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        loaded.unet(sample, 0.0, text, added_cond_kwargs=added)
    assert levels == [[0.5]]  # σ = 1
    with pytest.raises(ValueError, match=r"timestep is 999.* as 'edm' is no λ"):
        latents(loaded)
    with pytest.raises(ValueError, match="trained with λ defined as 'edm', but the source of λ tells 'timestep'"):
        set_noise_source(loaded.unet, TimestepNoise())
