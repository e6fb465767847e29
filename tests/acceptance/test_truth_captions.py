"""A metadata.jsonl whose captions aren't texts, or stand twice, is refused by file and line, and not trained on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.acceptance import _commands
from tests.acceptance.test_truth_images import FEW

FIRST = '{"file_name": "0.png", "text": "a toy"}'


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refusal(capsys: pytest.CaptureFixture[str], pictures: Path) -> str:
    run = {"instance_data_dir": str(pictures), "output_dir": str(pictures.parent / "run")}
    return _commands.refusal(capsys, "dreambooth_sdxl.py", **run)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        *(
            (f'{{"file_name": "1.png", "text": {value}}}', f", line 3: 'text' is {value}, expected a text in quotes")
            for value in ('["a", "b"]', "0", "NaN", "false")
        ),
        (FIRST, ", line 3: 0.png has a caption in line 1 already"),
        (r'{"file_name": "1.png", "text": "a \ud83d toy"}', ", line 3 holds half a character, \\ud"),
        (r'{"file_name": "1\udc00.png", "text": "a toy"}', ", line 3 holds half a character, \\ud"),
    ],
)
def test_line_that_is_no_caption_is_refused_by_file_and_number(pictures: Path, capsys, line: str, said: str) -> None:
    path = write_lines(pictures, FIRST, "", line)
    assert f"{path}{said}" in refusal(capsys, pictures)


def test_whole_characters_in_two_escapes_and_null_stay_captions(pictures: Path) -> None:
    whole = r'{"file_name": "0.png", "text": "a \ud83d\ude00 toy"}'
    write_lines(pictures, whole, '{"file_name": "1.png", "text": null}')
    flags = {"instance_data_dir": pictures, "output_dir": pictures.parent / "run", "instance_prompt": "a photo"}
    _commands.run("dreambooth_sdxl.py", **FEW, **flags)
    assert _commands.results(pictures.parent / "run")["n"] == 1
