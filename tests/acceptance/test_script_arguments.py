"""What the train scripts say of their command lines: files of settings, flags over them, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.acceptance._commands import ROOT, refusal, run
from tests.acceptance._runs import text_flags
from tests.helpers.small_pipelines import small_flux, small_sd3, small_sdxl

CONFIGS = sorted((ROOT / "train_scripts" / "configs").glob("*.yaml"))
TEXT_CONFIGS = [path for path in CONFIGS if path.stem.startswith(("llada", "dream_"))]
IMAGE_CONFIGS = [path for path in CONFIGS if path not in TEXT_CONFIGS]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a script writes where no folder is named lies in a folder of the test."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("script", "line", "named"),
    [
        ("dllm.py", ["--lerning_rate", "1e-3"], ["--lerning_rate", "--learning_rate"]),
        (
            "dllm.py",
            ["--evaluation_options", "remasking=low_confidense"],
            ["remasking", "low_confidense", "low_confidence", "random"],
        ),
        ("dreambooth_sdxl.py", ["--prediction_type", "v"], ["prediction_type", "v_prediction"]),
        ("dllm.py", ["--min_noise_level", "0.8", "--max_noise_level", "0.2"], ["min_noise_level", "max_noise_level"]),
        ("dllm.py", ["--config", "none.yaml"], ["none.yaml"]),
    ],
)
def test_mistake_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], script: str, line: list[str], named: list[str]
) -> None:
    said = refusal(capsys, script, *line)
    assert all(name in said for name in named), said
    assert list(Path().iterdir()) == []  # nothing was begun


@pytest.mark.parametrize("path", TEXT_CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_for_text_are_read(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    """As far as the file of data, which is downloaded separately."""
    said = refusal(capsys, "dllm.py", "--config", str(path), "--mixed_precision", "no")  # as there is no GPU
    assert yaml.safe_load(path.read_text())["train_file"] in said
    assert list(Path().iterdir()) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{settings: a tiny pipeline of the classes that they are for}."""
    kinds: dict[str, Any] = {"sd3_dreambooth": small_sd3, "flux_dreambooth": small_flux, "sdxl_dreambooth": small_sdxl}
    kinds |= {"sd_tiny_flow": small_sd3, "sdxl_tiny": small_sdxl}
    folders = {}
    for name, make in kinds.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("path", IMAGE_CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_for_images_are_read(
    capsys: pytest.CaptureFixture[str], path: Path, models: dict[str, Path]
) -> None:
    """As far as the folder of images."""
    script = "dreambooth_sdxl.py" if path.stem.startswith("sdxl") else "dreambooth.py"
    flags = {"pretrained_model_name_or_path": models[path.stem], "instance_data_dir": "nowhere"}
    said = refusal(capsys, script, "--config", str(path), **flags, instance_prompt="a photo of sks dog")
    assert "nowhere" in said
    assert list(Path().iterdir()) == []


def test_run_without_a_folder_gets_a_numbered_one_and_no_other_run_s(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = {**text_flags(tmp_path), "max_train_steps": 1, "checkpointing_steps": None, "test_samples": 1}
    for number in (1, 2):
        run("dllm.py", **flags)
        assert (tmp_path / "outputs" / f"dllm-{number}" / "results.json").is_file()
    first = Path("outputs") / "dllm-1"
    before = {path: path.read_bytes() for path in first.iterdir()}
    assert str(first) in refusal(capsys, "dllm.py", **flags, output_dir=first)
    assert {path: path.read_bytes() for path in first.iterdir()} == before
