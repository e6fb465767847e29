"""Losses and figures against those that are computed by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from nara_diffusion.dreambooth import DreamBoothDataset, LatentCache, records_from_folder
from nara_diffusion.dreambooth.dataset import draw_noise
from nara_diffusion.dreambooth.families import SDXL
from nara_diffusion.dreambooth.fidelity import (
    Encoder,
    Evaluation,
    image_similarity,
    load_encoders,
    text_alignment,
)
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.samples import SampleSettings
from nara_diffusion.dreambooth.training_step import ValidationLoss
from tests.acceptance._commands import fresh_accelerate
from tests.dreambooth.pictures import folder_of
from tests.helpers.small_pipelines import small_sdxl

CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture
def accelerator():
    yield Accelerator()
    fresh_accelerate()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small_sdxl()


@pytest.fixture
def loss(pipe, tmp_path: Path) -> ValidationLoss:
    """Of images of two sizes, so that they make two batches."""
    folder = folder_of(tmp_path / "images", [(20, 20), (18, 30), (22, 22)])
    records = records_from_folder(folder, prompt="a photo of a toy", progress=False)
    samples = DreamBoothDataset(records, [(16, 16), (24, 12)], batch_size=1, seed=0).plain_samples()
    settings = {"seed": 4, "points": 3, "batch_size": 2}
    return ValidationLoss(build_objective(pipe.scheduler), LatentCache(pipe.vae), samples, SDXL, **settings)


def test_the_curve_is_the_error_at_each_level(pipe, loss, accelerator) -> None:
    assert loss.indices == [166, 500, 833]
    curve = loss.curve(pipe, accelerator)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    expected = torch.zeros(3, 3)
    by_size = sorted(loss.samples, key=lambda sample: sample.target)  # the order of the columns
    for column, sample in enumerate(by_size):
        latents = loss.latents.mode([sample])
        noise = draw_noise([sample.position], latents.shape[1:], seed=4, role="validation")
        embeds, _, pooled, _ = pipe.encode_prompt(sample.prompt, do_classifier_free_guidance=False)
        conditions = {"text_embeds": pooled, "time_ids": torch.tensor([sample.time_ids])}
        for row, t in enumerate(loss.indices):
            noisy = scheduler.add_noise(latents, noise, torch.tensor([t]))
            with torch.no_grad():
                prediction = pipe.unet(noisy, t, embeds, added_cond_kwargs=conditions).sample
            expected[row, column] = (prediction - noise).square().mean()
    torch.testing.assert_close(curve, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.noise_levels, torch.tensor([0.166, 0.5, 0.833]))
    torch.testing.assert_close(loss.curve(pipe, accelerator), curve, rtol=0, atol=0)


def test_a_measurement_holds_samples_losses_and_figures(pipe, loss, accelerator) -> None:
    encoder = Encoder(Path(__file__).parents[2] / "examples" / "assets" / "clip-tiny", device="cpu")
    references = [sample.image.load() for sample in loss.samples]
    settings = SampleSettings(["a sks cube"], 2, seed=7, batch_size=2, call=CALL)
    run: Any = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(identifier=["sks"]))
    blind = Evaluation(run, pipe, settings, loss, references).measure(None, "before")
    assert (blind.similarity, blind.text_alignment) == (None, None)
    found = Evaluation(run, pipe, settings, loss, references, encoder, encoder).measure(None, "after")
    assert found.similarity == pytest.approx(image_similarity(encoder, found.images, references))
    assert found.text_alignment == pytest.approx(text_alignment(encoder, found.images, ["a cube"] * 2))
    assert found.curve == blind.curve
    assert found.validation_loss == pytest.approx(sum(found.curve) / 3)


def test_encoder_out_of_reach_is_named_with_its_flag_and_the_way_without() -> None:
    args = SimpleNamespace(similarity_model="some/dino", alignment_model=None)
    args.pretrained_vae_model_name_or_path = "some/vae"  # not loaded yet, and out of reach, too
    message = r"--similarity_model some/dino can't be loaded \(the Hub can't be reached\): .* --alignment_model none"
    message += r" --pretrained_vae_model_name_or_path none\.$"
    with pytest.raises(ValueError, match=message):
        load_encoders(args, torch.device("cpu"))
