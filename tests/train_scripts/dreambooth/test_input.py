"""Bad input: a clear message, and nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from tests.train_scripts.dreambooth_runs import one_sample, write_pictures
from train_scripts.dreambooth_sdxl import main


@pytest.fixture
def arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    """Arguments of a run of a few seconds, with one sample; keyword arguments change them."""
    return one_sample(sdxl_folder, pictures, tmp_path)


def refused(args: DreamBoothArguments, message: str, error: type[Exception] = ValueError) -> None:
    """`main` raises `message` and leaves no output folder."""
    with pytest.raises(error, match=message):
        main(args)
    assert not Path(str(args.output_dir)).exists()


def save_png(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(exist_ok=True)
    image.save(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"the image folder .*photos doesn't exist"),
        (lambda folder: folder.mkdir(), r"the image folder .*photos holds no images"),
        (lambda folder: (folder.mkdir(), (folder / "a.heic").write_text("x")), r"holds no images, only a.heic"),
        (
            lambda folder: (folder.mkdir(), (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nx")),
            r"a.png can't be decoded",
        ),
        (lambda folder: folder.write_text("x"), r"photos doesn't exist"),
    ],
    ids=["missing", "empty", "junk", "truncated", "file"],
)
def test_bad_image_folders(arguments, tmp_path, make: Callable, message: str) -> None:
    folder = tmp_path / "photos"
    make(folder)
    refused(arguments(instance_data_dir=folder), message)


def test_all_kinds_of_images_together(arguments, tmp_path, caplog) -> None:
    """CMYK, palette, transparent, animated and turned ones, one smaller than the resolution, and junk."""
    folder = tmp_path / "photos"
    plain = Image.open(next(write_pictures(folder, 1, (40, 30)).glob("*.png")))
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    plain.convert("P").save(folder / "palette.gif", save_all=True, append_images=[plain.rotate(90).convert("P")])
    plain.convert("RGBA").save(folder / "clear.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(folder / "turned.jpg", exif=exif)
    plain.resize((7, 9)).save(folder / "small.png")
    (folder / "notes.pdf").write_text("no image")
    (folder / "small.txt").write_text("a tiny toy")
    results = main(arguments(instance_data_dir=folder, max_train_steps=1))
    assert results["n"] == 1
    assert "notes.pdf" in caplog.text
    assert "are enlarged, and teach blur" in caplog.text
    assert "have no caption: they get" in caplog.text


def test_captions_of_all_images_need_no_instance_prompt(arguments, tmp_path) -> None:
    folder = write_pictures(tmp_path / "photos", 3)
    for number, caption in enumerate(["a red toy", "a toy on grass", "a red toy"]):
        (folder / f"{number}.txt").write_text(caption)
    args = arguments(instance_data_dir=folder, instance_prompt=None, validation_prompts=None, max_train_steps=1)
    results = main(args)
    lines = (Path(args.output_dir) / "samples-after" / "metadata.jsonl").read_text().splitlines()
    assert {json.loads(line)["text"] for line in lines} == {"a red toy", "a toy on grass"}
    assert results["n"] == len(lines) == 2 * args.num_validation_images


def test_missing_captions_without_a_prompt(arguments, tmp_path) -> None:
    folder = write_pictures(tmp_path / "photos", 2)
    (folder / "0.txt").write_text("a toy")
    refused(arguments(instance_data_dir=folder, instance_prompt=None), r"1 of 2 images \(1.png\) have no caption")
    (folder / "0.txt").unlink()
    nothing = arguments(instance_data_dir=folder, instance_prompt=None, validation_prompts=None)
    refused(nothing, "2 of 2 images .* have no caption: give --instance_prompt .* or write a caption for each")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_prompt": " "}, "instance_prompt is empty"),
        ({"validation_prompts": ["a toy", ""]}, "a validation prompt is empty"),
        ({"dataset_name": "org/data"}, "from instance_data_dir or from dataset_name: give one of them, got both"),
        ({"pretrained_model_name_or_path": ""}, "pretrained_model_name_or_path must be given"),
        ({"with_prior_preservation": True, "class_prompt": "a toy"}, "with_prior_preservation needs class_data_dir"),
        ({"with_prior_preservation": True, "class_prompt": "", "class_data_dir": "x"}, "class_prompt is empty"),
        ({"class_data_dir": "x"}, "class images are for prior preservation: add with_prior_preservation"),
        ({"text_encoder_lr": 1e-5}, "text_encoder_lr is set, but the text encoders aren't trained"),
        ({"core_input": "both"}, "core_input is 'both', but images have no masks"),
        ({"snr_gamma": 0.0}, "snr_gamma must be above 0, or none, got 0.0"),
        ({"noise_offset": -0.1}, "noise_offset must be at least 0, got -0.1"),
        ({"crops_per_image": 0}, "crops_per_image must be at least 1, or none, got 0"),
        ({"num_validation_images": 0}, "num_validation_images must be at least 1, got 0"),
        ({"resolution": 4}, "resolution must be at least 8, got 4"),
        ({"optimizer": "prodigy", "use_8bit_adam": True}, "use_8bit_adam is a form of AdamW"),
    ],
)
def test_impossible_arguments(arguments, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


@pytest.mark.filterwarnings("ignore:Bucket dimension")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 18}, r"18 x 18 pixels doesn't fit this model: both sides have to be multiples of 4"),
        ({"aspect_ratio_buckets": "16x16"}, r"Invalid bucket format: '16x16'"),
        ({"target_modules": ["q_proj"]}, r"target_modules q_proj match no module of UNet2DConditionModel"),
        ({"mixed_precision": "fp16"}, "mixed_precision fp16 needs a GPU"),
        ({"core_scale": -1.0}, "core_scale is -1.0"),
        ({"core_start_step": 2, "core_type": "identity"}, "core_type 'identity' has no core to train"),
        ({"report_to": ["abacus"]}, "report_to names 'abacus', which isn't installed here"),
        ({"validation_data_dir": "no/where"}, "the image folder no/where doesn't exist"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_written(arguments, changes: dict, message: str) -> None:
    args = arguments()
    for name, value in changes.items():
        setattr(args, name, value)
    refused(args, message)


def test_another_model_and_another_schedule(arguments, sdxl_folder, tmp_path) -> None:
    refused(
        arguments(pretrained_model_name_or_path=str(tmp_path / "none")),
        "none can't be loaded, since it has no model_index",
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.save_pretrained(tmp_path / "flow")
    refused(
        arguments(pretrained_model_name_or_path=str(tmp_path / "flow")),
        "is no scheduler that Stable Diffusion XL is trained",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 18}, r"18 x 18 pixels doesn't fit this model"),
        ({"target_modules": ["q_proj"]}, r"target_modules q_proj match no module of UNet2DConditionModel"),
        ({"validation_data_dir": "no/where"}, "the image folder no/where doesn't exist"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_it_is_refused_before_class_images_are_made(arguments, tmp_path, changes: dict, message: str) -> None:
    folder = tmp_path / "class"
    prior = {"with_prior_preservation": True, "class_data_dir": str(folder), "class_prompt": "a toy"}
    args = arguments(**prior, num_class_images=1)
    for name, value in changes.items():
        setattr(args, name, value)
    refused(args, message)
    assert not folder.exists()


def test_other_images_in_the_same_folder_are_not_resumed(arguments, tmp_path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 3)
    common = {"instance_data_dir": str(pictures), "max_train_steps": 1}
    main(arguments(**common, checkpointing_steps=1))
    write_pictures(pictures, 3, seed=5)
    with pytest.raises(ValueError, match="checkpoint-1 belongs to a run with other training data"):
        main(arguments(**common, resume_from_checkpoint="latest"))


def test_a_class_folder_with_images_of_another_prompt(arguments, tmp_path) -> None:
    folder = str(tmp_path / "class")
    prior = {"with_prior_preservation": True, "class_data_dir": folder, "num_class_images": 1}
    main(arguments(**prior, class_prompt="a toy", max_train_steps=1))
    refused(
        arguments(**prior, class_prompt="a cube", output_dir=tmp_path / "other"),
        "holds images made for another prompt",
    )
