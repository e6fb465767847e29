"""Repositories: every argument reaches the hub's client, and what it answers comes back. Nothing goes to a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.utils.hub_utils as hub_utils
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import FILE, State


class Hub:
    """Stands in for `hf_hub_download`: folders by name of repository, and what was asked of it."""

    def __init__(self, **repositories: Path) -> None:
        self.repositories = {name.replace("__", "/"): folder for name, folder in repositories.items()}
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, filename: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, "filename": filename, **options})
        if repo_id not in self.repositories:
            response: Any = SimpleNamespace(headers={}, request=None)
            raise RepositoryNotFoundError("404", response=response)
        path = self.repositories[repo_id] / (options.get("subfolder") or "") / filename
        if not path.is_file():
            raise EntryNotFoundError("404")
        return str(path)


def connect(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr(hub_utils, "hf_hub_download", hub)
    return hub


def test_the_default_file_of_a_repository(nara_folder, monkeypatch):
    hub = connect(monkeypatch, Hub(me__toy=nara_folder))
    pipe, local = small_sdxl(), small_sdxl()
    pipe.load_nara_weights("me/toy")
    local.load_nara_weights(nara_folder)
    assert torch.equal(pixels(pipe), pixels(local))
    (call,) = hub.calls
    assert call["filename"] == FILE
    assert call["user_agent"] == {"file_type": "nara_weights", "framework": "pytorch"}


def test_every_argument_reaches_the_hub(nara_folder, tmp_path, monkeypatch):
    shutil.copytree(nara_folder, tmp_path / "repository" / "sub")
    (tmp_path / "repository" / "sub" / FILE).rename(tmp_path / "repository" / "sub" / "toy.safetensors")
    hub = connect(monkeypatch, Hub(me__toy=tmp_path / "repository"))
    pipe = small_sdxl()
    options = {
        "subfolder": "sub",
        "revision": "v2",
        "token": "secret",
        "cache_dir": str(tmp_path / "cache"),
        "force_download": True,
        "local_files_only": True,
    }
    pipe.load_nara_weights("me/toy", "mine", weight_name="toy.safetensors", **options)
    assert pipe.get_active_adapters() == ["mine"]
    (call,) = hub.calls
    assert call["filename"] == "toy.safetensors"
    assert {key: call[key] for key in options} == options


def test_a_repository_in_the_form_of_peft(tmp_path, monkeypatch):
    from tests.loaders.test_peft_form import save_as_peft

    save_as_peft(tmp_path)
    hub = connect(monkeypatch, Hub(me__toy=tmp_path))
    pipe = small_sdxl()
    pipe.load_nara_weights("me/toy", revision="v2")
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}
    assert [call["filename"] for call in hub.calls] == [FILE, "adapter_model.safetensors", "adapter_config.json"]
    assert {call["revision"] for call in hub.calls} == {"v2"}


def test_what_the_hub_has_not(nara_folder, lora_folder, monkeypatch):
    connect(monkeypatch, Hub(me__toy=lora_folder))
    pipe = small_sdxl()
    before = State(pipe)
    with pytest.raises(OSError, match=rf"me/toy does not appear to have a file named {FILE}"):
        pipe.load_nara_weights("me/toy")
    with pytest.raises(OSError, match=r"me/toy does not appear to have a file named x.safetensors"):
        pipe.load_nara_weights("me/toy", weight_name="x.safetensors")
    with pytest.raises(OSError, match=r"you/toy is not a local folder and is not a valid model identifier"):
        pipe.load_nara_weights("you/toy")
    with pytest.raises(ValueError, match=r"is a LoRA, without core: load it by pipe.load_lora_weights"):
        pipe.load_nara_weights("me/toy", weight_name="pytorch_lora_weights.safetensors")
    assert before == State(pipe)
