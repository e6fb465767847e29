"""Folders and data sets as records: every kind of image is read right or refused by name."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nara_diffusion.dreambooth.image_records import (
    class_records,
    load_image,
    records_from_folder,
)
from tests.dreambooth.pictures import folder_of, gradient, noise

PROMPT = "a photo of sks toy"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_exif_rotation_is_applied(tmp_path, orientation: int) -> None:
    turn = {6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}.get(orientation)
    upright, exif = noise(30, 20), Image.Exif()
    exif[0x0112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB"
    assert np.array_equal(pixels(loaded), pixels(upright))


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1"])
def test_other_modes_become_rgb(tmp_path, mode: str) -> None:
    stored = gradient(40, 30).convert(mode)
    stored.save(tmp_path / "a.tif")
    assert np.array_equal(pixels(load_image(tmp_path / "a.tif")), pixels(stored.convert("RGB")))


def test_transparent_parts_become_white(tmp_path) -> None:
    picture = gradient(40, 30).convert("RGBA")
    alpha = np.full((30, 40), 255, dtype=np.uint8)
    alpha[:, :5], alpha[:, 5:20] = 128, 0
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "a.png")
    loaded, stored = pixels(load_image(tmp_path / "a.png")), pixels(picture)[..., :3]
    assert np.array_equal(loaded[:, 20:], stored[:, 20:])
    assert (loaded[:, 5:20] == 255).all()
    assert np.abs(loaded[:, :5] - (stored[:, :5] * 128 / 255 + 127)).max() <= 1


def truncated(path: Path) -> None:
    noise(64, 48).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def of_unknown_range(path: Path) -> None:
    Image.fromarray(np.full((5, 5), 40000, dtype=np.uint16)).save(path)


@pytest.mark.parametrize("make", [truncated, of_unknown_range, lambda path: path.write_bytes(b"<html>404</html>")])
def test_images_that_cannot_be_used_are_named_all_at_once(tmp_path, make) -> None:
    folder = folder_of(tmp_path, [(20, 20)] * 3)
    make(folder / "00.png")
    (folder / "02.png").write_bytes(b"")
    message = r"(?s)2 of 3 images can't be used:\n.*00\.png can't be decoded.*\n.*02\.png can't be decoded"
    with pytest.raises(ValueError, match=message):
        records_from_folder(folder, prompt=PROMPT)


def test_a_folder_becomes_records_in_order_of_names(tmp_path) -> None:
    folder = folder_of(tmp_path / "subject", [(30, 20), (11, 12)])
    noise(40, 25, seed=9).save(folder / "aa.JPG")
    records = records_from_folder(folder, prompt=PROMPT)
    assert [Path(record.name).name for record in records] == ["00.png", "01.png", "aa.JPG"]
    assert [record.size for record in records] == [(20, 30), (12, 11), (25, 40)]  # (H, W)
    assert [record.prompt for record in records] == [PROMPT] * 3
    again = records_from_folder(folder_of(tmp_path / "other", [(30, 20)]), prompt="another")[0]
    assert again.key == records[0].key
    assert len({record.key for record in records}) == 3
    there = pickle.loads(pickle.dumps(records[1]))  # in a worker
    assert np.array_equal(pixels(there.load()), pixels(noise(11, 12, seed=1)))


def test_what_is_no_image_is_left_out_with_a_warning(tmp_path, caplog) -> None:
    folder = folder_of(tmp_path, [(8, 8), (8, 8)])
    for name in ("00.txt", ".DS_Store", "._00.png", "notes.txt", "clip.mp4"):
        (folder / name).write_text("x")
    (folder / "old").mkdir()
    assert [record.prompt for record in records_from_folder(folder, prompt=PROMPT)] == ["x", PROMPT]
    assert "left out what isn't an image: clip.mp4, notes.txt, old" in caplog.text


def test_folders_without_images_of_their_own_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the image folder .*nowhere doesn't exist"):
        records_from_folder(tmp_path / "nowhere", prompt=PROMPT)
    with pytest.raises(ValueError, match=r"the image folder .* holds no images: put"):
        records_from_folder(tmp_path, prompt=PROMPT)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no images, only IMG_1\.HEIC: put"):
        records_from_folder(tmp_path, prompt=PROMPT)
    folder_of(tmp_path / "10_sks dog", [(8, 8)])
    with pytest.raises(ValueError, match=r"holds '10_sks dog': repeats and a prompt in a folder's name aren't read"):
        records_from_folder(tmp_path, prompt=PROMPT)


def test_class_images_all_have_the_class_prompt(tmp_path) -> None:
    folder = folder_of(tmp_path, [(8, 8)] * 3)
    (folder / "00.txt").write_text("not for class images")
    assert [record.prompt for record in class_records(folder, prompt=" a toy ")] == ["a toy"] * 3
