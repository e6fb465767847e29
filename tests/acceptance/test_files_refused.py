"""Broken files, a row each: refused with an error that names what is wrong, and nothing of the model is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.acceptance import _bases, _files
from tests.acceptance._broken import (
    BYTES,
    FIELDS,
    GOOD,
    MAKE,
    TENSORS,
    assert_unchanged,
    change_fields,
    change_tensors,
    copied,
    loading,
    parts_of,
    refused,
    state,
)


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {form: make() for form, make in MAKE.items()}


@pytest.fixture
def models(kept: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One pipeline and one language model, which meet every broken file; new ones after one was taken."""
    yield kept
    for form, model in kept.items():
        if any(getattr(part, "peft_config", None) for part in parts_of(model).values()):
            kept[form] = MAKE[form]()


def pairs(rows: dict[str, Any], *both: str) -> list[tuple[str, str]]:
    """Each row with one form of file, by turns, since one check serves both; `both`: rows with either."""
    turns = [(row, list(GOOD)[index % 2]) for index, row in enumerate(rows)]
    return [*turns, *((row, form) for row in both for form in GOOD if (row, form) not in turns)]


@pytest.mark.parametrize(("row", "form"), pairs(TENSORS, "core missing", "layer missing", "A of another width"))
def test_file_with_wrong_tensors_is_refused_and_changes_nothing(row: str, form: str, models, tmp_path: Path) -> None:
    parts = change_tensors(copied(form, tmp_path), TENSORS[row])
    refused(loading(form, models[form], tmp_path), models[form], *parts)


@pytest.mark.parametrize(("row", "form"), pairs(FIELDS, "rank that the tensors deny"))
def test_file_with_a_wrong_configuration_is_refused_and_changes_nothing(row, form, models, tmp_path) -> None:
    fields, part = FIELDS[row]
    change_fields(form, copied(form, tmp_path), fields)
    refused(loading(form, models[form], tmp_path), models[form], part)


@pytest.mark.parametrize("form", GOOD)
def test_file_with_a_field_that_this_version_lacks_is_refused(form: str, models, tmp_path: Path) -> None:
    change_fields(form, copied(form, tmp_path), {"later_option": 3})
    refused(loading(form, models[form], tmp_path), models[form], "later_option")


@pytest.mark.parametrize(("row", "form"), pairs(BYTES, "cut off"))
def test_file_that_is_not_whole_is_refused_and_changes_nothing(row: str, form: str, models, tmp_path: Path) -> None:
    path = copied(form, tmp_path)
    path.write_bytes(BYTES[row](path.read_bytes()))
    refused(loading(form, models[form], tmp_path), models[form], str(tmp_path))


class Touch:
    """Leaves a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(("suffix", "form"), [(".safetensors", "pipeline"), (".bin", "peft"), (".bin", "pipeline")])
def test_pickle_is_refused_and_not_run(suffix: str, form: str, models, tmp_path: Path) -> None:
    path = copied(form, tmp_path / "adapter")
    tensors = load_file(path)
    path.unlink()
    torch.save({**tensors, "code": Touch(tmp_path / "was run")}, path.with_suffix(suffix))
    before = state(models[form])
    with pytest.raises(Exception, match=r"whole|safetensors|[Ww]eights.only"):
        loading(form, models[form], tmp_path / "adapter")()
    assert_unchanged(before, state(models[form]))
    assert not (tmp_path / "was run").exists()


def test_pipeline_file_without_its_metadata_is_refused(models, tmp_path: Path) -> None:
    path = copied("pipeline", tmp_path)
    save_file(load_file(path), path, metadata={"format": "pt"})
    refused(loading("pipeline", models["pipeline"], tmp_path), models["pipeline"], "configuration")


@pytest.mark.parametrize("row", ["core missing", "B of a layer missing", "layer too many"])
def test_load_adapter_of_transformers_refuses_the_same(row: str, models, tmp_path: Path) -> None:
    parts, model = change_tensors(copied("peft", tmp_path), TENSORS[row]), models["peft"]
    refused(lambda: model.load_adapter(tmp_path, adapter_name="mine"), model, *parts)


def test_second_adapter_that_is_broken_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    parts = change_tensors(copied("peft", tmp_path), TENSORS["A of a layer missing"])
    model = PeftModel.from_pretrained(_bases.language_model(), GOOD["peft"]).eval()
    refused(lambda: model.load_adapter(str(tmp_path), adapter_name="other"), model, *parts)
    _files.assert_near(_bases.text_output(model), _files.expected("peft")["nara"], model)


def test_models_that_refused_every_file_take_a_whole_one(models) -> None:
    """Last, on those that all tests above have left."""
    pipe = models["pipeline"]
    pipe.load_nara_weights(GOOD["pipeline"])
    _files.assert_near(_bases.sdxl_outputs(pipe)["unet"], _files.expected("pipelines")["sdxl_float32.unet"], pipe.unet)
    model = PeftModel.from_pretrained(models["peft"], GOOD["peft"]).eval()
    _files.assert_near(_bases.text_output(model), _files.expected("peft")["nara"], model)
