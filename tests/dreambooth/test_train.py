"""A run's defaults on a named model, what it refuses, and what a resumed one may do otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nara_diffusion.dreambooth.fidelity import STRIP
from nara_diffusion.dreambooth.image_arguments import CONFIGS, family_defaults, shipped_run
from tests.acceptance._commands import ROOT, metrics, results, run, tensors
from tests.acceptance._runs import ASSETS, image_flags
from tests.dreambooth.pictures import folder_of
from tests.helpers.small_pipelines import small_sd3, small_sdxl

NAMED = "pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """At a constant rate, so that a longer schedule changes nothing."""
    flags = image_flags(tmp_path_factory.mktemp("sdxl"), small_sdxl())
    return flags | {"lr_scheduler": "constant", "max_train_steps": 2, "logging_steps": 1, "curve_points": 1}


@pytest.fixture(scope="module")
def ended(sdxl: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended") / "out"
    run("dreambooth_sdxl.py", **sdxl, output_dir=folder)
    return folder


def resumed(ended: Path, flags: dict[str, Any], folder: Path, **changes: Any) -> Path:
    shutil.copytree(ended, folder)
    run("dreambooth_sdxl.py", **{**flags, **changes}, output_dir=folder, resume_from_checkpoint="latest")
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


@pytest.mark.slow
def test_run_with_more_steps_and_prompts_keeps_bits(
    sdxl: dict[str, Any], ended: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    changes = {"validation_prompts": ["a toy on grass", "a toy"], "num_validation_images": 2, "validation_steps": 4}
    longer = resumed(ended, sdxl, tmp_path / "longer", max_train_steps=4, **changes)
    assert "the schedule now has 4 steps instead of 2" in caplog.text
    assert "step 4: validation_loss " in caplog.text
    run("dreambooth_sdxl.py", **sdxl | {"max_train_steps": 4}, output_dir=tmp_path / "whole")
    torch.testing.assert_close(tensors(longer), tensors(tmp_path / "whole"), rtol=0, atol=0)
    assert losses(longer) == losses(tmp_path / "whole")
    lines = (longer / "samples-after" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a toy on grass"] * 2 + ["a toy"] * 2
    assert (results(longer)["n"], (longer / STRIP).exists()) == (4, True)


@pytest.mark.slow
def test_run_continues_with_other_images_on_its_card(
    sdxl: dict[str, Any], ended: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card = (ended / "README.md").read_text()
    assert "trained on 3 images of “a photo of a toy”." in card
    assert "- validation loss: on the training images\n" in card
    assert "Over 1 sample of 1 prompt." in card
    caplog.set_level("INFO")
    pictures, held_out = folder_of(tmp_path / "others", [(20, 24), (24, 20)]), folder_of(tmp_path / "held", [(20, 24)])
    (pictures / "00.txt").write_text("a cube on grass")
    changes = {"instance_data_dir": pictures, "instance_prompt": "a photo of a cube", "validation_data_dir": held_out}
    other = resumed(ended, sdxl, tmp_path / "other", **changes, max_train_steps=3)
    assert "written with other training data, so their order starts again at step 2" in caplog.text
    description = "2 images, 1 with captions of their own (.txt), the others as “a photo of a cube”"
    assert f"trained on {description}." in (other / "README.md").read_text()
    assert {f"trained on: {description}", "validation loss: on 1 image held out"} <= set(caplog.messages)
    same = resumed(ended, sdxl, tmp_path / "same", max_train_steps=3)
    assert losses(other)[:2] == losses(same)[:2]
    assert losses(other)[2] != losses(same)[2]


@pytest.mark.parametrize(
    "change", [{"snr_gamma": 5.0}, {"resolution": 32}, {"rank": 2}, {"load_in_4bit": True}], ids=str
)
def test_run_that_would_learn_otherwise_is_not_continued(
    sdxl: dict[str, Any], ended: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    name, value = next(iter(change.items()))
    with pytest.raises(SystemExit, match=rf"belongs to a run with other arguments \({name}: .* {value} now"):
        resumed(ended, sdxl, tmp_path / "out", **change)


def test_named_model_defaults_to_its_size_and_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pass over five images would be two steps, and a model of 64 pixels at 1024 would show noise."""
    for name in ("sdxl-tiny", "sd-tiny-flow"):
        defaults = family_defaults({NAMED: str(ASSETS / name)})
        assert (defaults["resolution"], defaults["max_train_steps"]) == (64, 500)
    assert "pixels" not in caplog.text
    family_defaults({NAMED: str(ASSETS / "sdxl-tiny"), "resolution": 1024})
    assert "was made for images of 64 pixels, but --resolution is 1024" in caplog.text
    small_sdxl().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": None}))
    assert "resolution" not in family_defaults({NAMED: str(tmp_path)})


