"""Pipelines whose denoiser is neither `unet` nor `transformer`: a prior, a decoder, a transformer for guidance."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
)
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenScheduler
from peft import inject_adapter_in_model
from torch import Tensor

from tests.diffusers.reference import ATTENTION, watch
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.denoisers.adapted import WARNINGS_OF_DIFFUSERS
from tests.helpers.denoisers.models import denoiser
from tests.helpers.small_pipelines import clip_tokenizer, text_encoder

pytestmark = WARNINGS_OF_DIFFUSERS


def prior_pipeline() -> Any:
    pipe: Any = StableCascadePriorPipeline(
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=text_encoder(clip_tokenizer(), 16, projection=True),  # of which its dtype is asked
        prior=denoiser("StableCascadeUNet"),  # type: ignore[arg-type]
        scheduler=DDPMWuerstchenScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(2, 3, 6, generator=generator), torch.randn(2, 1, 5, generator=generator)
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 84, "width": 84, "output_type": "pt"}
    call |= {"prompt_embeds": text[:1], "prompt_embeds_pooled": pooled[:1]}
    call |= {"negative_prompt_embeds": text[1:], "negative_prompt_embeds_pooled": pooled[1:]}
    return pipe(generator=generator, **call).image_embeddings


def test_a_prior_reads_the_share_of_its_schedule_and_its_adapter_is_saved_and_loaded(tmp_path):
    pipe = prior_pipeline()
    plain = embeddings(pipe)
    pipe.prior.requires_grad_(False)
    config = nara_config(target_modules=ATTENTION)
    assert not hasattr(pipe.prior, "add_adapter")
    inject_adapter_in_model(config, pipe.prior)
    disturb(pipe.prior)
    assert pipe.prior.peft_config["default"].noise_convention == "timestep"
    levels = watch(pipe.prior)
    adapted = embeddings(pipe)
    assert levels == [[pytest.approx(float(t), abs=1e-6)] for t in pipe.scheduler.timesteps[:-1]]
    assert levels[0] == [1.0]
    assert not torch.allclose(adapted, plain, atol=1e-3)
    pipe.save_nara_weights(tmp_path)
    other = prior_pipeline()
    other.load_nara_weights(tmp_path)
    assert torch.equal(embeddings(other), adapted)
    other.unload_nara_weights()
    assert torch.equal(embeddings(other), plain)


def test_a_decoder_has_a_place_in_the_file():
    pipe: Any = StableCascadeDecoderPipeline(
        decoder=denoiser("StableCascadeUNet"),  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=None,  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match="There is no NaRA adapter 'default' to save"):  # it is a denoiser
        pipe.save_nara_weights("nowhere")


def test_both_transformers_of_ideogram_are_saved_and_loaded(tmp_path):
    def pipeline() -> Any:
        names = ("tokenizer", "text_encoder", "vae", "prompt_enhancer", "prompt_enhancer_head")
        return Ideogram4Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=denoiser("Ideogram4Transformer2DModel"),  # type: ignore[arg-type]
            unconditional_transformer=denoiser("Ideogram4Transformer2DModel"),  # type: ignore[arg-type]
            **dict.fromkeys((name for name in names if name in signature(Ideogram4Pipeline).parameters), None),
        )

    pipe = pipeline()
    for seed, name in enumerate(("transformer", "unconditional_transformer")):
        getattr(pipe, name).add_adapter(nara_config(target_modules=["to_q", "to_v"]))
        disturb(getattr(pipe, name), seed + 1)
    pipe.save_nara_weights(tmp_path)
    other = pipeline()
    other.load_nara_weights(tmp_path, adapter_name="default")
    for name in ("transformer", "unconditional_transformer"):
        loaded, saved = getattr(other, name).state_dict(), getattr(pipe, name).state_dict()
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)
