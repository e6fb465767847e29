"""Folders and data sets as records: sizes, prompts, and everything that a folder should not hold."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nara_diffusion.dreambooth.data.records import class_records, records_from_dataset, records_from_folder
from tests.dreambooth.data.pictures import folder_of, noise

PROMPT = "a photo of sks toy"


def test_a_folder_becomes_records_in_order_of_names(tmp_path) -> None:
    folder = folder_of(tmp_path / "subject", [(30, 20), (11, 12)])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 25, seed=9).save(folder / "aa.jpg", exif=exif)
    records = records_from_folder(folder, prompt=PROMPT)
    assert [Path(record.source.name).name for record in records] == ["00.png", "01.png", "aa.jpg"]
    assert [record.size for record in records] == [(20, 30), (12, 11), (40, 25)]  # (H, W), the last one upright
    assert [record.prompt for record in records] == [PROMPT] * 3
    assert len({record.key for record in records}) == 3
    assert np.array_equal(np.asarray(records[1].source.load()), np.asarray(noise(11, 12, seed=1)))


def test_the_key_is_that_of_the_content(tmp_path) -> None:
    first = folder_of(tmp_path / "a", [(9, 9), (8, 8)])
    second = folder_of(tmp_path / "b", [(9, 9)])
    keys = [record.key for record in records_from_folder(first, prompt=PROMPT)]
    assert records_from_folder(second, prompt="another")[0].key == keys[0]
    noise(9, 9, seed=5).save(first / "00.png")
    changed = [record.key for record in records_from_folder(first, prompt=PROMPT)]
    assert changed[0] != keys[0]
    assert changed[1] == keys[1]


def test_records_travel_to_worker_processes(tmp_path) -> None:
    record = records_from_folder(folder_of(tmp_path, [(9, 7)]), prompt=PROMPT)[0]
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(record)).source.load()), np.asarray(noise(9, 7)))


def test_captions_come_with_the_folder(tmp_path) -> None:
    folder = folder_of(tmp_path, [(8, 8), (8, 8)])
    rows = [{"file_name": "01.png", "caption": "second"}, {"file_name": "00.png", "caption": "first"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [record.prompt for record in records_from_folder(folder, caption_column="caption")] == ["first", "second"]


def test_junk_beside_the_images_is_left_out_and_told(tmp_path, caplog) -> None:
    folder = folder_of(tmp_path, [(8, 8), (8, 8)])
    (folder / "01.caption").write_text("y")
    for name in ("00.txt", ".DS_Store", "._00.png", "Thumbs.db", "notes.txt", "clip.mp4"):
        (folder / name).write_text("x")
    (folder / "old").mkdir()
    records = records_from_folder(folder, prompt=PROMPT)
    assert [record.prompt for record in records] == ["x", "y"]
    assert f"{folder}: left out 4 entries that aren't images: Thumbs.db, clip.mp4, notes.txt, old" in caplog.text
    assert "DS_Store" not in caplog.text


def test_an_empty_folder_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the image folder .* is empty: put \.png or \.jpg files into it"):
        records_from_folder(tmp_path, prompt=PROMPT)


def test_a_folder_of_other_files_is_refused_with_what_was_found(tmp_path) -> None:
    for name in ("IMG_1.HEIC", "IMG_2.HEIC"):
        (tmp_path / name).write_bytes(b"x")
    message = r"holds no images, only IMG_1\.HEIC, IMG_2\.HEIC: .*HEIC and raw photos have to be converted"
    with pytest.raises(ValueError, match=message):
        records_from_folder(tmp_path, prompt=PROMPT)


def test_all_broken_images_are_named_at_once(tmp_path) -> None:
    folder = folder_of(tmp_path, [(20, 20)] * 3)
    whole = (folder / "00.png").read_bytes()
    (folder / "00.png").write_bytes(whole[:200])
    (folder / "02.png").write_bytes(b"")
    message = r"(?s)2 of 3 images can't be used:\n.*00\.png can't be decoded.*\n.*02\.png can't be decoded"
    with pytest.raises(ValueError, match=message):
        records_from_folder(folder, prompt=PROMPT)


def test_a_class_folder_that_is_too_small_is_refused(tmp_path) -> None:
    folder = folder_of(tmp_path, [(8, 8)] * 3)
    (folder / "00.txt").write_text("not for class images")
    assert [record.prompt for record in class_records(folder, prompt="a toy", minimum=3)] == ["a toy"] * 3
    with pytest.raises(ValueError, match=r"holds 3 images, and 4 are needed"):
        class_records(folder, prompt="a toy", minimum=4)
    with pytest.raises(ValueError, match="class_prompt is empty"):
        class_records(folder, prompt=" ")


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """What `datasets` calls an image folder, with a rotated photo in it."""
    folder = folder_of(tmp_path / "data", [(30, 20), (11, 12)])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 25, seed=9).save(folder / "aa.jpg", exif=exif)
    rows = [
        {"file_name": name, "said": text} for name, text in (("00.png", "one"), ("01.png", ""), ("aa.jpg", "three"))
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def load(folder: Path, **options):
    return records_from_dataset(str(folder), cache_dir=str(folder.parent / "cache"), **options)


def test_a_data_set_gives_the_same_records_as_its_folder(image_folder) -> None:
    records = load(image_folder, caption_column="said", prompt=PROMPT)
    expected = records_from_folder(image_folder, caption_column="said", prompt=PROMPT)
    assert [record.prompt for record in records] == ["one", PROMPT, "three"]
    assert [(r.size, r.prompt, r.key) for r in records] == [(r.size, r.prompt, r.key) for r in expected]
    for record, other in zip(records, expected, strict=True):
        assert np.array_equal(np.asarray(record.source.load()), np.asarray(other.source.load()))
    assert [record.prompt for record in load(image_folder, prompt=PROMPT)] == [PROMPT] * 3


def test_a_parquet_file_keeps_its_images_inside(image_folder) -> None:
    from datasets import load_dataset

    rows = load_dataset(str(image_folder), split="train", cache_dir=str(image_folder.parent / "cache"))
    (image_folder.parent / "packed").mkdir()
    rows.to_parquet(str(image_folder.parent / "packed" / "train.parquet"))
    records = load(image_folder.parent / "packed", prompt=PROMPT)
    assert [record.size for record in records] == [(20, 30), (12, 11), (40, 25)]
    assert records[1].source.name == f"image 2 of {image_folder.parent / 'packed'}"
    again = pickle.loads(pickle.dumps(records[1])).source.load()
    assert np.array_equal(np.asarray(again), np.asarray(noise(11, 12, seed=1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, "has no image_column 'picture', only image, said"),
        ({"caption_column": "text"}, "has no caption_column 'text', only image, said"),
        ({"image_column": "said"}, "image_column 'said' of .* holds no images"),
        ({"caption_column": "said"}, r"1 of 3 images \(image 2 of .*\) have no caption in column 'said'"),
        ({}, "no instance_prompt and no captions were given"),
    ],
)
def test_columns_that_do_not_fit_are_refused(image_folder, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(image_folder, **options)


def test_a_data_set_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"dataset_name .*nowhere can't be loaded: "):
        load(tmp_path / "nowhere", prompt=PROMPT)
