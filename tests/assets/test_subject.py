"""The subjects: the files are what their maker draws, and clip-tiny tells each from the data's things of its kind."""

from pathlib import Path

import make_subject
import numpy as np
import pytest
import torch
from make_subject import INSTANCE_PROMPT, POSES, held_out_pose, picture, picture_in_place
from PIL import Image
from tiny_clip.vocabulary import words
from tiny_drawings.objects import COLOURS
from tiny_drawings.places import PLACES
from tiny_drawings.scenes import SUBJECT_WORD, render, scenes
from tiny_drawings.subjects import SUBJECTS, Subject
from transformers import CLIPModel, CLIPProcessor

ASSETS = Path(__file__).parents[2] / "examples" / "assets"

each_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS.keys())


@each_subject
def test_the_files_are_what_the_maker_draws(subject: Subject, tmp_path: Path) -> None:
    make_subject.main(tmp_path, subject.kind)
    shipped = ASSETS / subject.folder
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in shipped.iterdir())
    assert names[:5] == ["1.png", "2.png", "3.png", "4.png", "5.png"]
    for name in names[:5]:
        drawn, file = Image.open(tmp_path / name), Image.open(shipped / name)
        assert drawn.size == (128, 128)
        assert drawn.mode == "RGB"
        assert (np.asarray(drawn) == np.asarray(file)).all()
    assert (tmp_path / "README.md").read_text() == (shipped / "README.md").read_text()


def test_the_toy_is_the_subject_where_none_is_named(tmp_path: Path) -> None:
    make_subject.main(tmp_path)
    assert (tmp_path / "README.md").read_text() == (ASSETS / "subject" / "README.md").read_text()
    assert SUBJECTS["toy"].instance_prompt == INSTANCE_PROMPT


@each_subject
def test_the_prompt_is_made_of_known_words_and_one_unseen(subject: Subject) -> None:
    assert set(subject.instance_prompt.split()) <= set(words())
    assert SUBJECT_WORD in subject.instance_prompt.split()
    assert set(subject.class_prompt.split()) <= set(words())


@each_subject
def test_every_picture_is_another_and_shows_the_subjects_colours(subject: Subject) -> None:
    drawn = [picture(pose, subject=subject) for pose in [*POSES, *(held_out_pose(i) for i in range(10))]]
    drawn += [picture_in_place(place, 0, subject=subject) for place in PLACES]
    assert len({image.tobytes() for image in drawn}) == 25
    for image in drawn:
        array = np.asarray(image).astype(int)
        for colour in subject.colours:
            assert (np.abs(array - COLOURS[colour]).max(-1) <= 10).sum() >= 20


def test_pictures_beyond_the_five_repeat_and_differ_by_their_number() -> None:
    car = SUBJECTS["car"]
    assert held_out_pose(3) == held_out_pose(3)
    assert held_out_pose(3) != held_out_pose(4)
    beach = [picture_in_place("on the beach", number, subject=car).tobytes() for number in (0, 0, 1)]
    assert beach[0] == beach[1]
    assert beach[0] != beach[2]


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, CLIPProcessor]:
    folder = ASSETS / "clip-tiny"
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(folder)


@each_subject
def test_nothing_of_the_data_is_as_like_the_subject_as_it_is_itself(
    subject: Subject, clip: tuple[CLIPModel, CLIPProcessor]
) -> None:
    """clip-tiny puts the subject's pictures nearer to each other than to those of its kind that sdxl-tiny learnt."""
    model, processor = clip

    @torch.no_grad()
    def embed(images: list[Image.Image]) -> torch.Tensor:
        return model(**processor(text=["toy"], images=images, padding=True, return_tensors="pt")).image_embeds

    own = embed([picture(pose, subject=subject) for pose in POSES])
    kin = embed([render(item) for item in scenes("sdxl", 0, 1500) if item.kind == subject.kind])
    assert len(kin) > 80
    similarity = own @ own.T
    among = similarity[~torch.eye(5, dtype=torch.bool)].mean()
    assert among - (kin @ own.T).mean() > 0.3
