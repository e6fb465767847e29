"""A save that fails, on a full disk or where a file is in its way, leaves the files that were there, whole."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors import SafetensorError

from nara_diffusion import to_lora
from tests.acceptance import _bases, _files
from tests.acceptance._files import nara
from tests.helpers.adapted import TwoLayers, adapted

PIPELINE, PEFT = _files.FILES / "pipelines" / "sdxl_unet_float32", _files.FILES / "peft" / "nara"
ONE, OVER = ("--noise_level", "0.7"), "--overwrite"
FAILURES = (OSError, SafetensorError, SystemExit)

# PEFT's, of a base that it can't look up on the Hub
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-language:UserWarning")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Inside, no file grows beyond `room` bytes: as on a full disk, a write fails in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def another_pipeline() -> Any:
    pipe = _bases.sdxl()
    pipe.load_nara_weights(_files.FILES / "pipelines" / "sdxl_float32")
    return pipe


def another_model() -> PeftModel:
    return PeftModel.from_pretrained(_bases.language_model(), _files.FILES / "peft" / "layer")


SAVES: dict[str, Callable[[], Callable[[Path], Any]]] = {
    "save_nara_weights": lambda: another_pipeline().save_nara_weights,
    "to_lora": lambda: to_lora(another_model(), 0.5).save_pretrained,
    "to_lora of a small model": lambda: to_lora(adapted(TwoLayers(), target_modules=["first"]), 0.5).save_pretrained,
    "nara fold": lambda: lambda folder: nara("fold", PIPELINE, folder / "lora.safetensors", *ONE, OVER),
    "nara fold to PEFT": lambda: lambda folder: nara("fold", PEFT, folder, *ONE, "--form", "peft", OVER),
    "nara convert": lambda: lambda folder: nara("convert", PIPELINE, folder, "--to", "peft", OVER),
}
"""{what writes: what makes the call that writes a folder}."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a file by each name that is written."""
    folder = tmp_path / "kept"
    shutil.copytree(PEFT, folder)
    shutil.copy(PIPELINE / _files.PIPELINE_WEIGHTS, folder)
    for name in ("lora.safetensors", "README.md"):
        (folder / name).write_text("kept")
    return folder


@pytest.mark.parametrize(("row", "room"), [(row, 800 if "small" in row else 3000) for row in SAVES])
def test_save_on_full_disk_keeps_the_earlier_files(row, room, folder: Path, capsys) -> None:
    """800 bytes take the small model's LoRA, and not its configuration."""
    save, original = SAVES[row](), content(folder)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(FAILURES) as caught, full_disk(room):
            save(target)
        assert content(folder) == original
        assert not content(folder.parent / "new")
        if isinstance(caught.value, SystemExit):
            message = str(caught.value)
            assert str(target) in message
            assert "File too large" in message
            assert ".partial" not in message
            assert "\n" not in message
    save(folder)
    assert content(folder) != original


@pytest.mark.parametrize("row", ["save_nara_weights", "nara fold", "nara convert"])
def test_save_over_a_file_names_and_keeps_it(row: str, tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_text("kept")
    for target in (path, path / "out"):
        with pytest.raises((*FAILURES, ValueError), match=str(path)):
            SAVES[row]()(target)
    assert content(tmp_path) == {"a file": b"kept"}


WRITES: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "fold": lambda folder: ("fold", PIPELINE, folder / "lora.safetensors", *ONE),
    "fold to PEFT": lambda folder: ("fold", PEFT, folder, *ONE, "--form", "peft"),
    "plot": lambda folder: ("plot", PEFT, "--output", folder / "core.png", "--points", 2),
    "convert": lambda folder: ("convert", PIPELINE, folder, "--to", "peft"),
    "convert back": lambda folder: ("convert", PEFT, folder, "--to", "pipeline", "--component", "unet"),
}


@pytest.mark.parametrize("row", WRITES)
def test_a_command_replaces_a_file_only_with_overwrite(row: str, tmp_path: Path, capsys) -> None:
    words = WRITES[row](tmp_path)
    nara(*words)
    for path in tmp_path.iterdir():
        path.write_text("kept")
    original = content(tmp_path)
    with pytest.raises(SystemExit, match=f"'{tmp_path}.*exists.*--overwrite"):
        nara(*words)
    assert content(tmp_path) == original
    nara(*words, OVER)
    assert all(content(tmp_path)[name] != text for name, text in original.items())
