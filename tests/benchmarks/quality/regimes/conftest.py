"""A few random latents in the place of pictures, on the shipped model."""

import pytest
import torch
from quality.assets import ASSETS
from quality.images.held_out import BINS, CleanBin
from quality.images.subjects import SUBJECTS, instance_prompt
from quality.regimes.images.data import RegimeData, base_pipeline

from nara_diffusion.dreambooth.cache import LatentCache, PromptCache
from nara_diffusion.dreambooth.data.image_records import records_from_folder

ROWS = 3  # of a bin


@pytest.fixture(scope="session")
def data() -> RegimeData:
    """The five pictures of the toy to learn from, random latents to measure on."""
    pipe = base_pipeline()
    prompts = PromptCache(pipe)
    records = records_from_folder(ASSETS / SUBJECTS["toy"], prompt=instance_prompt("toy"), progress=False)
    generator = torch.Generator().manual_seed(7)
    return RegimeData(pipe, LatentCache(pipe.vae), prompts, records, [_bin(i, prompts, generator) for i in range(BINS)])


def _bin(index: int, prompts: PromptCache, generator: torch.Generator) -> CleanBin:
    clean, noise = torch.randn(2, ROWS, 4, 16, 16, generator=generator)
    return CleanBin(
        clean,
        noise,
        torch.tensor([100 * index + place for place in (0, 37, 99)]),
        torch.tensor([[128.0, 128.0, 0.0, 0.0, 64.0, 64.0]]).expand(ROWS, 6),
        prompts.get([instance_prompt("toy")] * ROWS),
        ["pose", "pose", "place"],
    )