def test_own_images_without_model_warn_of_the_toy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    values = shipped_run({"instance_data_dir": "pictures"}, CONFIGS / "sdxl_tiny.yaml")
    toy, _, advice = caplog.messages
    assert f"{values[NAMED]}, a toy of 64 pixels" in toy
    file, model = "train_scripts/configs/sdxl_dreambooth.yaml", "stabilityai/stable-diffusion-xl-base-1.0"
    assert advice.startswith("for SDXL at 1024 add ")
    assert f"--config {file}" in advice
    assert f"--{NAMED} {model}" in advice
    assert f"{NAMED}: {model}\n" in (ROOT / file).read_text()


def test_another_model_is_taught_with_dora_by_default() -> None:
    model = {NAMED: str(ASSETS / "sd-tiny-flow")}
    defaults, of_student = family_defaults(model), family_defaults({**model, "distill_to": 4})
    assert of_student.pop("adapter") == "dora"
    assert of_student == {name: value for name, value in defaults.items() if name != "weighting_scheme"}


def test_images_beyond_model_positions_are_refused(tmp_path: Path) -> None:
    pipe = small_sd3()
    limit = pipe.transformer.config.pos_embed_max_size * pipe.vae_scale_factor * pipe.transformer.config.patch_size
    flags = image_flags(tmp_path, pipe) | {"resolution": 2 * limit, "max_sequence_length": 5}
    message = f"a training size of {2 * limit} x {2 * limit} pixels doesn't fit this model: .*, and at most {limit}"
    with pytest.raises(SystemExit, match=message):
        run("dreambooth.py", **flags, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shipped_run_is_settings_without_its_images(tmp_path: Path) -> None:
    shipped = shipped_run({}, CONFIGS / "sdxl_tiny.yaml")
    assert [shipped[name] for name in ("resolution", "max_train_steps", "learning_rate", "rank")] == [64, 700, 2e-3, 16]
    places = (NAMED, "similarity_model", "alignment_model", "instance_data_dir")
    assert all(Path(shipped[name]).is_dir() for name in places)
    without_images = shipped_run({"instance_data_dir": "dog"}, CONFIGS / "sdxl_tiny.yaml")
    of_the_subject = {"instance_data_dir", "instance_prompt", "validation_prompts", "identifier"}
    assert shipped.keys() - without_images.keys() == of_the_subject | {"validation_steps"}
    (tmp_path / "alone.yaml").write_text(f"{NAMED}: examples/assets/none")  # as of an sdist, without its assets
    for file in ("none.yaml", "alone.yaml"):
        with pytest.raises(ValueError, match="clone of the repository"):
            shipped_run({}, tmp_path / file)


@pytest.mark.parametrize("data", [{"prompts_file": "own.txt"}, {"instance_prompt": "a photo of a dog"}], ids=str)
def test_shipped_prompts_are_not_used_for_own_distillation(
    data: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    steps = {"distill_to": 4}
    shipped, with_data = (
        shipped_run(steps, CONFIGS / "sdxl_tiny.yaml"),
        shipped_run(steps | data, CONFIGS / "sdxl_tiny.yaml"),
    )
    assert "your data" in caplog.text
    assert "configs/sdxl_4_steps.yaml" in caplog.text
    assert shipped.keys() - with_data.keys() == {"prompts_file", "validation_prompts"}
    assert with_data.items() <= shipped.items()
