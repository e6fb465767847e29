"""The held-out pictures: none is a training picture, and none comes twice."""

import json
from pathlib import Path

import make_held_out
import numpy as np
from make_subject import POSES, picture
from PIL import Image
from tiny_places import PLACES
from tiny_subjects import SUBJECTS
from tiny_vocabulary import words


def test_no_picture_comes_twice_or_is_one_of_the_training() -> None:
    for subject in SUBJECTS.values():
        seen = [picture(pose, subject=subject) for pose in POSES]
        poses = [image for _, image in make_held_out.in_poses(subject, range(30))]
        places = [image for _, image in make_held_out.in_places(subject, range(3))]
        assert len({image.tobytes() for image in [*seen, *poses, *places]}) == 5 + 30 + 3 * len(PLACES)


def test_a_picture_follows_from_its_number_alone() -> None:
    subject = SUBJECTS["cup"]
    (_, third), (_, again) = make_held_out.in_poses(subject, range(4))[3], make_held_out.in_poses(subject, [3])[0]
    assert third.tobytes() == again.tobytes()
    both, second = make_held_out.in_places(subject, range(2)), make_held_out.in_places(subject, [1])
    assert [image.tobytes() for _, image in both[10:]] == [image.tobytes() for _, image in second]


def test_every_place_has_a_picture_whose_caption_names_it_in_known_words(tmp_path: Path) -> None:
    make_held_out.main(tmp_path, number=1)
    for name, subject in SUBJECTS.items():
        lines = (tmp_path / name / "metadata.jsonl").read_text().splitlines()
        captions = [json.loads(line)["text"] for line in lines]
        assert captions == [subject.instance_prompt, *(f"{subject.instance_prompt} {place}" for place in PLACES)]
        assert set(" ".join(captions).split()) <= set(words())
        drawn = [image for _, image in make_held_out.in_places(subject, [0])]
        for number, image in enumerate(drawn, start=1):
            assert (np.asarray(Image.open(tmp_path / name / f"{number:03d}.png")) == np.asarray(image)).all()
