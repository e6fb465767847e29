"""Folders as records: every kind of image is read right or refused by name, and so are captions."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nara_diffusion.dreambooth.captions import check_prompt, fill_captions, own_captions
from nara_diffusion.dreambooth.image_records import class_records, load_image, trained_on
from nara_diffusion.dreambooth.source_images import records_from_folder
from tests.dreambooth.pictures import folder_of, noise

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


def test_other_modes_become_rgb_and_transparent_parts_white(tmp_path) -> None:
    for mode in ("CMYK", "P", "L", "1"):
        stored = noise(40, 30).convert(mode)
        stored.save(tmp_path / f"{mode}.tif")
        assert np.array_equal(pixels(load_image(tmp_path / f"{mode}.tif")), pixels(stored.convert("RGB")))
    picture = noise(40, 30).convert("RGBA")
    alpha = np.full((30, 40), 255, dtype=np.uint8)
    alpha[:, :5], alpha[:, 5:20] = 128, 0
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "a.png")
    loaded, stored = pixels(load_image(tmp_path / "a.png")), pixels(picture)[..., :3]
    assert np.array_equal(loaded[:, 20:], stored[:, 20:])
    assert (loaded[:, 5:20] == 255).all()
    assert np.abs(loaded[:, :5] - (stored[:, :5] * 128 / 255 + 127)).max() <= 1


def test_unusable_images_are_all_named_at_once(tmp_path) -> None:
    folder = folder_of(tmp_path, [(64, 48)] * 5)
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:3000])
    Image.fromarray(np.full((5, 5), 40000, dtype=np.uint16)).save(folder / "01.png")  # of an unknown range
    (folder / "02.png").write_bytes(b"<html>404</html>")
    (folder / "04.png").write_bytes(b"")
    names = "".join(rf".*\n.*{name}\.png can't be decoded" for name in ("00", "01", "02", "04"))
    with pytest.raises(ValueError, match=f"(?s)4 of 5 images can't be used:{names}"):
        records_from_folder(folder, prompt=PROMPT)


def test_image_names_without_files_are_refused_briefly(tmp_path) -> None:
    folder = folder_of(tmp_path, [(8, 8)])
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "sub.png").mkdir()
    message = r"(?s)2 of 3 images .*gone\.png can't be read \(No such file.*sub\.png can't be read \(Is a directory"
    with pytest.raises(ValueError, match=message):
        records_from_folder(folder, prompt=PROMPT)


def test_message_of_broken_image_has_no_memory_address(tmp_path) -> None:
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.jpg can't be decoded \(not an image") as error:
        load_image(tmp_path / "page.jpg")
    assert "0x" not in str(error.value)


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


def test_non_images_are_left_out_with_a_warning(tmp_path, caplog) -> None:
    folder = folder_of(tmp_path, [(8, 8), (8, 8)])
    for name in ("00.txt", ".DS_Store", "._00.png", "notes.txt", "clip.mp4"):
        (folder / name).write_text("x")
    (folder / "old").mkdir()
    assert [record.prompt for record in records_from_folder(folder, prompt=PROMPT)] == ["x", PROMPT]
    assert "these files are ignored, since they aren't images: clip.mp4, notes.txt, old" in caplog.text
    assert [record.prompt for record in class_records(folder, prompt=" a toy ")] == ["a toy"] * 2


def test_folders_without_images_of_their_own_are_refused(tmp_path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            records_from_folder(folder, prompt=PROMPT)

    refused(tmp_path / "nowhere", "There is no folder .*nowhere: name one")
    refused(tmp_path, "contains no images: add")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    refused(tmp_path, r"contains no images, only IMG_1\.HEIC: add")
    folder_of(tmp_path / "10_sks dog", [(8, 8)])
    refused(tmp_path, "contains the folder '10_sks dog'. Repeats and prompts in a folder's name aren't supported")


def test_description_of_images_includes_prior_preservation(tmp_path) -> None:
    images = records_from_folder(folder_of(tmp_path / "images", [(8, 8)] * 2), prompt=PROMPT)
    prior = class_records(folder_of(tmp_path / "class", [(8, 8)] * 3), prompt="a photo of a dog")
    expected = f"2 images of “{PROMPT}”, and 3 images of “a photo of a dog” for prior preservation"
    assert trained_on(images, tmp_path / "images", PROMPT, prior) == expected
    (tmp_path / "images" / "00.txt").write_text("a cube")
    images = records_from_folder(tmp_path / "images", prompt=PROMPT)
    described = trained_on(images, tmp_path / "images", PROMPT, prior)
    assert described.endswith(f"the others as “{PROMPT}”, and 3 images of “a photo of a dog” for prior preservation")


# ---------------------------------------------------------------------- captions


@pytest.fixture
def images(tmp_path) -> list[Path]:
    """Three names; captions don't read pixels."""
    return [tmp_path / name for name in ("a.png", "b.jpg", "c.png")]


