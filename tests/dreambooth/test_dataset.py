"""Samples: crops, what a position holds, and how often.

And latents, against the autoencoder's own posterior; their cache changes no bit.
"""

import io
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nara_diffusion.dreambooth.caches import LatentCache
from nara_diffusion.dreambooth.dataset import (
    BucketOrder,
    DreamBoothDataset,
    TrainingSample,
    collate_samples,
    scaled_size,
)
from nara_diffusion.dreambooth.draws import torch_generator
from nara_diffusion.dreambooth.image_records import ImageRecord, class_records
from nara_diffusion.dreambooth.source_images import records_from_folder
from nara_diffusion.utils.data_order import ShuffledStream, stream_loader
from tests.dreambooth.pictures import folder_of, noise
from tests.helpers.small_pipelines import small_vae

SIZES = [(80, 60), (60, 80), (70, 70), (90, 50), (66, 64)]  # (width, height)
BUCKETS = [(24, 40), (32, 32), (40, 24)]
MEAN, STD = [0.1, -0.2, 0.3], [0.5, 2.0, 1.5]


@pytest.fixture(scope="module")
def instances(tmp_path_factory) -> list[ImageRecord]:
    folder = folder_of(tmp_path_factory.mktemp("subject"), SIZES)
    for number in range(5):
        (folder / f"{number:02d}.txt").write_text(f"a photo of sks toy {number}")
    return records_from_folder(folder)


@pytest.fixture(scope="module")
def class_images(tmp_path_factory) -> list[ImageRecord]:
    folder = folder_of(tmp_path_factory.mktemp("class"), [(64, 64), (48, 48), (64, 32)])
    return class_records(folder, prompt="a photo of a toy")


def dataset(instances: list[ImageRecord], **changes: Any) -> DreamBoothDataset:
    options = {"batch_size": 2, "seed": 5, "crop": "random", "flip": True}
    return DreamBoothDataset(instances, **{"buckets": BUCKETS, **options, **changes})


