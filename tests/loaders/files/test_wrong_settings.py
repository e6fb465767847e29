"""Damaged metadata in the file of `save_nara_weights`: a ValueError with the file's and the field's name, and a
pipeline as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.helpers.files.wrong_settings import ALWAYS_THERE, MAY_BE, WRONG
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.adapters import FILE, State

KEY = "nara_adapter_metadata"


@pytest.fixture(scope="module")
def one_pipe() -> tuple[Any, State]:
    pipe = small_sdxl()
    return pipe, State(pipe)


@pytest.fixture
def pipe(one_pipe: tuple[Any, State]) -> Iterator[Any]:
    """Refused files all meet the same pipeline, which has to stay as it was."""
    pipe, before = one_pipe
    yield pipe
    assert before == State(pipe)


@pytest.fixture(scope="module")
def tensors(nara_folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(nara_folder / FILE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def content(nara_folder: Path) -> dict[str, Any]:
    with safe_open(nara_folder / FILE, "pt") as file:
        return json.loads(file.metadata()[KEY])


def refused(pipe: Any, tensors: dict[str, torch.Tensor], text: str, path: Path, *parts: str) -> None:
    save_file(tensors, path, metadata={"format": "pt", KEY: text})
    for source, options, name in ((path, {}, str(path)), (tensors, {"metadata": {KEY: text}}, "The dict")):
        with pytest.raises(ValueError, match=re.escape(name)) as caught:
            pipe.load_nara_weights(source, **options)
        for part in parts:
            assert part in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("field", sorted(MAY_BE.keys() - {"peft_type"}))
def test_a_wrong_value_of_any_field_is_refused_with_the_file_and_the_field(field, pipe, tensors, content, tmp_path):
    for kind, value in WRONG.items():
        if kind not in MAY_BE[field] or (field, kind) == ("target_modules", "null"):
            changed = json.loads(json.dumps(content))
            changed["components"]["unet"][field] = value
            refused(pipe, tensors, json.dumps(changed), tmp_path / "a.safetensors", field)


@pytest.mark.parametrize("field", ALWAYS_THERE)
def test_metadata_without_a_field_that_every_version_writes_is_refused(field, pipe, tensors, content, tmp_path):
    changed = json.loads(json.dumps(content))
    del changed["components"]["unet"][field]
    refused(pipe, tensors, json.dumps(changed), tmp_path / "a.safetensors", f"lacks {field}", "'unet'")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format_version": "1"}, "has format_version '1', where an integer belongs"),
        ({"format_version": True}, "has format_version True"),
        ({"format_version": 1.0}, "has format_version 1.0"),
        ({"format_version": None}, "has format_version None"),
        ({"format_version": 10**40}, "has format version 1000000000"),
        ({"components": [["unet", {}]]}, "components that are no objects"),
        ({"components": {"unet": 3}}, "components that are no objects"),
        ({"components": {"unet": []}}, "components that are no objects"),
        ({"components": None}, "components that are no objects"),
        ({"components": {"unet": {}}}, "target_modules None: a saved adapter names the modules"),
    ],
)
def test_metadata_of_wrong_types_is_refused_by_name(changes, part, pipe, tensors, content, tmp_path):
    refused(pipe, tensors, json.dumps(content | changes), tmp_path / "a.safetensors", part)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "JSONDecodeError"),
        ('{"format_version": 1', "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("[]", "a list, where JSON's object belongs"),
        ('{"format_version": 1, "format_version": 2, "components": {}}', "has 'format_version' twice"),
        ('{"format_version": 1, "components": {"unet": {"r": 3, "r": 4}}}', "has 'r' twice"),
        ('{"components": {}}', "has no 'format_version'"),
    ],
    ids=["empty", "cut off", "deep", "a list", "a version twice", "a rank twice", "no version"],
)
def test_metadata_that_is_no_such_object_is_refused_by_name(text, part, pipe, tensors, tmp_path):
    refused(pipe, tensors, text, tmp_path / "a.safetensors", part)


def test_a_dict_of_other_things_than_tensors_is_refused_by_key(pipe, tensors, content):
    metadata = {KEY: json.dumps(content)}
    name = next(iter(tensors))
    for wrong in ([1.0], None, tensors[name].numpy(), tensors[name].to("meta")):
        with pytest.raises(ValueError, match=f"The dict holds '{re.escape(name)}', which is no tensor"):
            pipe.load_nara_weights(tensors | {name: wrong}, metadata=metadata)
    with pytest.raises(ValueError, match=r"The dict holds 3, which is no tensor with a text as its name"):
        pipe.load_nara_weights(tensors | {3: tensors[name]}, metadata=metadata)
    with pytest.raises(ValueError, match=r"metadata of The dict can't be read"):
        pipe.load_nara_weights(tensors, metadata={KEY: 3})


def test_a_header_that_is_not_utf_8_is_refused_by_name(pipe, nara_folder, tmp_path):
    whole = bytearray((nara_folder / FILE).read_bytes())
    whole[20] = 0xFF
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"'.*a.safetensors' is no whole safetensors file"):
        pipe.load_nara_weights(path)


def test_what_does_not_fit_the_pipeline_is_refused_with_the_file(pipe, tensors, content, tmp_path):
    for field, value, part in (
        ("core_hidden_dims", [4], "'nara_core.shared.layers"),
        ("layers_to_transform", [7], "its own target_modules do not select"),
        ("noise_convention", "mine", "λ defined as 'mine'"),
        ("modules_to_save", ["proj_in"], "modules_to_save=['proj_in']"),
        ("scheduler", {"_class_name": "NoScheduler"}, "the scheduler NoScheduler"),
    ):
        changed = json.loads(json.dumps(content))
        changed["components"]["unet"][field] = value
        path = tmp_path / "a.safetensors"
        save_file(tensors, path, metadata={"format": "pt", KEY: json.dumps(changed)})
        with pytest.raises(ValueError, match=re.escape(f"The adapter in '{path}' is refused: ")) as caught:
            pipe.load_nara_weights(path)
        assert part in str(caught.value)
        with pytest.raises(ValueError, match="The adapter in the dict is refused: "):
            pipe.load_nara_weights(tensors, metadata={KEY: json.dumps(changed)})


SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"prediction_type": ["v_prediction"]}, "one of epsilon, v_prediction, sample, flow_prediction"),
        ({"prediction_type": "velocity"}, "scheduler is {"),
        ({"prediction_type": 1e308}, "scheduler is {"),
        ({"beta_end": float("nan")}, "EulerDiscreteScheduler has no noise schedule"),
        ({"beta_start": -1.0}, "EulerDiscreteScheduler has no noise schedule"),
        ({"beta_end": 2.0}, "EulerDiscreteScheduler has no noise schedule"),
        ({"num_train_timesteps": 0}, "EulerDiscreteScheduler"),
        ({"beta_start": "x"}, "EulerDiscreteScheduler refuses its configuration"),
    ],
    ids=str,
)
def test_carried_scheduler_with_wrong_values_is_refused_with_the_file(changes, part, pipe, tensors, content, tmp_path):
    changed = json.loads(json.dumps(content))
    changed["components"]["unet"]["scheduler"] = SCHEDULER | changes
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt", KEY: json.dumps(changed)})
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        pipe.load_nara_weights(path)
    assert part in str(caught.value)


def test_adapter_that_peft_refuses_is_rolled_back_and_named(pipe, tensors, content, tmp_path):
    changed = json.loads(json.dumps(content))
    changed["components"]["unet"]["trainable_token_indices"] = []
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt", KEY: json.dumps(changed)})
    with pytest.raises(ValueError, match=re.escape(f"The adapter in '{path}' is refused: ")):
        pipe.load_nara_weights(path)
