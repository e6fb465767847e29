"""Cached latents against the autoencoder's own posterior; a cache changes no bit, nor does a resumed run."""

import math
from typing import Any

import pytest
import torch

from nara_diffusion.dreambooth.cache.codecs import scale_latents
from nara_diffusion.dreambooth.cache.latents import LatentCache
from nara_diffusion.dreambooth.data.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.data.records import records_from_folder
from nara_diffusion.dreambooth.seeding import torch_generator
from nara_diffusion.training.stream import stream_loader
from tests.dreambooth.cache.latent_models import vae
from tests.dreambooth.data.pictures import folder_of

SCALED = {"scaling_factor": 0.13025}
SHIFTED = {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3], "latents_std": [0.5, 2.0, 1.5]}


@pytest.fixture
def data(tmp_path) -> DreamBoothDataset:
    records = records_from_folder(folder_of(tmp_path / "subject", [(50, 40), (40, 50), (60, 33)]), prompt="a toy")
    options: dict[str, Any] = {"batch_size": 2, "seed": 3, "crop": "random", "flip": True, "crops_per_image": 2}
    return DreamBoothDataset(records, [(24, 32), (32, 24)], class_images=records[:2], **options)


def batches(data: DreamBoothDataset, first: int = 0, stop: int = 20) -> list[dict[str, Any]]:
    return list(stream_loader(data, collate_samples, batch_size=2, first=first, stop=stop))


