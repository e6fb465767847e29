"""What the autoencoder can show: against encode and decode by hand, and what a run says of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nara_diffusion.dreambooth import DreamBoothDataset, TrainingSample, records_from_folder
from nara_diffusion.dreambooth.reconstruction import reconstruct
from tests.dreambooth.pictures import folder_of
from tests.helpers.pipelines.families import small_flux2_dev, small_wan_images
from tests.helpers.small_pipelines import small_sdxl


@pytest.fixture
def samples(tmp_path: Path) -> list[TrainingSample]:
    records = records_from_folder(folder_of(tmp_path, [(40, 20), (30, 30)]), prompt="a toy")
    return DreamBoothDataset(records, [(32, 32)], batch_size=1, seed=0, crop="random").plain_samples()


@pytest.mark.parametrize("make", [small_sdxl, small_flux2_dev, small_wan_images], ids=lambda make: make.__name__)
def test_reconstructions_are_the_autoencoders_and_their_psnr_follows(make: Any, samples: list[TrainingSample]) -> None:
    vae, ratios = make().vae, []
    actual = reconstruct(vae, samples)
    for sample, image in zip(samples, actual.images, strict=True):
        pixels = sample.pixel_values()[None]
        if make is small_wan_images:
            pixels = pixels[:, :, None]
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        ratios.append(-10 * np.log10(((decoded - pixels) / 2).square().mean().item()))
        rgb = (127.5 * (decoded.reshape(3, 32, 32).permute(1, 2, 0) + 1)).numpy()
        assert np.abs(np.asarray(image) - rgb).max() <= 0.51
    assert actual.psnr == pytest.approx(np.mean(ratios), abs=1e-3)
    assert f"({actual.psnr:.1f} dB)" in actual.title


class Same(torch.nn.Module):
    """An autoencoder that changes pixels by `error`."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.config: Any = {}
        self.weight, self.error = torch.nn.Parameter(torch.zeros(1)), error

    def encode(self, pixels: torch.Tensor) -> Any:
        return type("Output", (), {"latent_dist": type("Latents", (), {"mean": pixels, "std": pixels})})

    def decode(self, latents: torch.Tensor) -> Any:
        return type("Output", (), {"sample": latents * 0.5 + self.error * 2})


@pytest.mark.parametrize(("grey", "error", "said"), [(128, 0.01, False), (128, 0.06, True)])
def test_log_has_a_line_below_25_db(grey, error, said, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (32, 32), (grey,) * 3).save(tmp_path / "grey.png")
    caplog.set_level(logging.INFO)
    records = records_from_folder(tmp_path, prompt="a toy")
    actual = reconstruct(Same(error), DreamBoothDataset(records, [(32, 32)], batch_size=1, seed=0).plain_samples())
    assert actual.psnr == pytest.approx(-20 * np.log10(error), abs=1)
    assert (f"at {actual.psnr:.1f} dB" in caplog.text) == said
