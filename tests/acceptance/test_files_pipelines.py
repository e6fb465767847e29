"""Pipeline files that version 0.1 wrote: each loads by `load_nara_weights` and computes what it did then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.acceptance import _bases, _files

FOLDER = _files.FILES / "pipelines"
NAMES = [f"{name}_{kind}" for name in _bases.PIPELINES for kind in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    return _files.expected("pipelines")


def base(name: str) -> Any:
    return _bases.PIPELINES[name.rpartition("_")[0]][0]()


def say(pipe: Any, name: str) -> dict[str, torch.Tensor]:
    return _bases.PIPELINES[name.rpartition("_")[0]][1](pipe)


def in_dtype(name: str) -> Any:
    """The pipeline in the dtype in which the file was written."""
    pipe = base(name)
    if name.endswith("bfloat16"):
        for part in ("unet", "transformer", "text_encoder", "text_encoder_2"):
            if getattr(pipe, part, None) is not None:
                getattr(pipe, part).bfloat16()
    return pipe


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_file_of_0_1_computes_the_stored_outputs(name: str, outputs) -> None:
    pipe = base(name)
    torch.manual_seed(4321)
    pipe.load_nara_weights(FOLDER / name, adapter_name="mine")
    tensors = load_file(FOLDER / name / _files.PIPELINE_WEIGHTS)
    for part, value in say(pipe, name).items():
        _files.assert_near(value, outputs[f"{name}.{part}"], getattr(pipe, part))
        assert _files.adapted_layers(getattr(pipe, part), "mine") == _files.layers_of(tensors, f"{part}.")


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_file_of_0_1_saved_again_has_the_same_tensors_and_fields(name: str, tmp_path: Path) -> None:
    pipe = in_dtype(name)
    pipe.load_nara_weights(FOLDER / name, adapter_name="mine")
    pipe.save_nara_weights(tmp_path, adapter_name="mine")
    found, stored = tmp_path / _files.PIPELINE_WEIGHTS, FOLDER / name / _files.PIPELINE_WEIGHTS
    _files.assert_same_tensors(found, stored)
    fields, of_0_1 = (_files.header(path)[_files.METADATA] for path in (found, stored))
    assert fields["format_version"] == of_0_1["format_version"]
    assert fields["components"].keys() == of_0_1["components"].keys()
    for part, config in of_0_1["components"].items():
        _files.assert_same_fields(fields["components"][part], config)


@pytest.mark.parametrize("name", ["sdxl_bfloat16", "sdxl_unet_bfloat16"])
def test_file_in_bfloat16_keeps_its_core_in_float32_in_a_pipeline_in_bfloat16(name: str, outputs) -> None:
    pipe = in_dtype(name)
    pipe.load_nara_weights(FOLDER / name)
    for part, value in say(pipe, name).items():
        assert value.dtype == torch.bfloat16
        wanted = outputs[f"{name}.{part}"]
        torch.testing.assert_close(value.float(), wanted, rtol=0, atol=0.1 * wanted.abs().max().item())
        assert (value.float() - wanted).abs().mean() < 0.02 * wanted.abs().max()
        held = {n: p.dtype for n, p in getattr(pipe, part).named_parameters()}
        assert {dtype for n, dtype in held.items() if "core" not in n} == {torch.bfloat16}
        assert {dtype for n, dtype in held.items() if "core" in n} <= {torch.float32}


def test_convert_to_peft_and_back_keeps_each_tensor_of_a_component(tmp_path: Path, outputs, capsys) -> None:
    nara = _files.command()
    nara(["convert", str(FOLDER / "sdxl_unet_float32"), str(tmp_path / "peft"), "--to", "peft"])
    model = PeftModel.from_pretrained(_bases.unet(), tmp_path / "peft").eval()
    pipe = _bases.sdxl()
    pipe.unet = model.base_model.model
    _files.assert_near(_bases.sdxl_outputs(pipe)["unet"], outputs["sdxl_unet_float32.unet"], pipe.unet)
    nara(["convert", str(tmp_path / "peft"), str(tmp_path / "back"), "--to", "pipeline", "--component", "unet"])
    stored = FOLDER / "sdxl_unet_float32" / _files.PIPELINE_WEIGHTS
    _files.assert_same_tensors(tmp_path / "back" / _files.PIPELINE_WEIGHTS, stored)


def test_convert_takes_one_of_several_components(tmp_path: Path, outputs, capsys) -> None:
    source, words = str(FOLDER / "sdxl_float32"), ["--to", "peft", "--component", "text_encoder_2"]
    _files.command()(["convert", source, str(tmp_path), *words])
    pipe = _bases.sdxl()
    pipe.text_encoder_2 = PeftModel.from_pretrained(pipe.text_encoder_2, tmp_path).eval()
    found = _bases.sdxl_outputs(pipe)["text_encoder_2"]
    _files.assert_near(found, outputs["sdxl_float32.text_encoder_2"], pipe.text_encoder_2)
