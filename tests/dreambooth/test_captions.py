"""Captions from one prompt, from text files, from metadata.jsonl; and what happens where they are missing."""

import json
from pathlib import Path

import pytest

from nara_diffusion.dreambooth.image_records import check_prompt, fill_captions, own_captions

PROMPT = "a photo of sks toy"


@pytest.fixture
def images(tmp_path) -> list[Path]:
    """Three names; captions don't read pixels."""
    return [tmp_path / name for name in ("a.png", "b.jpg", "c.png")]


def captions_of(images: list[Path], prompt: str | None, column: str | None = None) -> list[str]:
    return fill_captions(own_captions(images, column), [image.name for image in images], prompt)


def write_metadata(folder: Path, *records: object) -> Path:
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8-sig")
    return path


def test_one_prompt_for_all(images, caplog) -> None:
    assert captions_of(images, f" {PROMPT}\n") == [PROMPT] * 3
    assert not caplog.text


def test_text_files_beside_the_images(images, caplog) -> None:
    for image, text in zip(images, ("first", "second,\n with a line break \n", "dritte über"), strict=True):
        image.with_suffix(".txt").write_text(text, encoding="utf-8")
    assert captions_of(images, None) == ["first", "second, with a line break", "dritte über"]
    images[1].with_suffix(".txt").write_text(" \n")
    assert captions_of(images, PROMPT) == ["first", PROMPT, "dritte über"]
    assert f"1 of 3 images (b.jpg) have no caption: they get {PROMPT!r}" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 3 images \(b.jpg\) have no caption: give --instance_prompt"):
        captions_of(images, None)


def test_a_caption_in_another_encoding_is_named(images) -> None:
    images[1].with_suffix(".txt").write_bytes("über".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.txt isn't UTF-8 text"):
        own_captions(images)


def test_metadata_wins_over_text_files(images) -> None:
    images[0].with_suffix(".txt").write_text("from a file")
    rows = [{"file_name": image.name, "text": image.name, "said": f" {image.stem} "} for image in images]
    write_metadata(images[0].parent, *rows, {"file_name": "gone.png", "text": None, "said": ""})
    assert captions_of(images, None) == ["a.png", "b.jpg", "c.png"]
    assert captions_of(images, None, "said") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", "text": "a"', "line 3: expected .* found .*delimiter"),
        ("[1]", "line 3: expected"),
        ('{"text": "a"}', r"line 3: expected \{\"file_name\": …, \"text\": …\}, found .*'file_name'"),
        ('{"file_name": "a.png", "caption": "a"}', r"line 3: expected .*'text'"),
    ],
)
def test_broken_lines_of_metadata_are_named(images, line: str, message: str) -> None:
    path = write_metadata(images[0].parent, {"file_name": "b.jpg", "text": "b"})
    path.write_text(f"{path.read_text(encoding='utf-8-sig')}\n\n{line}\n")
    with pytest.raises(ValueError, match=message):
        own_captions(images)


def test_a_column_without_metadata_is_refused(images) -> None:
    with pytest.raises(ValueError, match=r"caption_column 'said' is a key of metadata.jsonl, which .* lacks"):
        own_captions(images, "said")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="class_prompt is empty"):
        check_prompt(" \n", "class_prompt")