def cut(picture: Image.Image, target: tuple[int, int], top: int, left: int, flip: bool) -> np.ndarray:
    """What a sample cuts out of `picture`, (h, w, 3) in 0 … 255."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    record = ImageRecord("picture", file.getvalue, (picture.height, picture.width), "a toy", "key")
    pixels = TrainingSample(record, target, top, left, flip, 0, "instance", "a toy").pixel_values()
    assert pixels.shape == (3, *target)
    assert pixels.dtype == torch.float32
    return (pixels.permute(1, 2, 0).numpy() + 1) * 127.5


@pytest.mark.parametrize(
    ("original", "target", "flip"),
    [((97, 61), (48, 32), True), ((61, 97), (48, 32), False), ((20, 33), (64, 64), True), ((64, 64), (64, 64), False)],
)
def test_one_resampling_gives_the_pixels_of_three_steps(original, target, flip: bool) -> None:
    picture, (height, width), (h, w) = noise(original[1], original[0]), scaled_size(original, target), target
    assert 0 in (height - h, width - w)  # it covers, and no more
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    resized = ImageOps.mirror(resized) if flip else resized
    for top, left in [(0, 0), ((height - h) // 2, (width - w) // 3), (height - h, width - w)]:
        expected = np.asarray(resized.crop((left, top, left + w, top + h))).astype(float)
        assert np.abs(cut(picture, target, top, left, flip) - expected).max() <= 1.01


def test_random_crops_reach_every_position_within_bounds(instances, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, tall = instances[3].key, instances[1].key  # 90 × 50, scaled to 58 × 32; 60 × 80, to 32 × 43

    def crops(count: int, number: int, key: str = wide) -> list[TrainingSample]:
        monkeypatch.setattr("nara_diffusion.dreambooth.dataset.CROPS", number)
        data = dataset(instances, buckets=[(32, 32)])
        samples = [data.samples_at(position)[0] for position in range(count)]
        return [sample for sample in samples if sample.image.key == key]

    anywhere = crops(1500, 10**6)
    assert {(sample.top, sample.left) for sample in anywhere} == {(0, left) for left in range(27)}
    upright = crops(1000, 10**6, tall)
    assert {(sample.top, sample.left) for sample in upright} == {(top, 0) for top in range(12)}
    bounded = Counter((sample.key, sample.flip) for sample in crops(600, 3))
    assert (bounded.total(), len(bounded)) == (120, 6)  # three positions, each mirrored or not
    assert min(bounded.values()) > 8
    assert abs(sum(count for (_, flip), count in bounded.items() if flip) - 60) < 20


def test_no_flip_and_center_crop_when_requested(instances) -> None:
    data = dataset(instances, buckets=[(32, 32)], crop="center", flip=False)
    samples = {sample.image.key: sample for position in range(50) for sample in data.samples_at(position)}
    assert samples[instances[3].key].time_ids == (50, 90, 0, 13, 32, 32)
    assert not any(sample.flip for sample in samples.values())
    assert [sample.key for sample in data.plain_samples()] == [samples[image.key].key for image in instances]


def test_batch_holds_one_bucket_and_round_each_image(instances, class_images) -> None:
    data = dataset(instances, class_images=class_images)
    keys = [data.samples_at(position)[1].image.key for position in range(12)]
    assert all(len(set(keys[start : start + 3])) == 3 for start in range(0, 12, 3))  # each before one comes again
    assert data.targets == [(24, 40), (40, 24), (32, 32), (24, 40), (32, 32)]
    for start in range(0, 40, 2):
        batch = collate_samples([data[start], data[start + 1]])
        samples = batch["samples"]
        assert [(sample.role, sample.position) for sample in samples] == [
            ("instance", start), ("instance", start + 1), ("class", start), ("class", start + 1),
        ]  # fmt: skip
        assert batch["prompts"] == [sample.image.prompt for sample in samples]
        assert len({sample.target for sample in samples}) == 1
        assert batch["time_ids"].dtype == torch.float32
        assert batch["time_ids"].tolist() == [list(sample.time_ids) for sample in samples]
    rounds = [[data.samples_at(10 * number + p)[0].image.key for p in range(10)] for number in range(4)]
    assert all(Counter(keys) == dict.fromkeys([image.key for image in instances], 2) for keys in rounds)
    assert any(one != other for one, other in pairwise(rounds))
    one_bucket, stream = BucketOrder([(8, 8)] * 5, 2, seed=3), ShuffledStream(range(5), seed=3)
    assert [one_bucket[p] for p in range(30)] == [stream.sample_at(p) for p in range(30)]


def test_captions_are_dropped_at_the_requested_rate_only(instances, class_images) -> None:
    plain = dataset(instances, class_images=class_images)
    data = dataset(instances, class_images=class_images, caption_dropout=0.3)
    pairs = [(data.samples_at(p), plain.samples_at(p)) for p in range(1000)]
    assert sum(one.prompt == "" for (one, _), _ in pairs) / 1000 == pytest.approx(0.3, abs=0.05)
    for (one, other), (expected, beside) in pairs:
        assert one.prompt in ("", expected.prompt)
        assert (one.key, other) == (expected.key, beside)
    assert all(sample.prompt for sample in data.plain_samples())


def test_images_that_are_too_small_are_named(instances, caplog) -> None:
    dataset(instances, crop="center").log_sizes()
    assert not caplog.text
    dataset(instances, buckets=[(64, 64)]).log_sizes()
    expected = f"3 of 5 images (such as {instances[0].name}) are smaller than --resolution and were enlarged"
    assert f"{expected}, so the model learns blur." in caplog.text


def test_random_crops_that_lose_much_warn_with_flags(tmp_path, caplog) -> None:
    wide = records_from_folder(folder_of(tmp_path, [(96, 54), (64, 64)]), prompt="a toy")
    squares = {"buckets": [(32, 32)]}
    dataset(wide, **squares).log_sizes()
    assert "random crops remove more than a fifth of 1 of 2 images, and up to 44 %" in caplog.text
    assert "--aspect_ratio_buckets auto" in caplog.text
    assert "--center_crop" in caplog.text
    caplog.clear()
    dataset(wide, **squares, crop="center").log_sizes()
    dataset(wide, buckets=[(32, 32), (24, 40)]).log_sizes()
    assert not caplog.text


# ---------------------------------------------------------------------- caches


@pytest.fixture
def data(instances, class_images) -> DreamBoothDataset:
    buckets = [(24, 32), (32, 24)]
    return dataset(instances, buckets=buckets, class_images=class_images[:2])


def batches(data: DreamBoothDataset, first: int = 0, stop: int = 20) -> list[dict[str, Any]]:
    return list(stream_loader(data, collate_samples, 2, range(first, stop)))


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


def test_bounds_batches_and_resume_change_no_bit(data) -> None:
    expected = [LatentCache(small_vae(), memory_mib=0).sample(batch["samples"], seed=4) for batch in batches(data)]
    for bound in (1024.0, 0.01):
        cache = LatentCache(small_vae(), memory_mib=bound)
        latents = [cache.sample(batch["samples"], seed=4) for batch in batches(data)]
        assert all(one.equal(other) for one, other in zip(latents, expected, strict=True))
        resumed = LatentCache(small_vae()).sample(batches(data, first=10)[0]["samples"], seed=4)
        assert resumed.equal(expected[5])
    batch = batches(data)[0]
    assert LatentCache(small_vae()).sample(batch["samples"][1:2], seed=4).equal(expected[0][1:2])
    assert not LatentCache(small_vae()).sample(batch["samples"], seed=5).equal(expected[0])


def test_each_crop_is_encoded_once_within_the_limit(data, monkeypatch, caplog) -> None:
    model, calls = small_vae(), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    cache = LatentCache(model)
    for _ in range(2):
        for batch in batches(data, stop=40):
            cache.sample(batch["samples"], seed=0)
    crops = {sample.key for batch in batches(data, stop=40) for sample in batch["samples"]}
    assert calls == [1] * len(crops)
    (room, samples), calls[:] = (2 * 2 * 4 * 12 * 16 * 4 / 2**20, data.plain_samples()[:3]), []  # two posteriors
    bounded = LatentCache(model, memory_mib=room)
    for sample in [*samples, *samples]:
        bounded.mode([sample])
    assert len(calls) == 4
    assert caplog.text.count("don't fit into memory") == 1
