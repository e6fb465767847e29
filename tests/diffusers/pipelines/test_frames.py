"""Pipelines that give frames or tokens timesteps of their own: λ is that of the noisiest which a forward sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AnyFlowPipeline,
    DDIMScheduler,
    DiTPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    UniPCMultistepScheduler,
    WanVACEPipeline,
)
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteScheduler

from tests.diffusers.reference import ATTENTION, ROUNDING, adapt, compare_calls, level_of, watch
from tests.helpers.denoisers.adapted import WARNINGS_OF_DIFFUSERS
from tests.helpers.denoisers.models import denoiser
from tests.helpers.pipelines.wan import small_wan, wan_latents
from tests.helpers.small_pipelines import small_vae

pytestmark = WARNINGS_OF_DIFFUSERS


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def pipeline(kind: Any, name: str, scheduler: Any, **options: Any) -> Any:
    """Of Wan's parts, without text encoder."""
    pipe = kind(
        tokenizer=None,
        text_encoder=None,
        vae=small_wan().vae,
        scheduler=scheduler,
        transformer=denoiser(name),
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noisiest(timestep: Any) -> float:
    """λ of a (b, frames) timestep whose samples agree, by hand."""
    assert timestep.dim() == 2
    assert (timestep == timestep[:1]).all()
    return float(timestep.double().max()) / 1000


@pytest.mark.parametrize("ar_step", [0, 2], ids=["at once", "one after another"])
def test_diffusion_forcing(ar_step):
    pipe = pipeline(SkyReelsV2DiffusionForcingPipeline, "SkyReelsV2Transformer3DModel", unipc())
    model, plain = adapt(pipe.transformer, ATTENTION)
    errors, levels, told = compare_calls(model, plain, level=noisiest), watch(model), []
    model.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True)
    wan_latents(pipe, prompt=None, num_frames=9, ar_step=ar_step, causal_block_size=None if ar_step == 0 else 1)
    unequal = [timestep for timestep in told if timestep.unique().numel() > 1]
    assert bool(unequal) == (ar_step > 0)
    assert len(levels) == len(told) >= 8
    assert levels == [[pytest.approx(float(t.max()) / 1000, abs=1e-6)] for t in told]
    assert max(errors) < ROUNDING


def test_skyreels_without_forcing():
    pipe = pipeline(SkyReelsV2Pipeline, "SkyReelsV2Transformer3DModel", unipc())
    model, plain = adapt(pipe.transformer, ATTENTION)
    errors, levels = compare_calls(model, plain, level=level_of), watch(model)
    wan_latents(pipe)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:4] for _ in range(2)]
    assert levels == [[pytest.approx(sigma, abs=1e-3 + 1e-6)] for sigma in sigmas]  # UniPC's timesteps are whole
    assert max(errors) < ROUNDING


def test_vace():
    pipe = pipeline(WanVACEPipeline, "WanVACETransformer3DModel", unipc())
    assert pipe.transformer.config.vace_in_channels == 6
    model, plain = adapt(pipe.transformer, ATTENTION)
    model.register_forward_pre_hook(_six_control_channels, with_kwargs=True)
    plain.register_forward_pre_hook(_six_control_channels, with_kwargs=True)
    errors, levels = compare_calls(model, plain, level=level_of), watch(model)
    wan_latents(pipe, 1)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:4] for _ in range(2)]
    assert levels == [[pytest.approx(sigma, abs=1e-3 + 1e-6)] for sigma in sigmas]
    assert max(errors) < ROUNDING


def _six_control_channels(_: Any, args: Any, kwargs: Any) -> Any:
    """The tiny transformer has fewer channels of control than the pipeline's VAE makes."""
    return args, {**kwargs, "control_hidden_states": kwargs["control_hidden_states"][:, :6]}


def test_any_flow():
    pipe = pipeline(AnyFlowPipeline, "AnyFlowTransformer3DModel", FlowMapEulerDiscreteScheduler(shift=3.0))
    model, plain = adapt(pipe.transformer, ATTENTION)
    errors, levels = compare_calls(model, plain, level=noisiest), watch(model)
    wan_latents(pipe, guided=False, guidance_scale=1.0)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:4]]
    assert levels == [[pytest.approx(sigma, abs=1e-6)] for sigma in sigmas]
    assert max(errors) < ROUNDING


def test_dit_with_guidance_in_one_batch():
    model = denoiser("DiTTransformer2DModel", out_channels=8, num_embeds_ada_norm=1000)
    pipe = DiTPipeline(transformer=model, vae=small_vae(), scheduler=DDIMScheduler())  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    adapted, plain = adapt(pipe.transformer, ATTENTION)
    errors, levels = compare_calls(adapted, plain), watch(adapted)
    rows: list[int] = []
    adapted.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    pipe([3, 5], generator=torch.Generator().manual_seed(0), num_inference_steps=4, guidance_scale=4.0)
    assert levels == [[pytest.approx(float(t) / 1000, abs=1e-6)] for t in pipe.scheduler.timesteps]
    assert set(rows) == {4}
    assert max(errors) < ROUNDING
