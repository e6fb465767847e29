"""An adapter's file says whether samples or parts of samples had a λ each in training; the other use warns.

b, k, l, d_in and d_out are 3, 4, 20, 7 and 5.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from safetensors import safe_open
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.loaders.components import part_of
from nara_diffusion.loaders.file import METADATA_KEY, AdapterFile
from nara_diffusion.loaders.insertion import insert
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, nara_config

SAMPLES, LENGTH = 3, 20
LEVELS = torch.tensor([[0.9, 0.1, 0.4, 0.7], [0.2, 0.6, 0.0, 1.0], [0.3, 0.8, 0.5, 0.15]])


@pytest.mark.parametrize(("trained", "level"), [("sample", LEVELS[:, 0]), ("part", LEVELS), ("part", LEVELS[:, :1])])
def test_file_records_level_per_part_and_misuse_warns(tmp_path: Path, trained: str, level: Tensor) -> None:
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], noise_level_per=trained)
    x = torch.randn(SAMPLES, LENGTH, 7)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(OneLayer(nn.Linear(7, 5)), str(tmp_path))
    assert loaded.peft_config["default"].noise_level_per == trained
    for same in (level, 0.5):  # one number for all is no other use
        with noise_level(loaded, same):
            loaded(x)
    other = LEVELS if trained == "sample" else LEVELS[:, 0]
    with noise_level(loaded.train(), other):
        with pytest.warns(UserWarning, match="trained with one λ for each " + trained) as warned:
            loaded(x)
        loaded(x)
    assert len(warned) == 1
    assert loaded.peft_config["default"].noise_level_per == trained


def test_second_adapter_of_same_name_warns_too(tmp_path: Path) -> None:
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"])
    model.peft_config["default"].noise_level_per = "sample"
    model.save_pretrained(str(tmp_path))
    for name in ("one", "two"):
        model.load_adapter(str(tmp_path), name)
    model.set_adapter("two")
    assert [warned_by(model), warned_by(model)] == [True, False]
    model.set_adapter("one")
    model.delete_adapter("two")
    model.load_adapter(str(tmp_path), "two")
    model.set_adapter("two")
    assert warned_by(model)


def test_forward_in_training_writes_no_configuration() -> None:
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"]).train()
    expected = model.peft_config["default"].to_dict()
    for level in (LEVELS[:, 0], LEVELS):
        with noise_level(model, level):
            model(torch.randn(SAMPLES, LENGTH, 7)).sum().backward()
    assert model.peft_config["default"].to_dict() == expected
    assert expected["noise_level_per"] is None


# ---------------------------------------------------------------------- files of version 0.2, which had one λ a sample


def warned_by(model: nn.Module) -> bool:
    """Whether a forward with λ for each part gives the warning."""
    with warnings.catch_warnings(record=True) as caught, noise_level(model, LEVELS):
        warnings.simplefilter("always")
        model(torch.randn(SAMPLES, LENGTH, 7))
    return any("was trained with one λ for each sample" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("is_old", [True, False])
def test_peft_folder_without_field_counts_as_per_sample(tmp_path: Path, is_old: bool) -> None:
    untrained = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"])
    assert not warned_by(untrained)
    untrained.save_pretrained(str(tmp_path))
    config = tmp_path / "adapter_config.json"
    fields = json.loads(config.read_text())
    assert fields.pop("noise_level_per") is None  # this version writes it
    if is_old:
        config.write_text(json.dumps(fields))
    loaded = PeftModel.from_pretrained(OneLayer(nn.Linear(7, 5)), str(tmp_path))
    assert warned_by(loaded) is is_old
    other = OneLayer(nn.Linear(7, 5))
    insert(other, "default", AdapterFile.read(tmp_path).parts["model"])
    assert warned_by(other) is is_old


@pytest.mark.parametrize("is_old", [True, False])
def test_pipeline_file_without_field_counts_as_per_sample(tmp_path: Path, is_old: bool) -> None:
    untrained = inject_adapter_in_model(nara_config(target_modules=["second"]), TwoLayers())
    AdapterFile({"transformer": part_of(untrained, "default")}).save(tmp_path / "old.safetensors")
    with safe_open(tmp_path / "old.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        content = json.loads(file.metadata()[METADATA_KEY])
    assert content["components"]["transformer"].pop("noise_level_per") is None
    path, metadata = (tensors, {METADATA_KEY: json.dumps(content)}) if is_old else (tmp_path / "old.safetensors", None)
    (part,) = AdapterFile.read(path, metadata=metadata).parts.values()
    loaded = TwoLayers()
    insert(loaded, "default", part)
    assert warned_by(loaded) is is_old