@pytest.mark.parametrize("config", [SCALED, SHIFTED])
def test_latents_are_drawn_from_the_posterior_and_scaled(data, config: dict[str, Any]) -> None:
    model = vae(**config)
    cache = LatentCache(model)
    for batch in batches(data):
        latents = cache.sample(batch["samples"], seed=11)
        h, w = batch["samples"][0].target_size
        assert latents.shape == (4, 3, h // 2, w // 2)
        for sample, latent in zip(batch["samples"], latents, strict=True):
            posterior = model.encode(sample.pixel_values()[None]).latent_dist
            generator = torch_generator(11, f"posterior {sample.role}", sample.position)
            z = posterior.mean[0] + posterior.std[0] * torch.randn(latent.shape, generator=generator)
            mean, std = (
                torch.tensor(config.get(name, [default] * 3)).view(3, 1, 1)
                for name, default in (("latents_mean", 0.0), ("latents_std", 1.0))
            )
            torch.testing.assert_close(latent, (z - mean) * config["scaling_factor"] / std)


def test_the_posterior_itself_and_its_middle(data) -> None:
    model = vae(**SHIFTED)
    cache = LatentCache(model)
    samples = data.plain_samples()[:1]
    mean, std = cache.posterior(samples)
    expected = model.encode(samples[0].pixel_values()[None]).latent_dist
    assert mean.equal(expected.mean)
    assert std.equal(expected.std)
    assert cache.mode(samples).equal(scale_latents(model, expected.mode()))


def test_noise_is_drawn_anew_at_each_position_and_role(data) -> None:
    cache = LatentCache(vae())
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in batches(data, stop=60):
        for sample, latent in zip(batch["samples"], cache.sample(batch["samples"], seed=0), strict=True):
            seen.setdefault(sample.key, []).append(latent)
    for latents in seen.values():
        assert len({latent.numpy().tobytes() for latent in latents}) == len(latents)
    again = cache.sample(batches(data)[0]["samples"], seed=0)
    assert again.equal(cache.sample(batches(data)[0]["samples"], seed=0))
    assert not again.equal(cache.sample(batches(data)[0]["samples"], seed=1))


@pytest.mark.parametrize("memory", [0.0, 0.01, None])
@pytest.mark.parametrize("on_disk", [False, True])
def test_no_bound_and_no_disk_changes_a_bit(data, tmp_path, memory: float | None, on_disk: bool) -> None:
    folder = tmp_path / "cache" if on_disk else None
    plain, cache = LatentCache(vae(), memory_mib=0), LatentCache(vae(), memory_mib=memory, folder=folder)
    for batch in batches(data, stop=12) * 2:
        assert cache.sample(batch["samples"], seed=4).equal(plain.sample(batch["samples"], seed=4))
    later = LatentCache(vae(), memory_mib=memory, folder=folder)
    for batch in batches(data, first=8, stop=12):
        assert later.sample(batch["samples"], seed=4).equal(plain.sample(batch["samples"], seed=4))


def test_a_resumed_run_and_another_batch_size_get_the_same_bits(data) -> None:
    """What is encoded together differs between the two; bits of a batched convolution would, too."""
    cache, resumed = LatentCache(vae()), LatentCache(vae())
    full = [cache.sample(batch["samples"], seed=4) for batch in batches(data)]
    rest = [resumed.sample(batch["samples"], seed=4) for batch in batches(data, first=10)]
    assert all(one.equal(other) for one, other in zip(full[5:], rest, strict=True))
    samples = batches(data)[0]["samples"]
    assert LatentCache(vae()).sample(samples[1:2], seed=4).equal(full[0][1:2])


def test_pixels_that_workers_loaded_give_the_same(data) -> None:
    data.load_pixels = True
    for batch in batches(data, stop=8):
        with_pixels = LatentCache(vae(), memory_mib=0).sample(
            batch["samples"], seed=0, pixel_values=batch["pixel_values"]
        )
        assert with_pixels.equal(LatentCache(vae(), memory_mib=0).sample(batch["samples"], seed=0))


def counted(model: Any, monkeypatch) -> list[int]:
    calls: list[int] = []
    encode = model.encode

    def count(pixels: torch.Tensor, *args: Any) -> Any:
        calls.append(len(pixels))
        return encode(pixels, *args)

    monkeypatch.setattr(model, "encode", count)
    return calls


def test_after_filling_nothing_is_encoded(data, tmp_path, monkeypatch) -> None:
    model = vae()
    calls = counted(model, monkeypatch)
    cache = LatentCache(model, folder=tmp_path / "cache")
    cache.fill(data.possible_samples(), progress=False)
    assert calls == [1] * len(list(data.possible_samples()))
    for batch in batches(data, stop=60):
        cache.sample(batch["samples"], seed=0)
    cache.fill(data.possible_samples(), progress=False)
    LatentCache(model, folder=tmp_path / "cache").fill(data.possible_samples(), progress=False)
    assert len(calls) == len(list(data.possible_samples()))


def test_filling_stops_where_the_bound_is_reached(data, monkeypatch) -> None:
    model = vae()
    calls = counted(model, monkeypatch)
    cache = LatentCache(model, memory_mib=3 * 2 * 3 * 12 * 16 * 4 / 2**20)  # three posteriors of (3, 12, 16)
    cache.fill(data.possible_samples(), progress=False)
    assert len(calls) == 4 < len(list(data.possible_samples()))


def test_another_autoencoder_finds_nothing_of_the_first_on_disk(data, tmp_path) -> None:
    samples = data.plain_samples()[:1]
    LatentCache(vae(1), folder=tmp_path / "cache").posterior(samples)
    other = LatentCache(vae(2), folder=tmp_path / "cache").posterior(samples)[0]
    assert other.equal(LatentCache(vae(2)).posterior(samples)[0])
    assert not other.equal(LatentCache(vae(1)).posterior(samples)[0])


def test_bfloat16_is_encoded_in_bfloat16_and_given_in_float32(data) -> None:
    cache = LatentCache(vae().to(torch.bfloat16))
    samples = data.plain_samples()[:1]
    latents = cache.sample(samples, seed=0)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, LatentCache(vae()).sample(samples, seed=0), atol=0.05, rtol=0.05)


def spoil(model: Any, value: float) -> Any:
    """As SDXL's autoencoder in float16: an inner activation leaves the range."""
    model.encoder.mid_block.register_forward_hook(lambda module, args, output: output * value)
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_float16_says_how_to_avoid_it(data, value: float) -> None:
    cache = LatentCache(spoil(vae().to(torch.float16), value))
    sample = data.plain_samples()[0]
    message = (
        rf"the autoencoder gives NaN or infinity for {sample.image.source.name}, computing in torch\.float16: SDXL's "
        r"own autoencoder overflows in float16\. Use --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix"
        r", or --upcast_vae to run it in float32, or --mixed_precision bf16"
    )
    with pytest.raises(ValueError, match=message):
        cache.sample([sample], seed=0)
    assert len(cache.cache) == 0


def test_nan_in_float32_blames_the_weights(data) -> None:
    with pytest.raises(ValueError, match=r"computing in torch\.float32: its weights are damaged"):
        LatentCache(spoil(vae(), math.nan)).sample(data.plain_samples(), seed=0)
