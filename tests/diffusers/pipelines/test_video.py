"""Videos in UNets through whole pipelines: spatial and temporal layers, frames by windows and in slices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, TextToVideoSDPipeline, UNetMotionModel
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.diffusers.reference import ATTENTION, ROUNDING, adapt, compare_calls, updates_at, watch, write
from tests.helpers.adapted import relative_error
from tests.helpers.denoisers.models import denoiser, inputs_of
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_sd

TARGETS = [*ATTENTION, "attentions.0.proj_in", "conv1", "time_emb_proj"]
FRAMES = 4


def animate_diff() -> AnimateDiffPipeline:
    stock = small_sd()
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    unet = UNetMotionModel.from_unet2d(stock.unet, adapter)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in unet.named_parameters():  # motion modules start as nothing
        if "motion_modules" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False)
    pipe = AnimateDiffPipeline(
        vae=stock.vae,
        text_encoder=stock.text_encoder,
        tokenizer=stock.tokenizer,
        unet=unet.eval(),
        motion_adapter=adapter,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe: Any, frames: int = FRAMES, **options: Any) -> Tensor:
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    call = {"prompt": ["a toy", "red"], **call, **options}
    return pipe(num_frames=frames, generator=generator, **call).frames


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_animate_diff(guidance_scale):
    pipe = animate_diff()
    unet, plain = adapt(pipe.unet, TARGETS)
    names = [name for name, module in unet.named_modules() if hasattr(module, "lora_A")]
    assert {"motion_modules" in name for name in names} == {True, False}
    errors, levels = compare_calls(unet, plain), watch(unet)
    video(pipe, guidance_scale=guidance_scale)
    pipe.scheduler.set_timesteps(3)
    assert levels == [[pytest.approx(float(t) / 1000)] for t in pipe.scheduler.timesteps]
    assert max(errors) < ROUNDING


def test_videos_of_unequal_levels_in_the_batch_that_guidance_doubles():
    """The inputs of a pipeline's own call, at a timestep for each of its four videos: each equals merged weights."""
    pipe = animate_diff()
    unet, plain = adapt(pipe.unet, TARGETS)
    calls: list[Any] = []
    handle = unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    video(pipe, num_inference_steps=1)
    handle.remove()
    (sample, _), kwargs = calls[0][0][:2], calls[0][1]
    text, timesteps = kwargs["encoder_hidden_states"], torch.tensor([40, 300, 620, 980])
    assert sample.shape[0] == 4
    assert text.shape[0] == 4 * FRAMES
    base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with torch.no_grad():
        batch = unet(sample, timesteps, encoder_hidden_states=text).sample
        for i, t in enumerate(timesteps):
            write(plain, base, updates_at(unet, float(t) / 1000))
            rows = slice(i * FRAMES, (i + 1) * FRAMES)
            alone = plain(sample[i : i + 1], t, encoder_hidden_states=text[rows]).sample
            assert relative_error(batch[i : i + 1], alone) < ROUNDING


def test_long_videos_by_windows_and_slices():
    """FreeNoise: λ is right while all videos share it, and refused where slices hide which video a row is of."""
    pipe = animate_diff()
    pipe.enable_free_noise(context_length=4, context_stride=2)
    pipe.enable_free_noise_split_inference(spatial_split_size=16, temporal_split_size=4)
    unet, plain = adapt(pipe.unet, TARGETS)
    errors, levels = compare_calls(unet, plain), watch(unet)
    video(pipe, frames=8, prompt="a toy", num_videos_per_prompt=2)
    assert len(levels) == len(errors) == 3
    assert max(errors) < ROUNDING
    sample, text = torch.randn(2, 4, 8, 8, 8), torch.randn(2 * 8, 5, 16)
    with pytest.raises(
        ValueError, match=r"has 2 values, but '.*' runs on slices of the batch \(forward chunking, or Free"
    ):
        unet(sample, torch.tensor([100, 900]), encoder_hidden_states=text)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_text_to_video():
    stock = small_sd()
    unet: nn.Module = denoiser("UNet3DConditionModel", in_channels=4, out_channels=4, cross_attention_dim=16)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False)
    pipe = TextToVideoSDPipeline(
        vae=stock.vae, text_encoder=stock.text_encoder, tokenizer=stock.tokenizer, unet=unet, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    model, plain = adapt(pipe.unet, [*ATTENTION, "resnets.0.conv1", "conv4.3"])
    errors, levels = compare_calls(model, plain), watch(model)
    video(pipe)
    pipe.scheduler.set_timesteps(3)
    assert levels == [[pytest.approx(float(t) / 1000)] for t in pipe.scheduler.timesteps]
    assert max(errors) < ROUNDING


@pytest.mark.parametrize("name", ["UNet3DConditionModel", "UNetMotionModel"])
def test_forward_chunking(name):
    """Chunks along the batch hide whose rows they hold: 2 videos × 4 frames in chunks of 4 would pass for 2 × 2."""
    unet: Any = denoiser(name)
    model, _ = adapt(unet, ["ff.net.2", "to_q"])
    inputs, timesteps = inputs_of(name), torch.tensor([100, 900])
    with torch.no_grad():
        expected = model(**inputs, timestep=timesteps).sample
        model.enable_forward_chunking(chunk_size=1, dim=1)
        assert relative_error(model(**inputs, timestep=timesteps).sample, expected) < rounding_of(model)
        model.enable_forward_chunking(chunk_size=4, dim=0)
        with pytest.raises(ValueError, match=r"runs on slices of the batch.*pass one λ for the whole batch"):
            model(**inputs, timestep=timesteps)
        with noise_level(model, 0.3):
            chunked = model(**inputs, timestep=timesteps).sample
            model.disable_forward_chunking()
            assert relative_error(model(**inputs, timestep=timesteps).sample, chunked) < rounding_of(model)


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")  # PEFT, since a UNet of images has no such module
def test_an_adapter_of_images_in_a_pipeline_of_videos(tmp_path):
    """Trained on Stable Diffusion, loaded into AnimateDiff: refused if its targets select temporal layers too."""
    for name, excluded in (("all", None), ("spatial", r".*motion_modules.*")):
        images = small_sd()
        adapt(images.unet, TARGETS, exclude_modules=excluded)
        images.save_nara_weights(tmp_path / name)  # type: ignore[attr-defined]
    pipe = animate_diff()
    names = {name for name, module in images.unet.named_modules() if hasattr(module, "lora_A")}
    plain = copy.deepcopy(pipe.unet)
    with pytest.raises(ValueError, match=r"target_modules select 'down_blocks\.0\.motion_modules.*has no tensors"):
        pipe.load_nara_weights(tmp_path / "all")  # type: ignore[attr-defined]
    pipe.load_nara_weights(tmp_path / "spatial", adapter_name="default")  # type: ignore[attr-defined]
    assert {name for name, module in pipe.unet.named_modules() if hasattr(module, "lora_A")} == names
    errors = compare_calls(pipe.unet, plain)
    video(pipe)
    assert len(errors) == 3
    assert max(errors) < ROUNDING
