"""Folders named N_PROMPT: how often each image comes, what is said of it, and what is refused as ambiguous."""

from collections import Counter
from pathlib import Path

import pytest

from nara_diffusion.dreambooth.data.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.data.repeat_folders import find_repeat_folders, records_from_subject_folder
from nara_diffusion.dreambooth.setup import epoch_size, load_instances, record_texts
from tests.dreambooth.data.pictures import folder_of
from tests.train_scripts.dreambooth_runs import tiny_arguments


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    """One image three times, one with a caption of its own twice, a wide one and a square one once."""
    folder = tmp_path / "subject"
    folder_of(folder / "3_sks dog", [(20, 20)])
    folder_of(folder / "1_a_photo of it", [(40, 20), (24, 24)])
    folder_of(folder / "02_sks", [(18, 18)])
    (folder / "02_sks" / "00.txt").write_text("sks, muddy")
    (folder / ".cache").mkdir()
    (folder / "notes.txt").write_text("10_nothing")
    return folder


def test_names_give_repeats_and_the_prompt_of_images_without_a_caption(subject: Path) -> None:
    records = records_from_subject_folder(subject, progress=False)
    found = {(Path(r.source.name).parent.name, r.size): (r.repeats, r.prompt) for r in records}
    assert found == {
        ("3_sks dog", (20, 20)): (3, "sks dog"),
        ("1_a_photo of it", (20, 40)): (1, "a_photo of it"),
        ("1_a_photo of it", (24, 24)): (1, "a_photo of it"),
        ("02_sks", (18, 18)): (2, "sks, muddy"),
    }


@pytest.mark.parametrize("buckets", [[(16, 16)], [(16, 16), (12, 24)]], ids=["one bucket", "two"])
def test_images_come_as_often_as_their_folders_say(subject: Path, buckets: list) -> None:
    records = records_from_subject_folder(subject, progress=False)
    data = DreamBoothDataset(records, buckets, batch_size=2, seed=3)
    # 7 batches of 2 have each image twice as often as its repeats, whichever buckets there are
    samples = [data.samples_at(position)[0] for position in range(14 * 5)]
    counts = Counter(sample.image.source.name for sample in samples)
    assert counts == {record.source.name: 2 * 5 * record.repeats for record in records}
    assert len(data.plain_samples()) == 4  # the validation loss has each once


def test_an_epoch_and_a_resume_know_of_the_repeats(subject: Path, tmp_path: Path) -> None:
    args = tiny_arguments(tmp_path / "model", subject, tmp_path / "out", instance_prompt=None, repeats=5)
    records = load_instances(args, False)
    assert epoch_size(args, records) == 5 * (3 + 1 + 1 + 2)
    before = record_texts(records)
    (subject / "3_sks dog").rename(subject / "4_sks dog")
    assert record_texts(load_instances(args, False)) != before
    plain = tiny_arguments(tmp_path / "model", subject / "4_sks dog", tmp_path / "out")
    assert [(record.repeats, record.prompt) for record in load_instances(plain, False)] == [(1, "a photo of a toy")]


def test_folders_of_other_names_are_left_out_as_before(tmp_path: Path, caplog) -> None:
    folder = folder_of(tmp_path / "flat", [(8, 8)])
    (folder / "old").mkdir()
    (folder / "10_empty").mkdir()
    assert find_repeat_folders(folder) == []
    assert len(records_from_subject_folder(folder, prompt="a toy", progress=False)) == 1
    assert "left out 2 entries" in caplog.text
    folder_of(tmp_path / "deep" / "dogs", [(8, 8)])
    with pytest.raises(ValueError, match="holds no images, only dogs"):
        records_from_subject_folder(tmp_path / "deep", prompt="a toy", progress=False)


def mixed(folder: Path) -> None:
    folder_of(folder, [(8, 8)])


def unnamed(folder: Path) -> None:
    folder_of(folder / "sks", [(8, 8)])


def none(folder: Path) -> None:
    folder_of(folder / "0_off", [(8, 8)])


def silent(folder: Path) -> None:
    folder_of(folder / "7_ ", [(8, 8)])


def empty(folder: Path) -> None:
    (folder / "2_empty").mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mixed, r"beside them the images 00\.png: which are the training images\? Put all images into folders named"),
        (unnamed, r"give repeats and a prompt \(02_sks\), and beside them the subfolders sks: which are"),
        (none, r"the name of .*0_off says 0 repeats: name it N_PROMPT"),
        (silent, r"the name of .*7_  says no prompt: name it N_PROMPT"),
        (empty, r"the image folder .*2_empty is empty"),
    ],
)
def test_what_is_ambiguous_is_refused(subject: Path, change, message: str) -> None:
    change(subject)
    with pytest.raises(ValueError, match=message):
        records_from_subject_folder(subject, progress=False)


def test_two_prompts_for_images_without_a_caption_are_refused(subject: Path) -> None:
    with pytest.raises(ValueError, match=r"instance_prompt is 'a toy', .* say 'sks' .* leave instance_prompt out"):
        records_from_subject_folder(subject, prompt="a toy", progress=False)
