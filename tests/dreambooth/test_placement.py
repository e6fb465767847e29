"""Models take turns on a device. The CPU stands for it, and weights that are away are NaN, so that their use shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from nara_diffusion.dreambooth import placement
from nara_diffusion.dreambooth.caches import LatentCache, PromptCache
from nara_diffusion.dreambooth.dataset import TrainingSample
from nara_diffusion.dreambooth.flow_families import FLUX
from nara_diffusion.dreambooth.image_records import ImageRecord
from nara_diffusion.dreambooth.pipelines import modules_of, sharing_pipeline
from nara_diffusion.dreambooth.placement import take_turns
from tests.helpers.small_pipelines import pixels, small_flux

DEVICE = torch.device("cpu", 0)  # not equal to torch.device("cpu"), where models are when they are away
Log = list[tuple[str, str]]


class Zeros(TrainingSample):
    def pixel_values(self) -> torch.Tensor:
        return torch.zeros(3, 16, 16)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """(class of a model, comes or goes) of each move. Models that share their weights move as one."""
    moves: Log = []
    away: dict[int, torch.Tensor] = {}

    def move(model: nn.Module, device: torch.device) -> None:
        weights = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        is_away = id(weights[0]) in away
        if (device != DEVICE) == is_away:
            return
        moves.append((type(model).__name__, "comes" if is_away else "goes"))
        for weight in weights:
            if is_away:
                weight.data = away.pop(id(weight))
            else:
                away[id(weight)] = weight.data
                weight.data = torch.full_like(weight.data, torch.nan)

    monkeypatch.setattr(placement, "move", move)
    yield moves
    moves.clear()


def frozen_flux() -> Any:
    pipe = small_flux()
    for model in modules_of(pipe).values():
        model.requires_grad_(False)
    return pipe


@pytest.mark.parametrize("is_tight", [False, True])
def test_models_take_turns_and_samples_keep_their_bits(is_tight: bool, log: Log) -> None:
    pipe = frozen_flux()
    expected = pixels(pipe)
    sampling = sharing_pipeline(pipe, torch.float32)
    for each in (pipe, sampling):
        take_turns(each, FLUX, DEVICE, (), is_tight)
    denoiser = "FluxTransformer2DModel"
    assert log == [("CLIPTextModel", "goes"), ("T5EncoderModel", "goes"), ("AutoencoderKL", "goes")]
    log.clear()
    assert torch.equal(pixels(sampling), expected)
    leaves = [(denoiser, "goes")] if is_tight else []
    returns = [(denoiser, "comes")] if is_tight else []
    assert log == [
        *leaves,
        ("CLIPTextModel", "comes"),
        ("CLIPTextModel", "goes"),  # the next encoder comes when the last is gone
        ("T5EncoderModel", "comes"),
        ("T5EncoderModel", "goes"),
        *returns,
        ("AutoencoderKL", "comes"),
    ]


def test_only_the_denoiser_stays_once_all_is_cached(log: Log) -> None:
    pipe = frozen_flux()
    family = replace(FLUX, max_sequence_length=12)
    take_turns(pipe, family, DEVICE, (), is_tight=True)
    prompts = PromptCache(pipe, family)
    prompts.fill(["a toy", "a red cube", "a toy"])
    image = ImageRecord("zeros", bytes, (16, 16), "a toy", "key")
    samples = [Zeros(image, (16, 16), 0, 0, False, 0, "instance", "a toy")]
    latents = LatentCache(pipe.vae)
    for step in range(2):
        log.clear()
        latents.sample(samples, seed=step)
        embeddings = prompts.get(["a red cube", "a toy"])
        assert all(part.isfinite().all() for part in embeddings)
        sample, timestep = torch.randn(2, 4, 8, 8), torch.tensor([200.0, 900.0])
        output = family.predict(pipe.transformer, sample, timestep, torch.zeros(2, 6), embeddings)
        assert output.isfinite().all()
    assert log == []
    # the autoencoder was on the device in the first step only
    assert pipe.vae.encoder.conv_in.weight.isnan().all()
    assert pipe.text_encoder_2.shared.weight.isnan().all()


def test_trained_encoders_and_a_cpu_stay(log: Log) -> None:
    pipe = frozen_flux()
    take_turns(pipe, FLUX, torch.device("cpu"), (), is_tight=True)
    assert log == []
    take_turns(pipe, FLUX, DEVICE, ("text_encoder",), is_tight=True)
    assert ("CLIPTextModel", "goes") not in log
    log.clear()
    assert pixels(pipe).isfinite().all()
    assert ("CLIPTextModel", "goes") not in log
