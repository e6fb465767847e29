"""Losses and figures against those that are computed by hand; samples against the pipeline's own call."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler
from PIL import Image

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth import DreamBoothDataset, LatentCache, records_from_folder
from nara_diffusion.dreambooth.evaluation.before_after import (
    Evaluator,
    Measurement,
    ValidationLoss,
    compare,
    validation_losses,
)
from nara_diffusion.dreambooth.evaluation.sampling import SampleSettings, sample_images, write_images
from nara_diffusion.dreambooth.formats import adapter_loaded
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.objectives.timesteps import draw_noise
from tests.helpers.small_pipelines import small_sdxl

CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture
def accelerator():
    yield Accelerator()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def pipe() -> Any:
    return small_sdxl()


@pytest.fixture
def dataset(tmp_path: Path) -> DreamBoothDataset:
    """Images of two sizes, so that they make two batches."""
    generator = np.random.default_rng(3)
    for number, size in enumerate([(20, 20), (30, 18), (22, 22)]):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    records = records_from_folder(tmp_path, prompt="a photo of a toy", progress=False)
    return DreamBoothDataset(records, [(16, 16), (24, 12)], batch_size=1, seed=0)


def test_the_curve_is_the_error_at_each_level(pipe, dataset, accelerator) -> None:
    samples = dataset.plain_samples()
    loss = ValidationLoss(
        build_objective(pipe.scheduler), LatentCache(pipe.vae), samples, seed=4, points=3, batch_size=2
    )
    assert loss.indices == [166, 500, 833]
    curve = loss.curve(pipe, accelerator)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    expected = torch.zeros(3, 3)
    by_size = sorted(samples, key=lambda sample: sample.target_size)  # the order of the columns
    for column, sample in enumerate(by_size):
        latents = loss.latents.mode([sample])
        noise = draw_noise([sample.position], latents.shape[1:], seed=4, role="validation")
        embeds, _, pooled, _ = pipe.encode_prompt(sample.prompt, do_classifier_free_guidance=False)
        for row, t in enumerate(loss.indices):
            with torch.no_grad():
                prediction = pipe.unet(
                    scheduler.add_noise(latents, noise, torch.tensor([t])),
                    t,
                    encoder_hidden_states=embeds,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([sample.crop.time_ids])},
                ).sample
            expected[row, column] = (prediction - noise).square().mean()
    torch.testing.assert_close(curve, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.levels(), torch.tensor([0.166, 0.5, 0.833]))
    torch.testing.assert_close(loss.curve(pipe, accelerator), curve, rtol=0, atol=0)
    values = validation_losses(accelerator, pipe, loss)
    assert values["validation_loss"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert values["validation_loss_high"] == pytest.approx(expected[2].mean().item(), rel=1e-4)


def test_samples_are_those_of_the_pipelines_own_call(pipe, tmp_path) -> None:
    settings = SampleSettings(["a red toy", "a cube"], 3, seed=7, batch_size=3, call=CALL)
    images = sample_images(pipe, settings)
    for i, prompt in enumerate(settings.prompts):
        generators = [torch.Generator().manual_seed(7 + j) for j in range(3)]
        theirs = pipe([prompt] * 3, generator=generators, **CALL).images
        for mine, other in zip(images[3 * i : 3 * i + 3], theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
    write_images(tmp_path / "samples", images, settings)
    lines = [json.loads(line) for line in (tmp_path / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert lines[4] == {"file_name": "01-seed-8.png", "text": "a cube", "seed": 8}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "01-seed-8.png")), np.asarray(images[4]))


def test_a_pipeline_that_gives_nan_is_named(pipe) -> None:
    pipe.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    settings = SampleSettings(["a toy"], 1, seed=0, batch_size=1, call=CALL)
    with pytest.raises(ValueError, match=r"sampling in torch.float32 gives NaN.*sdxl-vae-fp16-fix"):
        sample_images(pipe, settings)


def test_an_adapter_is_removed_after_an_error(pipe, tmp_path) -> None:
    trained = small_sdxl()
    trained.unet.add_adapter(NaraConfig(r=2, target_modules=["to_q"], core_hidden_dims=(4, 4)), adapter_name="default")
    trained.save_nara_weights(tmp_path)
    keys = set(pipe.unet.state_dict())
    with pytest.raises(RuntimeError, match="stop"), adapter_loaded(pipe, tmp_path):  # noqa: PT012
        assert any("nara_core" in key for key in pipe.unet.state_dict())
        raise RuntimeError("stop")
    assert set(pipe.unet.state_dict()) == keys
    with adapter_loaded(pipe, None):
        assert set(pipe.unet.state_dict()) == keys


def test_a_judge_without_encoders_measures_nothing() -> None:
    evaluator = Evaluator([])
    assert evaluator.similarity([]) is None
    assert evaluator.alignment([], []) is None


def test_a_judge_leaves_the_identifier_out(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        "nara_diffusion.dreambooth.evaluation.before_after.TextAlignment",
        lambda encoder: SimpleNamespace(alignment=lambda images, prompts: asked.extend(prompts) or 0.5),
    )
    texts: Any = object()
    assert Evaluator([], texts=texts, identifier=["sks"]).alignment([], ["a photo of sks toy on grass"]) == 0.5
    assert asked == ["a photo of toy on grass"]


def test_results_hold_both_sides() -> None:
    before = Measurement([], 0.1, None, [0.5], [2.0], 2.0)
    after = Measurement([], 0.4, None, [0.5], [1.0], 1.0)
    assert compare(before, after) == {
        "similarity_before": 0.1,
        "similarity_after": 0.4,
        "text_alignment_before": None,
        "text_alignment_after": None,
        "validation_loss_before": 2.0,
        "validation_loss_after": 1.0,
        "curve_before": [2.0],
        "curve_after": [1.0],
        "noise_levels": [0.5],
    }