def captions_of(images: list[Path], prompt: str | None, column: str | None = None) -> list[str]:
    return fill_captions(own_captions(images, column), [image.name for image in images], prompt)


def test_captions_come_from_text_files_or_one_prompt(images, caplog) -> None:
    assert captions_of(images, f" {PROMPT}\n") == [PROMPT] * 3
    assert not caplog.text
    for image, text in zip(images, ("first", "second,\n with a line break \n", "dritte über"), strict=True):
        image.with_suffix(".txt").write_text(text, encoding="utf-8")
    assert captions_of(images, None) == ["first", "second, with a line break", "dritte über"]
    images[1].with_suffix(".txt").write_text(" \n")
    assert captions_of(images, PROMPT) == ["first", PROMPT, "dritte über"]
    assert f"1 of 3 images ('b.jpg') have no caption, so they get the instance prompt {PROMPT!r}" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 3 images \('b.jpg'\) have no caption. Give --instance_prompt"):
        captions_of(images, None)
    with pytest.raises(ValueError, match=r"5 of 5 images \('a.png', 'b.jpg', 'c.png' and 2 more\) have no caption"):
        fill_captions([""] * 5, ["a.png", "b.jpg", "c.png", "d.png", "e.png"], None)


def test_metadata_wins_over_text_files(images) -> None:
    images[0].with_suffix(".txt").write_text("from a file")
    rows = [{"file_name": image.name, "text": image.name, "said": f" {image.stem} "} for image in images]
    rows[2]["text"] = "a \U0001f600 toy"  # whole, though in two escapes
    lines = [json.dumps(row) for row in rows]
    (images[0].parent / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    assert captions_of(images, None) == ["a.png", "b.jpg", "a \U0001f600 toy"]
    assert captions_of(images, None, "said") == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["images/a.png", "A.png", "a.pgn"])
def test_metadata_row_without_image_is_refused_by_line(images, name) -> None:
    rows = [{"file_name": "b.jpg", "text": None}, {"file_name": name, "text": "a"}]
    (images[0].parent / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match=rf"metadata.jsonl, line 2: the folder has no image '{name}'.* such as 'a.png'"
    ):
        own_captions(images)


def test_images_without_a_metadata_row_are_warned_of(images, caplog) -> None:
    metadata = images[0].parent / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "text": "a"}\n{"file_name": "b.jpg", "text": null}')
    assert captions_of(images, PROMPT) == ["a", PROMPT, PROMPT]
    assert (
        f"2 of 3 images ('b.jpg', 'c.png') have no caption, so they get the instance prompt {PROMPT!r}" in caplog.text
    )


def test_unreadable_captions_are_refused_by_file_and_line(images) -> None:
    def refused(message: str, column: str | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            own_captions(images, column)

    refused("--caption_column 'said' names a key of metadata.jsonl, but .* has no such file", "said")
    images[1].with_suffix(".txt").write_bytes("über".encode("latin-1"))
    refused(r"b\.txt is not UTF-8 text .*: save it as UTF-8")
    lines = {
        '{"file_name": "a.png", "text": "a"': "expected .* got .*delimiter",
        "[1]": "expected",
        '{"text": "a"}': r"expected \{\"file_name\": \"…\", \"text\": \"…\"\}, got .*'file_name'",
        '{"file_name": "a.png", "caption": "a"}': "expected .*'text'",
        '{"file_name": "a.png", "text": ["a", "b"]}': "expected .*both must be texts in quotes",
        '{"file_name": ["a.png"], "text": "a"}': "expected .*both must be texts in quotes",
        '{"file_name": "a.png", "text": NaN}': "expected .*both must be texts in quotes",
        '{"file_name": "b.jpg", "text": "a"}': "a line above already has a caption for b.jpg",
        '{"file_name": "a.png", "n": %s}' % ("1" * 4301): "expected .*digits",
    }
    for line, message in lines.items():
        (images[0].parent / "metadata.jsonl").write_text(f'{{"file_name": "b.jpg", "text": "b"}}\n\n{line}\n')
        refused(f"metadata.jsonl, line 3:? {message}")
    with pytest.raises(ValueError, match="class_prompt is empty"):
        check_prompt(" \n", "class_prompt")
