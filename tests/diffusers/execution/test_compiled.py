"""`unet.compile()` inside a pipeline: one graph for the whole UNet, whatever the timestep."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from nara_diffusion import noise_level
from tests.diffusers.reference import ATTENTION, ROUNDING, adapt, compare_calls, latents, watch
from tests.helpers.small_pipelines import small_sd

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def test_a_pipeline_compiles_its_unet_once_for_all_timesteps():
    pipe = small_sd()
    pipe.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, use_karras_sigmas=True)
    unet, _ = adapt(pipe.unet, [*ATTENTION, "conv1"])
    expected = latents(pipe, num_inference_steps=5)
    with noise_level(unet, 0.3):
        fixed = latents(pipe)
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounterWithBackend("eager")
    unet.compile(backend=backend)
    levels = watch(unet)
    actual = latents(pipe, num_inference_steps=5)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    graphs = backend.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        latents(pipe, num_inference_steps=7)
        with noise_level(unet, 0.3):
            torch.testing.assert_close(latents(pipe), fixed, rtol=1e-3, atol=1e-3)
    assert graphs == backend.frame_count <= 2
    assert not counters["graph_break"]
    assert len({level for (level,) in levels}) >= 10
    torch._dynamo.reset()


def test_blocks_that_are_compiled_one_by_one():
    pipe = small_sd()
    unet, plain = adapt(pipe.unet, ATTENTION)
    torch._dynamo.reset()
    errors = compare_calls(unet, plain)
    unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    latents(pipe)
    torch._dynamo.reset()
    assert len(errors) == 4
    assert max(errors) < ROUNDING
