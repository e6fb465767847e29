"""Whole runs of video pipelines in which frames have their own timesteps, with λ of each frame at each call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler, WanImageToVideoPipeline
from peft import inject_adapter_in_model
from PIL import Image
from torch import Tensor

from tests.helpers.adapted import disturb, nara_config
from tests.helpers.denoisers import WARNINGS_OF_DIFFUSERS, denoiser
from tests.helpers.pipelines.families import small_wan_images
from tests.helpers.small_pipelines import quiet

pytestmark = [*WARNINGS_OF_DIFFUSERS, pytest.mark.slow]
FRAMES, PATCHES = 4, 6
TARGETS = ["to_q", "to_v", "net.0.proj", "time_proj"]


def wan() -> Any:
    """Image to video as in Wan 2.2 5B, where the first frame is the image and has timestep 0."""
    base = small_wan_images()
    parts = {"vae": base.vae, "transformer": base.transformer, "scheduler": base.scheduler}
    return WanImageToVideoPipeline(tokenizer=None, text_encoder=None, expand_timesteps=True, **parts)


def skyreels() -> Any:
    """Diffusion forcing, where each frame starts a step after the frame before it."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"vae": small_wan_images().vae, "scheduler": scheduler}
    transformer = denoiser("SkyReelsV2Transformer3DModel", scale=0.1, rope_max_seq_len=32)
    return SkyReelsV2DiffusionForcingPipeline(tokenizer=None, text_encoder=None, transformer=transformer, **parts)


def run(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    text = torch.randn(2, 24, 8, generator=generator)
    options: dict[str, Any] = {"image": Image.linear_gradient("L").convert("RGB")}
    if isinstance(pipe, SkyReelsV2DiffusionForcingPipeline):
        options = {"base_num_frames": 13, "ar_step": 1, "causal_block_size": 1}
    options |= {"height": 32, "width": 48, "num_frames": 13, "num_inference_steps": 3, "output_type": "latent"}
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": -text, "guidance_scale": 3.0}
    return quiet(pipe)(prompt=None, **options, **embeds, generator=generator).frames


@pytest.mark.parametrize("make", [wan, skyreels])
def test_each_call_has_the_level_of_each_frame(make: Any, tmp_path: Path) -> None:
    trained, pipe = make(), make()
    inject_adapter_in_model(nara_config(target_modules=TARGETS), trained.transformer, "default")
    disturb(trained.transformer)
    trained.save_nara_weights(tmp_path)
    base, calls, levels = run(pipe), [], []
    pipe.load_nara_weights(tmp_path, adapter_name="default")
    core = pipe.transformer.get_submodule("lora_core.cores.default.shared")
    core.register_forward_pre_hook(lambda _, args: levels.append(args[0]))
    pipe.transformer.register_forward_pre_hook(lambda _, __, given: calls.append(given["timestep"]), with_kwargs=True)
    assert not torch.allclose(run(pipe), base, atol=1e-3)
    assert len({tuple(level.tolist()) for level in levels}) >= 3
    for timestep, level in zip(calls, levels, strict=True):
        assert timestep.shape in ((2, FRAMES), (2, FRAMES * PATCHES))
        frames = timestep.float().view(2, FRAMES, -1).amax(2) / 1000
        torch.testing.assert_close(level, torch.cat([frames.flatten(), frames.amax(1)]))
    assert any(level.min() == 0 < level.max() for level in levels)  # a clean frame beside noisy ones
