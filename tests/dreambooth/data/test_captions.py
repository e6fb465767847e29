"""Captions from one prompt, from text files, from metadata.jsonl; and what happens where they are missing."""

import json
from pathlib import Path

import pytest

from nara_diffusion.dreambooth.data.captions import captions_for, check_prompt

PROMPT = "a photo of sks toy"


@pytest.fixture
def images(tmp_path) -> list[Path]:
    """Three names; captions don't read pixels."""
    paths = [tmp_path / name for name in ("a.png", "b.jpg", "c.png")]
    for path in paths:
        path.touch()
    return paths


def write_metadata(folder: Path, *records: object) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")


def test_one_prompt_for_all(images) -> None:
    assert captions_for(images, prompt=f" {PROMPT}\n") == [PROMPT] * 3


def test_text_files_beside_the_images(images, caplog) -> None:
    for image, text in zip(images, ("first", "second,\n with a line break \n", "dritte über"), strict=True):
        image.with_suffix(".txt").write_text(text, encoding="utf-8")
    assert captions_for(images, prompt=PROMPT) == ["first", "second, with a line break", "dritte über"]
    assert captions_for(images, prompt=None) == captions_for(images, prompt=None, source="text_files")
    assert captions_for(images, prompt=PROMPT, source="prompt") == [PROMPT] * 3
    assert not caplog.text


def test_metadata_wins_over_text_files(images) -> None:
    images[0].with_suffix(".txt").write_text("from a file")
    records = [{"file_name": image.name, "text": f"text of {image.stem}"} for image in reversed(images)]
    write_metadata(images[0].parent, *records)
    assert captions_for(images, prompt=PROMPT) == ["text of a", "text of b", "text of c"]
    with pytest.raises(ValueError, match=r"2 of 3 images \(b\.jpg, c\.png\) have no caption in a text file"):
        captions_for(images, prompt=None, source="text_files")


def test_caption_files_are_read_as_text_files_are(images) -> None:
    """As kohya's scripts name them; a folder may have both."""
    images[0].with_suffix(".caption").write_text(" first\n")
    assert captions_for(images, prompt=PROMPT) == ["first", PROMPT, PROMPT]
    images[1].with_suffix(".txt").write_text("second")
    images[2].with_suffix(".caption").write_text("third")
    for source in ("auto", "text_files"):
        assert captions_for(images, prompt=None, source=source) == ["first", "second", "third"]


def test_two_captions_of_one_image_that_differ_are_refused(images) -> None:
    for image in images:
        image.with_suffix(".caption").write_text("a toy")
        image.with_suffix(".txt").write_text("a  toy\n")
    assert captions_for(images, prompt=None) == ["a toy"] * 3
    images[1].with_suffix(".txt").write_text("a cube")
    with pytest.raises(ValueError, match=r"b\.txt says 'a cube' and b\.caption 'a toy': remove one of them"):
        captions_for(images, prompt=PROMPT)


def test_another_caption_column(images) -> None:
    write_metadata(images[0].parent, *({"file_name": image.name, "caption": image.stem, "text": 0} for image in images))
    assert captions_for(images, prompt=None, caption_column="caption") == ["a", "b", "c"]
    with pytest.raises(
        ValueError, match=r"line 1 has no 'title', only file_name, caption, text: name its key with --cap"
    ):
        captions_for(images, prompt=None, caption_column="title")


@pytest.mark.parametrize("source", ["auto", "prompt", "text_files"])
def test_a_caption_column_that_nothing_would_read_is_refused(images, source: str) -> None:
    with pytest.raises(
        ValueError, match=r"caption_column 'caption' is a key of metadata\.jsonl, from which captions don"
    ):
        captions_for(images, prompt=PROMPT, source=source, caption_column="caption")


def test_missing_and_empty_captions_get_the_prompt_with_a_warning(images, caplog) -> None:
    images[0].with_suffix(".txt").write_text("first")
    images[2].with_suffix(".txt").write_text(" \n")
    assert captions_for(images, prompt=PROMPT) == ["first", PROMPT, PROMPT]
    assert f"2 of 3 images (b.jpg, c.png) have no caption in a text file: they get '{PROMPT}'" in caplog.text


def test_missing_captions_without_a_prompt_are_refused(images) -> None:
    write_metadata(images[0].parent, {"file_name": "a.png", "text": "first"}, {"file_name": "b.jpg", "text": None})
    message = (
        r"2 of 3 images \(b\.jpg, c\.png\) have no caption in metadata\.jsonl: write one for each, or give an inst"
    )
    with pytest.raises(ValueError, match=message):
        captions_for(images, prompt=None)


def test_neither_captions_nor_a_prompt(images) -> None:
    with pytest.raises(ValueError, match=r"no instance_prompt and no captions were given: give --instance_prompt"):
        captions_for(images, prompt=None)


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt_is_refused(images, prompt: str) -> None:
    with pytest.raises(ValueError, match="instance_prompt is empty: say what the images show"):
        captions_for(images, prompt=prompt)
    with pytest.raises(ValueError, match="class_prompt is empty"):
        check_prompt(prompt, "class_prompt")


def test_an_unknown_source_and_a_missing_metadata_file_are_refused(images) -> None:
    with pytest.raises(
        ValueError, match="caption_source is 'files', expected one of auto, prompt, text_files, metadata"
    ):
        captions_for(images, prompt=PROMPT, source="files")
    with pytest.raises(ValueError, match=r"captions are to come from metadata\.jsonl, but .* has no such file"):
        captions_for(images, prompt=PROMPT, source="metadata")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", "text"', r"metadata\.jsonl breaks at line 2, column \d+"),
        ("[1, 2]", r"line 2: expected an object with a file_name, found \[1, 2\]"),
        ('{"text": "x"}', "line 2: expected an object with a file_name"),
    ],
)
def test_a_broken_line_is_named(images, line: str, message: str) -> None:
    (images[0].parent / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        captions_for(images, prompt=PROMPT)


def test_text_that_is_not_utf_8_is_refused(images) -> None:
    images[1].with_suffix(".txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.txt isn't UTF-8 text \(byte 2"):
        captions_for(images, prompt=PROMPT)


def test_a_byte_order_mark_is_no_part_of_a_caption(images) -> None:
    for image in images:
        image.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfred cube")
    assert captions_for(images, prompt=None) == ["red cube"] * 3


def test_captions_of_images_that_are_not_there_are_told(images, caplog) -> None:
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "b.jpg", "c.png", "d.png", "sub/a.png")]
    write_metadata(images[0].parent, *rows)
    assert captions_for(images, prompt=None) == ["x"] * 3
    assert f"metadata.jsonl names images that {images[0].parent} doesn't hold: d.png, sub/a.png" in caplog.text


def test_a_caption_may_hold_characters_at_which_texts_are_split(images) -> None:
    caption = "a toy\u2028on the beach"
    line = json.dumps({"file_name": images[0].name, "text": caption}, ensure_ascii=False)
    (images[0].parent / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    assert captions_for(images, prompt="a toy")[0] == caption
