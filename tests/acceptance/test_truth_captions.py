"""A metadata.jsonl whose captions aren't texts, or stand twice, is refused by file and line, and not trained on."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from tests.train_scripts.dreambooth_runs import fresh_accelerate, tiny_arguments, write_pictures
from train_scripts.dreambooth_sdxl import main

SDXL_TINY = Path(__file__).parents[2] / "examples" / "assets" / "sdxl-tiny"
FIRST = '{"file_name": "0.png", "text": "a toy"}'


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    fresh_accelerate()


@pytest.fixture
def arguments(tmp_path) -> DreamBoothArguments:
    pictures = write_pictures(tmp_path / "pictures", 2)
    return tiny_arguments(SDXL_TINY, pictures, tmp_path / "run")


def write_lines(args: DreamBoothArguments, *lines: str) -> Path:
    path = Path(str(args.instance_data_dir)) / "metadata.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "value",
    ['["a", "b"]', "0", "NaN", "false"],
)
def test_caption_that_is_no_text_is_refused_by_file_and_line(arguments, value: str) -> None:
    path = write_lines(arguments, FIRST, "", f'{{"file_name": "1.png", "text": {value}}}')
    message = re.escape(f"{path}, line 3: 'text' is {value}, expected a text in quotes")
    with pytest.raises(ValueError, match=message):
        main(arguments)


def test_two_lines_of_one_image_are_refused_with_both_numbers(arguments) -> None:
    path = write_lines(arguments, FIRST, '{"file_name": "1.png", "text": "a cube"}', FIRST)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: 0.png has a caption in line 1 already")):
        main(arguments)


@pytest.mark.parametrize(
    "line", [r'{"file_name": "1.png", "text": "a \ud83d toy"}', r'{"file_name": "1\udc00.png", "text": "a toy"}']
)
def test_half_a_character_is_refused_by_file_and_line(arguments, line: str) -> None:
    path = write_lines(arguments, FIRST, line)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2 holds half a character, \\ud")):
        main(arguments)


def test_whole_characters_in_two_escapes_and_null_stay_captions(arguments) -> None:
    write_lines(
        arguments, r'{"file_name": "0.png", "text": "a \ud83d\ude00 toy"}', '{"file_name": "1.png", "text": null}'
    )
    arguments.max_train_steps, arguments.instance_prompt = 1, "a photo"
    arguments.validation_prompts = None
    assert main(arguments)["n"] == 2
