"""The held-out pictures: none is a training picture, and none comes twice."""

from make_subject import POSES, picture
from tiny_clip.vocabulary import words
from tiny_drawings.held_out import in_places, in_poses
from tiny_drawings.places import PLACES
from tiny_drawings.subjects import SUBJECTS

EACH_PLACE = 22  # that the benchmark takes


def test_no_picture_comes_twice_or_is_one_of_the_training() -> None:
    for subject in SUBJECTS.values():
        seen = [picture(pose, subject=subject) for pose in POSES]
        poses = [image for _, image in in_poses(subject, range(10 * EACH_PLACE))]
        places = [image for _, image in in_places(subject, range(EACH_PLACE))]
        assert len({image.tobytes() for image in [*seen, *poses, *places]}) == 5 + 20 * EACH_PLACE


def test_a_picture_follows_from_its_number_alone() -> None:
    subject = SUBJECTS["cup"]
    (_, third), (_, again) = in_poses(subject, range(4))[3], in_poses(subject, [3])[0]
    assert third.tobytes() == again.tobytes()
    both, second = in_places(subject, range(2)), in_places(subject, [1])
    assert [image.tobytes() for _, image in both[10:]] == [image.tobytes() for _, image in second]


def test_captions_name_the_place_in_known_words() -> None:
    for subject in SUBJECTS.values():
        captions = [caption for caption, _ in [*in_poses(subject, [0]), *in_places(subject, [0])]]
        assert captions == [subject.instance_prompt, *(f"{subject.instance_prompt} {place}" for place in PLACES)]
        assert set(" ".join(captions).split()) <= set(words())
