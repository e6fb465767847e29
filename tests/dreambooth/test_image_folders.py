"""Several folders of images: their arguments from a YAML list, and their samples, sizes and class images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from nara_diffusion.dreambooth import train
from nara_diffusion.dreambooth.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.image_arguments import FOLDER_KEYS, DreamBoothArguments, folder_arguments, shipped_run
from nara_diffusion.dreambooth.image_plan import planned_image_step
from nara_diffusion.dreambooth.image_records import ImageRecord, class_records
from nara_diffusion.dreambooth.source_images import records_from_folder
from nara_diffusion.training.report import without_folders
from tests.acceptance._runs import image_arguments, image_flags
from tests.dreambooth.pictures import folder_of
from tests.helpers.small_pipelines import small_sdxl


def listed(folder: Path, *entries: Any) -> str:
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(list(entries)))
    return str(file)


def arguments(**flags: Any) -> DreamBoothArguments:
    return DreamBoothArguments(pretrained_model_name_or_path="none", **flags)


def test_folders_have_own_values_before_the_runs(tmp_path: Path) -> None:
    first = {
        "instance_data_dir": "dog",
        "source_data_dir": "dog before",
        "instance_prompt": "a photo of [trigger]",
        "trigger": "sks dog",
        "caption_column": "said",
        "repeats": 7,
        "resolution": 768,
        "aspect_ratio_buckets": "auto",
        "class_data_dir": "dogs",
        "class_prompt": "a photo of a dog",
        "num_class_images": 30,
        "alpha_mask": True,
    }
    assert first.keys() == set(FOLDER_KEYS)
    file = listed(tmp_path, first, {"instance_data_dir": "style", "caption_column": None})
    shared = {"resolution": 512, "repeats": 2, "trigger": "xyz", "caption_column": "text", "num_class_images": 9}
    args = arguments(dataset_config=file, train_batch_size=3, **shared)
    one, other = folder_arguments(args)
    assert {key: getattr(one, key) for key in first} == first | {"instance_prompt": "a photo of sks dog"}
    expected = shared | {"caption_column": None, "instance_data_dir": "style", "class_prompt": None}
    assert {key: getattr(other, key) for key in expected} == expected
    assert one.train_batch_size == other.train_batch_size == 3
    single = arguments(instance_data_dir="dog")
    assert folder_arguments(single) == [single]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("instance_data_dir: dog", r"data.yaml must be a list of folders, each `- instance_data_dir: FOLDER`"),
        ("[]", "must be a list of folders"),
        ("[datasets", r"--dataset_config .*data.yaml can't be read as YAML"),
        ("- dog", r"data.yaml, folder 1: expected `key: value` lines, got 'dog'"),
        ("- instance_data_dir: a\n- repeats: 2", "folder 2: instance_data_dir is missing"),
        ("- num_repeats: 2", "folder 1: unrecognized num_repeats: here it is --repeats"),
        ("- learning_rate: 2", "folder 1: unrecognized learning_rate: it takes instance_data_dir, .*num_class_images"),
        ("- instance_data_dir: a\n  repeats: often", "folder 1: repeats is 'often', expected a whole number"),
        ("- instance_data_dir: a\n  repeats: 0", "folder 1: repeats must be at least 1, got 0"),
        ("- instance_data_dir: a\n  class_prompt: b", "folder 1: prior preservation needs class_data_dir and"),
        ("- instance_data_dir: a\n  instance_prompt: '[trigger]'", r"folder 1: '\[trigger\]' has \[trigger\], but"),
    ],
)
def test_mistakes_in_folders_are_refused_by_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        folder_arguments(arguments(dataset_config=str(tmp_path / "data.yaml")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt"])
def test_flags_of_one_folder_exclude_a_list(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is set, but dataset_config has it for each folder"):
        arguments(dataset_config="data.yaml", **{name: "dog"})


def test_list_takes_the_place_of_shipped_images() -> None:
    shipped = shipped_run({"dataset_config": "data.yaml"})
    assert not {"instance_data_dir", "instance_prompt", "validation_prompts"} & shipped.keys()
    assert DreamBoothArguments(**shipped, dataset_config="data.yaml").dataset_config == "data.yaml"


def test_path_of_list_is_not_published(tmp_path: Path) -> None:
    args = arguments(dataset_config=str(tmp_path / "data.yaml"))
    assert without_folders(f"of {tmp_path}/data.yaml", args) == "of data.yaml"
    args.output_dir = tmp_path / "run"  # as Python code may pass it
    assert without_folders(f"in {tmp_path}/run", args) == "in run"


def test_trigger_is_replaced_in_prompts_and_captions(tmp_path: Path) -> None:
    args = arguments(
        instance_data_dir="dog",
        instance_prompt="a photo of [trigger]",
        validation_prompts=["[trigger] and [trigger]", "a dog"],
        trigger="sks",
    )
    assert (args.instance_prompt, args.validation_prompts) == ("a photo of sks", ["sks and sks", "a dog"])
    folder = folder_of(tmp_path, [(8, 8)] * 2)
    (folder / "01.txt").write_text("[trigger] on grass")
    records = records_from_folder(folder, prompt="a [trigger]", trigger="sks")
    assert [record.prompt for record in records] == ["a sks", "sks on grass"]
    with pytest.raises(ValueError, match=r"'\[trigger\] on grass' has \[trigger\], but .* give --trigger"):
        records_from_folder(folder, prompt="a toy")
    with pytest.raises(ValueError, match="trigger is empty"):
        arguments(instance_data_dir="dog", trigger=" ")


# ---------------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ImageRecord]]:
    sizes = {"dog": [(40, 40), (50, 30), (30, 41)], "style": [(64, 48), (48, 64)], "toys": [(33, 33)] * 3}
    made = {}
    for name, values in sizes.items():
        folder = folder_of(tmp_path_factory.mktemp(name), values)
        made[name] = records_from_folder(folder, prompt=f"a {name}")
    for number, name in enumerate(("dogs", "cars")):
        folder = folder_of(tmp_path_factory.mktemp(name), [(20 + number, 20)] * (2 + number))
        made[name] = class_records(folder, prompt=f"a photo of {name}")
    return made


def joined(folders: dict[str, list[ImageRecord]], batch_size: int = 2) -> DreamBoothDataset:
    data = DreamBoothDataset(folders["dog"], [(16, 16)], batch_size=batch_size, seed=3, repeats=5)
    data.add(folders["style"], [(24, 16), (16, 24)], folders["cars"])
    data.add(folders["toys"], [(16, 16)], folders["dogs"], repeats=2)
    return data


def test_epoch_shows_images_as_often_as_repeats(folders) -> None:
    data = joined(folders, batch_size=1)
    count = len(data.epoch)
    assert count == 5 * 3 + 2 + 2 * 3
    for start in (0, count):
        seen = Counter(data.samples_at(position)[0].image.name for position in range(start, start + count))
        repeats = {"dog": 5, "style": 1, "toys": 2}
        assert seen == {image.name: times for name, times in repeats.items() for image in folders[name]}
    assert len(data.plain_samples()) == 8  # a validation loss takes each image once


def test_class_images_and_sizes_follow_the_folder(folders) -> None:
    data, kinds = joined(folders), Counter()
    prior = {"a dog": None, "a style": "a photo of cars", "a toys": "a photo of dogs"}
    sizes = {"a dog": {(16, 16)}, "a style": {(24, 16), (16, 24)}, "a toys": {(16, 16)}}
    for start in range(0, 60, 2):
        batch = [data.samples_at(start), data.samples_at(start + 1)]
        assert len({len(samples) for samples in batch}) == len({samples[0].target for samples in batch}) == 1
        for image, *class_image in batch:
            assert [sample.prompt for sample in class_image] == [prior[image.prompt]] * (image.prompt != "a dog")
            assert image.target in sizes[image.prompt]
            kinds[image.prompt] += 1
    assert min(kinds[prompt] for prompt in prior) > 2
    assert data.class_images == [*folders["cars"], *folders["dogs"]]


def test_one_folder_keeps_the_order_of_before(folders) -> None:
    options: dict[str, Any] = {"batch_size": 2, "seed": 3, "crop": "random", "flip": True}
    data = DreamBoothDataset([], [], **options)
    data.add(folders["dog"], [(16, 16), (24, 16)], folders["cars"])
    single = DreamBoothDataset(folders["dog"], [(16, 16), (24, 16)], class_images=folders["cars"], **options)
    assert [data.samples_at(p) for p in range(20)] == [single.samples_at(p) for p in range(20)]


def test_table_of_sizes_has_images_and_cropped_share(folders, caplog) -> None:
    caplog.set_level("INFO")
    data = joined(folders)
    assert list(data.buckets.items()) == [((16, 16), 6), ((16, 24), 1), ((24, 16), 1)]
    assert data.sample_size == (16, 16)
    data.log_sizes()
    # 50 x 30 becomes 27 x 16, 30 x 41 16 x 22, and 64 x 48 24 x 18
    lines = [
        "height x width  images  cropped away",
        f"       16 x 16       6  {100 * (11 / 27 + 6 / 22) / 6:10.0f} %",
        f"       16 x 24       1  {100 * 2 / 18:10.0f} %",
        f"       24 x 16       1  {100 * 2 / 18:10.0f} %",
    ]
    assert "\n".join(lines) in caplog.text


def test_most_frequent_size_counts_repeats(folders) -> None:
    data = DreamBoothDataset(folders["dog"], [(16, 16)], batch_size=1, seed=0)
    data.add(folders["style"][:1], [(24, 32)], repeats=4)
    assert data.sample_size == (24, 32)


# ---------------------------------------------------------------------- runs


@pytest.mark.slow
def test_run_learns_from_folders_and_notices_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    flags = image_flags(tmp_path, small_sdxl()) | {"max_train_steps": None, "num_train_epochs": 1, "curve_points": 1}
    flags |= {"instance_prompt": None, "checkpointing_steps": 4}
    dog = {"instance_data_dir": str(flags.pop("instance_data_dir")), "instance_prompt": "a [trigger]", "repeats": 2}
    style = folder_of(tmp_path / "style", [(40, 24), (24, 24)])
    (style / "00.txt").write_text("[trigger] by night")
    (style / "01.txt").write_text("[trigger] by day")
    folder_of(tmp_path / "prior", [(16, 16)] * 2)
    prior = {"class_data_dir": str(tmp_path / "prior"), "class_prompt": "a night", "num_class_images": 2}
    other = {"instance_data_dir": str(style), "trigger": "xyz", "resolution": 32, **prior}
    file = listed(tmp_path, other, dog)
    args = image_arguments(flags, tmp_path / "run", dataset_config=file, trigger="sks")
    train.main(args)
    assert "optimizer steps: 4 of 2 samples" in caplog.text  # 2 · 3 + 2 samples
    card = (tmp_path / "run" / "README.md").read_text()
    described = "2 images, 2 with captions of their own (.txt), and 2 images of “a night” for prior preservation"
    assert f"trained on {described}; 3 images of “a sks”, 2 times an epoch" in card
    assert "3 images at 16 x 16, 2 images at 32 x 32; samples at 16 x 16" in card
    lines = (tmp_path / "run" / "samples-after" / "metadata.jsonl").read_text().splitlines()
    assert [yaml.safe_load(line)["text"] for line in lines] == ["xyz by night", "a sks", "xyz by day"]
    planned = planned_image_step(image_arguments(flags, tmp_path / "plan", dataset_config=file, trigger="sks"))
    assert planned.forward == "4 x 32 x 32 pixels"  # the largest, with its class images

    listed(tmp_path, other, dog | {"repeats": 3})
    again = image_arguments(
        flags, tmp_path / "run", dataset_config=file, trigger="sks", resume_from_checkpoint="latest"
    )
    train.main(again)
    assert "written with other training data, so their order starts again at step 4" in caplog.text
