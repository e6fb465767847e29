"""Caches against the autoencoder's own posterior and the pipeline's own embeddings; a cache changes no bit."""

from typing import Any

import pytest
import torch

from nara_diffusion.dreambooth.cache import LatentCache, PromptCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.draws import torch_generator
from nara_diffusion.dreambooth.image_records import records_from_folder
from nara_diffusion.training.stream import stream_loader
from tests.dreambooth.pictures import folder_of
from tests.helpers.small_pipelines import small_sdxl, small_vae

MEAN, STD = [0.1, -0.2, 0.3], [0.5, 2.0, 1.5]
PROMPTS = ["a photo of toy", "a red cube on grass", "a photo of toy"]


@pytest.fixture
def data(tmp_path) -> DreamBoothDataset:
    records = records_from_folder(folder_of(tmp_path / "subject", [(50, 40), (40, 50), (60, 33)]), prompt="a toy")
    options: dict[str, Any] = {"batch_size": 2, "seed": 3, "crop": "random", "flip": True, "crops_per_image": 2}
    return DreamBoothDataset(records, [(24, 32), (32, 24)], class_images=records[:2], **options)


def batches(data: DreamBoothDataset, first: int = 0, stop: int = 20) -> list[dict[str, Any]]:
    return list(stream_loader(data, collate_samples, batch_size=2, first=first, stop=stop))


@pytest.mark.parametrize("shifted", [False, True])
def test_latents_are_drawn_from_the_posterior_and_scaled(data, shifted: bool) -> None:
    model = small_vae(3, scaling_factor=0.5, **({"latents_mean": MEAN, "latents_std": STD} if shifted else {}))
    m, d = torch.tensor([MEAN, STD] if shifted else [[0.0] * 3, [1.0] * 3])[:, :, None, None]
    cache = LatentCache(model)
    for batch in batches(data):
        latents = cache.sample(batch["samples"], seed=11)
        for sample, latent in zip(batch["samples"], latents, strict=True):
            posterior = model.encode(sample.pixel_values()[None]).latent_dist
            generator = torch_generator(11, f"posterior {sample.role}", sample.position)
            z = posterior.mean[0] + posterior.std[0] * torch.randn(latent.shape, generator=generator)
            torch.testing.assert_close(latent, (z - m) * 0.5 / d)
    samples = data.plain_samples()[:1]
    mode = model.encode(samples[0].pixel_values()[None]).latent_dist.mode()
    torch.testing.assert_close(cache.mode(samples), (mode - m) * 0.5 / d)


def test_neither_bounds_nor_batches_nor_a_resume_change_a_bit(data) -> None:
    expected = [LatentCache(small_vae(), memory_mib=0).sample(batch["samples"], seed=4) for batch in batches(data)]
    for bound in (1024.0, 0.01):
        cache = LatentCache(small_vae(), memory_mib=bound)
        found = [cache.sample(batch["samples"], seed=4) for batch in batches(data)]
        assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
        resumed = LatentCache(small_vae()).sample(batches(data, first=10)[0]["samples"], seed=4)
        assert resumed.equal(expected[5])
    batch = batches(data)[0]
    assert LatentCache(small_vae()).sample(batch["samples"][1:2], seed=4).equal(expected[0][1:2])
    assert not LatentCache(small_vae()).sample(batch["samples"], seed=5).equal(expected[0])


def test_each_crop_is_encoded_once_while_there_is_room(data, monkeypatch, caplog) -> None:
    model, calls = small_vae(), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    cache = LatentCache(model)
    for _ in range(2):
        for batch in batches(data, stop=40):
            cache.sample(batch["samples"], seed=0)
    crops = {sample.key for batch in batches(data, stop=40) for sample in batch["samples"]}
    assert calls == [1] * len(crops)
    (room, samples), calls[:] = (2 * 2 * 4 * 12 * 16 * 4 / 2**20, data.plain_samples()), []  # two posteriors
    bounded = LatentCache(model, memory_mib=room)
    for sample in [*samples, *samples]:
        bounded.mode([sample])
    assert len(calls) == 4
    assert caplog.text.count("don't fit into memory") == 1


def test_embeddings_are_those_of_the_pipeline_each_encoded_once(monkeypatch) -> None:
    pipe, calls = small_sdxl(), []
    forward = pipe.text_encoder.forward
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda ids, **o: calls.append(len(ids)) or forward(ids, **o))
    cache = PromptCache(pipe)
    embeds, pooled = cache.get(PROMPTS)
    cache.get(PROMPTS)
    assert calls == [1, 1]
    for row, prompt in enumerate(PROMPTS):
        expected, _, pooled_alone, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        assert embeds[row : row + 1].equal(expected)
        assert pooled[row : row + 1].equal(pooled_alone)
    assert not embeds.requires_grad
