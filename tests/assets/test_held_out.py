"""The held-out pictures: the files are what their maker draws, and none is a training picture."""

import json
from pathlib import Path

import make_held_out
import numpy as np
from make_subject import POSES, picture
from PIL import Image
from tiny_places import PLACES
from tiny_subjects import SUBJECTS
from tiny_vocabulary import words

FOLDER = Path(__file__).parents[2] / "examples" / "assets" / "subject-held-out"


def test_the_files_are_what_the_maker_draws(tmp_path: Path) -> None:
    make_held_out.main(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file())
    assert len(names) == len(SUBJECTS) * 21 + 1
    for name in names:
        if name.endswith(".png"):
            assert (np.asarray(Image.open(tmp_path / name)) == np.asarray(Image.open(FOLDER / name))).all()
        else:
            assert (tmp_path / name).read_text() == (FOLDER / name).read_text()


def test_no_training_picture_is_among_them() -> None:
    for name, subject in SUBJECTS.items():
        seen = {picture(pose, subject=subject).tobytes() for pose in POSES}
        unseen = {Image.open(path).tobytes() for path in (FOLDER / name).glob("*.png")}
        assert len(unseen) == 20
        assert not seen & unseen


def test_every_place_has_a_picture_whose_caption_names_it_in_known_words() -> None:
    for name, subject in SUBJECTS.items():
        lines = (FOLDER / name / "metadata.jsonl").read_text().splitlines()
        captions = [json.loads(line)["text"] for line in lines]
        assert captions[:10] == [subject.instance_prompt] * 10
        assert captions[10:] == [f"{subject.instance_prompt} {place}" for place in PLACES]
        assert set(" ".join(captions).split()) <= set(words())
