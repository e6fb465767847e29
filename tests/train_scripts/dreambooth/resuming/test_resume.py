"""train_scripts/dreambooth_sdxl.py resumes on the model and the images of before, wherever they lie, and no others."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train_scripts.dreambooth_runs import WEIGHTS, tiny_arguments, write_pictures
from train_scripts.dreambooth_sdxl import main


@pytest.fixture
def run(sdxl_folder, pictures, tmp_path, monkeypatch):
    """Runs main on copies that a test may change: two steps, a checkpoint after each."""
    files = tmp_path / "files"
    shutil.copytree(sdxl_folder, files / "model")
    shutil.copytree(pictures, files / "pictures")
    write_pictures(files / "held-out", 1, seed=7)

    def go(files: Path = files, **changes) -> None:
        names = {name: Path(os.path.relpath(files / name)) for name in ("model", "pictures", "held-out")}
        shared = {"max_train_steps": 2, "checkpointing_steps": 1, "num_validation_images": 1, "curve_points": 1}
        shared |= {"validation_prompts": ["a toy"], "validation_data_dir": str(names["held-out"])}
        main(tiny_arguments(names["model"], names["pictures"], tmp_path / "run", **shared, **changes))

    return go


def resume(tmp_path: Path) -> dict:
    return {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-1")}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_resume_on_a_base_of_other_weights_is_refused(run, tmp_path, part: str) -> None:
    run()
    file = next((tmp_path / "files" / "model" / part).glob("*.safetensors"))
    weights = load_file(file)
    max(weights.values(), key=lambda value: value.numel()).view(-1)[5] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint-1 belongs to a run with another base model"):
        run(**resume(tmp_path))


def test_resume_with_other_validation_images_is_refused(run, tmp_path) -> None:
    run()
    write_pictures(tmp_path / "files" / "held-out", 1, seed=8)
    with pytest.raises(ValueError, match=r"checkpoint-1 belongs to a run with other validation data"):
        run(**resume(tmp_path))


def test_resume_from_another_directory_ends_with_the_same_bits(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run()
    expected = load_file(tmp_path / "run" / WEIGHTS)
    (tmp_path / "run" / WEIGHTS).unlink()
    shutil.move(tmp_path / "files", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    run(tmp_path / "moved", **resume(tmp_path))
    resumed = load_file(tmp_path / "run" / WEIGHTS)
    assert resumed.keys() == expected.keys() != set()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
