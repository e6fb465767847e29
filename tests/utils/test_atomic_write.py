"""A save that fails half-way, or is killed, leaves the files of before, or none: never half of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from peft import PeftModel

from nara_diffusion.utils.atomic_write import atomic_write_files
from tests.helpers.adapted import adapted, nara_config
from tests.helpers.files.saved_adapters import TARGETS, WEIGHTS, base_model, output, reseeded_base, saved

CONFIG = "adapter_config.json"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _half_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: Any, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"half of the weights")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.peft_model, "safe_save_file", save)


def _half_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Any, folder: str, **options: Any) -> None:
        (Path(folder) / CONFIG).write_text('{"peft_ty')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.config.PeftConfigMixin, "save_pretrained", save)


@pytest.mark.parametrize("failing", [_half_of_the_weights, _half_of_the_configuration])
def test_a_save_that_fails_leaves_the_adapter_that_was_there(failing, tmp_path, monkeypatch):
    kept = saved(tmp_path)
    before = content(tmp_path)
    later = adapted(base_model(), target_modules=TARGETS, lora_alpha=31)
    with monkeypatch.context() as patched:
        failing(patched)
        with pytest.raises(OSError, match="No space left"):
            later.save_pretrained(tmp_path)
        with pytest.raises(OSError, match="No space left"):
            later.save_pretrained(tmp_path / "new" / "folder")
    assert content(tmp_path) == before
    assert not (tmp_path / "new" / "folder").exists()
    assert not list(tmp_path.rglob(".partial*"))
    x = torch.randn(3, 7)
    assert torch.equal(output(PeftModel.from_pretrained(reseeded_base(), tmp_path), x), output(kept, x))
    later.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(reseeded_base(), tmp_path), x), output(later, x))


def test_a_configuration_that_fails_half_way_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    nara_config(r=3).save_pretrained(tmp_path)
    before = content(tmp_path)
    with monkeypatch.context() as patched:
        _half_of_the_configuration(patched)
        with pytest.raises(OSError, match="No space left"):
            nara_config(r=5).save_pretrained(tmp_path)
    assert content(tmp_path) == before


def test_a_process_killed_while_it_saves_leaves_the_adapter_that_was_there(tmp_path):
    saved(tmp_path)
    before = content(tmp_path)
    program = """if True:
    import os, sys, peft.peft_model
    from tests.helpers.adapted import adapted
    from tests.helpers.files.saved_adapters import TARGETS, base_model
    def save(tensors, path, **options):
        with open(path, "wb") as file:
            file.write(b"half of the weights")
        os._exit(9)
    peft.peft_model.safe_save_file = save
    adapted(base_model(), target_modules=TARGETS, lora_alpha=31).save_pretrained(sys.argv[1])
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == 9
    kept = {name: data for name, data in content(tmp_path).items() if not name.startswith(".partial")}
    assert kept == before


def test_saving_keeps_what_else_is_in_the_folder_and_goes_on_with_its_card(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("---\ntags: [toy]\n---\n# My own card\n")
    model = adapted(base_model(), target_modules=TARGETS)
    model.add_adapter("other", nara_config(target_modules=TARGETS, r=3))
    model.save_pretrained(tmp_path)
    names = {"notes.txt", "README.md", CONFIG, WEIGHTS, f"other/{CONFIG}", f"other/{WEIGHTS}"}
    assert content(tmp_path).keys() == names
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "# My own card" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "other" / CONFIG).read_text())["r"] == 3
    assert PeftModel.from_pretrained(base_model(), tmp_path, subfolder="other").peft_config["default"].r == 3


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    model = adapted(base_model(), target_modules=TARGETS)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert content(tmp_path) == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory"):
        model.save_pretrained(tmp_path / "file")


def test_whole_files_replaces_files_by_those_of_the_same_name(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("stays")
    with atomic_write_files(tmp_path) as partial:
        (partial / "a").write_text("new")
        (partial / "inner").mkdir()
        (partial / "inner" / "c").write_text("too")
        assert (tmp_path / "a").read_text() == "old"
        assert os.stat(partial).st_dev == os.stat(tmp_path).st_dev
    assert content(tmp_path) == {"a": b"new", "b": b"stays", "inner/c": b"too"}
