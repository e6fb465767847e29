"""Draws: what a position holds, how often, and that neither workers, processes nor a resume change it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader

from nara_diffusion.dreambooth.data.buckets import make_buckets
from nara_diffusion.dreambooth.data.crops import crop_image, to_pixels
from nara_diffusion.dreambooth.data.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.data.images import ImageError
from nara_diffusion.dreambooth.data.records import ImageRecord, class_records, records_from_folder
from nara_diffusion.training.stream import stream_loader
from tests.dreambooth.data.pictures import folder_of, noise

SIZES = [(80, 60), (60, 80), (70, 70), (90, 50), (66, 64)]  # (width, height)
BUCKETS = make_buckets(32, divisor=8)


@pytest.fixture
def instances(tmp_path) -> list[ImageRecord]:
    folder = folder_of(tmp_path / "subject", SIZES)
    for number in range(5):
        (folder / f"{number:02d}.txt").write_text(f"a photo of sks toy {number}")
    return records_from_folder(folder)


@pytest.fixture
def class_images(tmp_path) -> list[ImageRecord]:
    return class_records(folder_of(tmp_path / "class", [(64, 64), (48, 48), (64, 32)]), prompt="a photo of a toy")


def dataset(instances: list[ImageRecord], **changes: Any) -> DreamBoothDataset:
    options = {"batch_size": 2, "seed": 5, "crop": "random", "flip": True}
    return DreamBoothDataset(instances, **{"buckets": BUCKETS, **options, **changes})


def test_what_a_batch_holds(instances, class_images) -> None:
    data = dataset(instances, class_images=class_images, load_pixels=True)
    for start in range(0, 40, 2):
        batch = collate_samples([data[start], data[start + 1]])
        samples = batch["samples"]
        assert [sample.role for sample in samples] == ["instance", "instance", "class", "class"]
        assert batch["is_class"].tolist() == [False, False, True, True]
        assert batch["sample_indices"].tolist() == [start, start + 1] * 2
        assert batch["prompts"] == [sample.image.prompt for sample in samples]
        assert batch["prompts"][2:] == ["a photo of a toy"] * 2
        assert len({sample.target_size for sample in samples}) == 1
        assert batch["time_ids"].dtype == torch.float32
        assert batch["pixel_values"].shape == (4, 3, *samples[0].target_size)
        for row, sample in enumerate(samples):
            assert sample.original_size == sample.image.size
            expected = [*sample.image.size, *sample.crop_top_left, *sample.target_size]
            assert batch["time_ids"][row].tolist() == expected
            assert batch["pixel_values"][row].equal(to_pixels(crop_image(sample.image.source.load(), sample.crop)))
    assert "pixel_values" not in collate_samples([dataset(instances)[0]])


def test_images_go_to_the_bucket_of_their_shape(instances) -> None:
    assert dataset(instances).instance_buckets == [(24, 40), (40, 24), (32, 32), (24, 40), (32, 32)]
    assert set(dataset(instances, buckets=[(32, 32)]).instance_buckets) == {(32, 32)}


def test_crops_and_flips_change_from_draw_to_draw(instances) -> None:
    data = dataset(instances, buckets=[(32, 32)], crops_per_image=3)
    seen: dict[str, Counter] = {}
    for position in range(600):
        (sample,) = data.samples_at(position)
        seen.setdefault(sample.image.key, Counter())[sample.crop] += 1
    wide = seen[instances[3].key]  # 90 × 50, scaled to 58 × 32: room for 27 positions
    assert sum(wide.values()) == 120
    assert len(wide) == 6  # three positions, each mirrored or not
    assert abs(sum(count for crop, count in wide.items() if crop.flip) - 60) < 20
    assert min(wide.values()) > 8
    assert {crop.left for crop in wide} != {13}


def test_no_flip_and_the_middle_where_they_are_asked_for(instances) -> None:
    data = dataset(instances, buckets=[(32, 32)], crop="center", flip=False)
    crops = {sample.image.key: sample.crop for position in range(50) for sample in data.samples_at(position)}
    assert crops[instances[3].key].time_ids == (50, 90, 0, 13, 32, 32)
    assert crops[instances[1].key].time_ids == (80, 60, 5, 0, 32, 32)
    assert not any(crop.flip for crop in crops.values())
    assert [sample.crop for sample in data.plain_samples()] == [crops[image.key] for image in instances]


def test_any_position_reaches_all_of_them(instances) -> None:
    data = dataset(instances, buckets=[(32, 32)], crops_per_image=None)
    lefts = {
        sample.crop.left for p in range(1500) for sample in data.samples_at(p) if sample.image.key == instances[3].key
    }
    assert lefts == set(range(27))


@pytest.mark.parametrize(("crop", "flip"), [("random", True), ("random", False), ("center", True), ("center", False)])
def test_possible_draws_are_those_that_occur(instances, class_images, crop: str, flip: bool) -> None:
    data = dataset(instances, class_images=class_images, crop=crop, flip=flip, crops_per_image=2)
    possible = [sample.key for sample in data.possible_samples()]
    occurring = {sample.key for position in range(1500) for sample in data.samples_at(position)}
    assert len(possible) == len(set(possible))
    assert set(possible) == occurring


@pytest.mark.parametrize("crops_per_image", [2, None])
def test_distinct_draws_are_those_of_the_positions(instances, class_images, crops_per_image: int | None) -> None:
    data = dataset(instances, class_images=class_images, crops_per_image=crops_per_image)
    keys = [sample.key for sample in data.distinct_samples(range(10, 24))]
    assert len(keys) == len(set(keys))
    assert set(keys) == {sample.key for position in range(10, 24) for sample in data.samples_at(position)}


def test_equal_keys_mean_equal_pixels(instances) -> None:
    data = dataset(instances)
    pixels: dict[str, torch.Tensor] = {}
    for sample in data.possible_samples():
        pixels[sample.key] = sample.pixel_values()
    assert len({values.numpy().tobytes() for values in pixels.values()}) == len(pixels)
    for position in range(30):
        (sample,) = data.samples_at(position)
        assert pixels[sample.key].equal(sample.pixel_values())


def as_rows(batches: Any) -> list[tuple]:
    return [
        (sample.position, sample.key, sample.prompt, sample.role)
        for batch in batches
        for sample in batch["samples"]  # in the order of the batch
    ]


def test_a_resumed_run_goes_on_with_the_same_draws(instances, class_images) -> None:
    everything = dataset(instances, class_images=class_images)
    rows = as_rows(stream_loader(everything, collate_samples, batch_size=2, first=0, stop=40))
    resumed = dataset(instances, class_images=class_images)
    assert as_rows(stream_loader(resumed, collate_samples, batch_size=2, first=14, stop=40)) == rows[2 * 14 :]
    other = dataset(instances, class_images=class_images, seed=6)
    assert as_rows(stream_loader(other, collate_samples, batch_size=2, first=0, stop=40)) != rows


def test_workers_give_the_same_batches(instances, class_images) -> None:
    options = {"batch_size": 2, "first": 4, "stop": 24}
    data = dataset(instances, class_images=class_images, load_pixels=True)
    alone = list(stream_loader(data, collate_samples, **options))
    shared = list(stream_loader(data, collate_samples, **options, num_workers=2))
    assert as_rows(shared) == as_rows(alone)
    for one, other in zip(alone, shared, strict=True):
        assert one["pixel_values"].equal(other["pixel_values"])
        assert one["time_ids"].equal(other["time_ids"])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(instances, class_images, processes: int) -> None:
    """Accelerate deals out whole batches, so each stays in one bucket; together they are those of one process."""

    def loader():
        data = dataset(instances, class_images=class_images)
        return stream_loader(data, collate_samples, batch_size=2, first=12, stop=12 + 2 * processes * 4)

    alone = [as_rows([batch]) for batch in loader()]
    device = torch.device("cpu")
    dealt = [
        [
            as_rows([batch])
            for batch in prepare_data_loader(
                loader(), device, num_processes=processes, process_index=rank, put_on_device=True
            )
        ]
        for rank in range(processes)
    ]
    together = [batch for turn in zip(*dealt, strict=True) for batch in turn]
    assert together == alone


def test_each_class_image_comes_once_before_one_comes_again(instances, class_images) -> None:
    data = dataset(instances, class_images=class_images)
    keys = [data.samples_at(position)[1].image.key for position in range(12)]
    for start in range(0, 12, 3):
        assert set(keys[start : start + 3]) == {image.key for image in class_images}


def test_a_class_image_has_flips_and_crops_of_its_own(instances, class_images) -> None:
    data = dataset(instances, class_images=class_images)
    pairs = Counter((one.crop.flip, other.crop.flip) for one, other in map(data.samples_at, range(400)))
    assert len(pairs) == 4
    assert min(pairs.values()) > 70


def test_instances_do_not_change_when_class_images_come_in(instances, class_images) -> None:
    with_class = dataset(instances, class_images=class_images)
    without = dataset(instances)
    assert [with_class.samples_at(p)[0] for p in range(30)] == [without.samples_at(p)[0] for p in range(30)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "top"}, "crop is 'top', expected center or random"),
        ({"crops_per_image": 0}, "crops_per_image is 0, expected 1 or more, or none"),
        ({"buckets": []}, "there are no buckets"),
    ],
)
def test_wrong_choices_are_refused(instances, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(instances, **changes)
    with pytest.raises(ValueError, match="no training images"):
        dataset([])
    with pytest.raises(ValueError, match="can't be listed: set crops_per_image"):
        list(dataset(instances, crops_per_image=None).possible_samples())


def test_images_that_are_too_small_are_told(instances, caplog) -> None:
    dataset(instances)
    assert not caplog.text
    dataset(instances, buckets=[(64, 64)])
    message = (
        f"3 of 5 images are enlarged, and teach blur: {instances[0].source.name} has 60 x 80 pixels and is trained at "
        "64 x 64. Lower --resolution, or use larger images"
    )
    assert message in caplog.text


def test_one_image_trains_with_a_warning(instances, caplog) -> None:
    data = dataset(instances[:1])
    assert {sample.image.key for position in range(9) for sample in data.samples_at(position)} == {instances[0].key}
    assert "there is one image only: the adapter will learn that picture rather than its subject" in caplog.text


def test_a_file_that_changed_is_named(instances) -> None:
    (sample,) = dataset(instances).samples_at(0)
    path = Path(sample.image.source.name)
    noise(20, 30).save(path)
    with pytest.raises(ImageError, match=rf"{path.name} was changed since the run began"):
        sample.pixel_values()
    path.unlink()
    with pytest.raises(ImageError, match=rf"{path.name} can't be read: No such file"):
        sample.pixel_values()


def test_gradient_of_sizes_is_right_way_round(instances) -> None:
    """(H, W) of a 90 × 50 picture is (50, 90), and its pixels (3, h, w)."""
    (plain,) = (sample for sample in dataset(instances).plain_samples() if sample.image.key == instances[3].key)
    assert plain.original_size == (50, 90)
    assert plain.target_size == (24, 40)
    assert plain.pixel_values().shape == (3, 24, 40)
    assert np.asarray(plain.image.source.load()).shape == (50, 90, 3)
