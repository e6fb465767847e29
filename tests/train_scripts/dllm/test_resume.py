"""train_scripts/dllm.py resumes on the model and the data of before, wherever they lie, and on no others."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from train_scripts.dllm import main

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def options(llada_folder, data, tmp_path) -> dict:
    """Arguments of two steps with a checkpoint after each, on copies that a test may change."""
    shutil.copytree(llada_folder, tmp_path / "files" / "model")
    for path in data.values():
        shutil.copy(path, tmp_path / "files")
    files = {name: str(tmp_path / "files" / Path(path).name) for name, path in data.items()}
    model = str(tmp_path / "files" / "model")
    return {**files, "pretrained_model_name_or_path": model, "max_train_steps": 2, "checkpointing_steps": 1}


def test_resume_on_a_base_of_other_weights_is_refused(arguments, options, tmp_path) -> None:
    main(arguments(**options))
    file = tmp_path / "files" / "model" / "model.safetensors"
    weights = load_file(file)
    next(value for name, value in weights.items() if name.endswith("q_proj.weight")).view(-1)[5] += 1e-3
    save_file(weights, file)
    resumed = arguments(**options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"checkpoint-1 belongs to a run with another base model.*as it was, or start"):
        main(resumed)


def test_resume_with_other_validation_records_is_refused(arguments, options, tmp_path) -> None:
    main(arguments(**options))
    file = Path(options["validation_file"])
    file.write_text(file.read_text().replace("upper", "UPPER", 1))
    resume = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-1")}
    with pytest.raises(ValueError, match=r"checkpoint-1 belongs to a run with other validation data"):
        main(arguments(**options, **resume))


def test_resume_from_another_directory_ends_with_the_same_bytes(arguments, options, tmp_path, monkeypatch) -> None:
    def relative(directory: Path, files: Path) -> dict:
        directory.mkdir()
        monkeypatch.chdir(directory)
        names = [*(name for name in options if name.endswith("_file")), "pretrained_model_name_or_path"]
        return options | {name: os.path.relpath(files / Path(options[name]).name) for name in names}

    main(arguments(**relative(tmp_path / "one", tmp_path / "files")))
    expected = (tmp_path / "run" / WEIGHTS).read_bytes()
    shutil.move(tmp_path / "files", tmp_path / "moved" / "elsewhere")
    there = relative(tmp_path / "moved" / "other", tmp_path / "moved" / "elsewhere")
    main(arguments(**there, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == expected
