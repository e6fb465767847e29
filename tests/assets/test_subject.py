"""The subject: the files are what their maker draws, and clip-tiny tells it from the toys of the data."""

from pathlib import Path

import make_subject
import numpy as np
import pytest
import torch
from make_subject import INSTANCE_PROMPT, POSES, picture
from PIL import Image
from tiny_objects import COLOURS
from tiny_scenes import SUBJECT_WORD, render, scenes
from tiny_vocabulary import words
from transformers import CLIPModel, CLIPProcessor

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


def test_the_files_are_what_the_maker_draws(tmp_path: Path) -> None:
    make_subject.main(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (ASSETS / "subject").iterdir())
    assert names[:5] == ["1.png", "2.png", "3.png", "4.png", "5.png"]
    for name in names[:5]:
        drawn, shipped = Image.open(tmp_path / name), Image.open(ASSETS / "subject" / name)
        assert drawn.size == (128, 128)
        assert drawn.mode == "RGB"
        assert (np.asarray(drawn) == np.asarray(shipped)).all()
    assert (tmp_path / "README.md").read_text() == (ASSETS / "subject" / "README.md").read_text()


def test_the_prompt_is_made_of_known_words_and_one_unseen() -> None:
    assert set(INSTANCE_PROMPT.split()) <= set(words())
    assert SUBJECT_WORD in INSTANCE_PROMPT.split()


def test_every_picture_is_another_and_shows_the_subjects_colours() -> None:
    drawn = [np.asarray(picture(pose)).astype(int) for pose in POSES]
    assert len({array.tobytes() for array in drawn}) == 5
    for array in drawn:
        for colour in ("purple", "yellow", "red"):
            assert (np.abs(array - COLOURS[colour]).max(-1) <= 10).sum() >= 40
        assert (array.min(-1) >= 250).sum() >= 20  # the white of the eye


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, CLIPProcessor]:
    folder = ASSETS / "clip-tiny"
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(folder)


def test_no_toy_of_the_data_is_as_like_the_subject_as_it_is_itself(clip: tuple[CLIPModel, CLIPProcessor]) -> None:
    """clip-tiny puts the subject's pictures nearer to each other than to the toys that sdxl-tiny learnt."""
    model, processor = clip

    @torch.no_grad()
    def embed(images: list[Image.Image]) -> torch.Tensor:
        return model(**processor(text=["toy"], images=images, padding=True, return_tensors="pt")).image_embeds

    own = embed([picture(pose) for pose in POSES])
    toys = embed([render(item) for item in scenes("sdxl", 0, 1500) if item.kind == "toy"])
    assert len(toys) > 250
    likeness = own @ own.T
    among = likeness[~torch.eye(5, dtype=torch.bool)].mean()
    assert among - (toys @ own.T).mean() > 0.3
