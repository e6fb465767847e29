"""The tests' own pipelines: they run, tell prompts and seeds apart, and are the same at every call."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.helpers.small_pipelines import (
    MAX_TOKENS,
    clip_tokenizer,
    pixels,
    small_flux,
    small_sd,
    small_sd3,
    small_sdxl,
)


@pytest.mark.parametrize("make", [small_sd, small_sdxl, small_sd3, small_flux])
def test_a_small_pipeline_draws_by_its_prompt_and_seed(make, tmp_path):
    pipe = make()
    image = pixels(pipe)
    assert image.shape == (1, 16, 16, 3)
    assert image.isfinite().all()
    assert image.std() > 0.02
    assert torch.equal(pixels(make()), image)
    assert not torch.allclose(pixels(pipe, seed=1), image, atol=1e-2)
    assert not torch.allclose(pixels(pipe, "red grass"), image, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}  # SD3's T5 encoder
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pixels(loaded), image, rtol=0, atol=1e-5)  # bits depend on how the weights are aligned


def test_the_tokenizer_keeps_words_whole_and_pads():
    tokenizer = clip_tokenizer()
    assert tokenizer.tokenize("a photo of sks toy") == ["a</w>", "photo</w>", "of</w>", *"sk", "s</w>", "toy</w>"]
    ids = tokenizer("toy", padding="max_length", truncation=True).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == MAX_TOKENS
