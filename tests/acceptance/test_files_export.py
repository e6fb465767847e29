"""Exports of the stored NaRAs: the LoRAs that version 0.1 wrote, what hosts make of them, and NaRAs from LoRAs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from nara_diffusion import StrengthSchedule, from_lora, noise_level, set_strength, to_lora
from tests.acceptance import _bases, _files

EXPORTS, PEFT, PIPELINES = (_files.FILES / kind for kind in ("exports", "peft", "pipelines"))
LEVEL = _files.FOLD_LEVEL
HOST_FILES = [f"{name}_{form}" for name in ("sdxl", "flux") for form in ("kohya", "comfyui", "diffusers")]
EXACT = 1e-6
"""Of folding, relative to the update, which is computed in float64 and kept in float32."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-language:UserWarning"),
]


def language(name: str) -> PeftModel:
    base = _bases.mixed_model() if name == "mixed" else _bases.language_model()
    return PeftModel.from_pretrained(base, PEFT / name).eval()


def stock(folder: Path, base: nn.Module | None = None) -> PeftModel:
    """The LoRA in `folder`, as PEFT alone reads it."""
    model = PeftModel.from_pretrained(_bases.language_model() if base is None else base, folder).eval()
    assert type(model.peft_config["default"]) is LoraConfig
    return model


@torch.no_grad()
def at_level(model: nn.Module, level: float | Tensor = LEVEL) -> Tensor:
    with noise_level(model, level):
        return _bases.plain_text_output(model)


# ---------------------------------------------------------------------- one λ


@pytest.mark.parametrize("name", HOST_FILES)
def test_fold_writes_host_files_of_0_1_exactly(name: str, tmp_path: Path, capsys) -> None:
    base, form = name.split("_")
    source, output = PIPELINES / f"{base}_float32", tmp_path / "lora.safetensors"
    _files.nara("fold", source, output, "--noise_level", LEVEL, "--form", form, "--base", base)
    assert ("not for ComfyUI" in capsys.readouterr().out) is (name == "sdxl_diffusers")
    _files.assert_same_tensors(output, EXPORTS / f"{name}.safetensors", EXACT)
    assert _files.header(output) == _files.header(EXPORTS / f"{name}.safetensors")


def test_fold_writes_pefts_folder_as_0_1_did(tmp_path: Path, capsys) -> None:
    _files.nara("fold", PEFT / "nara", tmp_path, "--noise_level", LEVEL, "--form", "peft")
    _files.assert_same_tensors(tmp_path / _files.PEFT_WEIGHTS, EXPORTS / "nara_peft" / _files.PEFT_WEIGHTS, EXACT)
    fields = [json.loads((path / _files.PEFT_CONFIG).read_text()) for path in (tmp_path, EXPORTS / "nara_peft")]
    _files.assert_same_fields(*fields)


@pytest.mark.parametrize("name", ["sdxl_kohya", "sdxl_diffusers", "flux_diffusers"])
def test_diffusers_loader_gives_the_nara_output_at_level(name: str) -> None:
    """Of the stored files, to which the test above compares what is written today."""
    base, say = _bases.PIPELINES[name.split("_")[0]]
    nara, host = base(), base()
    nara.load_nara_weights(PIPELINES / f"{name.split('_')[0]}_float32")
    host.load_lora_weights(EXPORTS / f"{name}.safetensors")
    denoiser = getattr(nara, "unet", None) or nara.transformer
    with noise_level(denoiser, LEVEL):
        expected = say(nara)
    for part, value in say(host).items():
        assert all(type(config) is LoraConfig for config in getattr(host, part).peft_config.values())
        _files.assert_near(value, expected[part], getattr(host, part))


@pytest.mark.parametrize("name", ["nara_dora", "knots", "bins", "rank_mask", "layer", "strength", "mixed"])
def test_folds_match_the_nara_in_peft(name: str, tmp_path: Path, capsys) -> None:
    nara = language(name)
    expected, original = at_level(nara), {key: tensor.clone() for key, tensor in nara.state_dict().items()}
    to_lora(nara, LEVEL).save_pretrained(tmp_path)
    torch.testing.assert_close(dict(nara.state_dict()), original, rtol=0, atol=0)
    host = stock(tmp_path, _bases.mixed_model() if name == "mixed" else None)
    with torch.no_grad():
        _files.assert_near(_bases.plain_text_output(host), expected, host)
    tensors = load_file(PEFT / name / _files.PEFT_WEIGHTS)
    assert len(_files.adapted_layers(host)) == len(_files.layers_of(tensors))
    _files.nara("fold", PEFT / name, tmp_path / "file", "--noise_level", LEVEL, "--form", "peft")
    assert ("at its strength of 0.4375 there" in capsys.readouterr().out) is (name == "strength")
    _files.assert_same_tensors(tmp_path / "file" / _files.PEFT_WEIGHTS, tmp_path / _files.PEFT_WEIGHTS, 1e-6)
    of_file, of_model = (json.loads((path / _files.PEFT_CONFIG).read_text()) for path in (tmp_path / "file", tmp_path))
    _files.assert_same_fields(of_file, of_model)
    assert of_file["auto_mapping"]["base_model_class"] == type(host.base_model.model).__name__


@pytest.mark.parametrize("strength", [0.25, StrengthSchedule([(0.25, 1.0), (0.5, 0.5)])], ids=["number", "schedule"])
def test_to_lora_includes_the_strength_that_was_set(strength: Any, tmp_path: Path) -> None:
    nara = language("nara")
    set_strength(nara, "default", strength)
    expected = at_level(nara)
    assert (expected - at_level(language("nara"))).abs().max() > 0.1
    to_lora(nara, LEVEL).save_pretrained(tmp_path)
    host = stock(tmp_path)
    with torch.no_grad():
        _files.assert_near(_bases.plain_text_output(host), expected, host)


# ---------------------------------------------------------------------- from a LoRA


def test_from_lora_starts_as_lora_and_folds_back(tmp_path: Path) -> None:
    host = stock(EXPORTS / "nara_peft")
    with torch.no_grad():
        expected = _bases.plain_text_output(host)
    nara = from_lora(EXPORTS / "nara_peft", _bases.language_model(), core_type="hypernetwork", core_hidden_dims=(6, 6))
    nara.eval()
    _files.assert_near(at_level(nara, _bases.LEVELS), expected, nara)
    to_lora(nara, 0.8).save_pretrained(tmp_path)
    _files.assert_same_tensors(tmp_path / _files.PEFT_WEIGHTS, EXPORTS / "nara_peft" / _files.PEFT_WEIGHTS)
    trained = {name for name, parameter in nara.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in nara.named_parameters() if ".default." in name and "freq" not in name}


@pytest.fixture(scope="module")
def outputs_of_diffusers() -> dict[str, Tensor]:
    """What Diffusers alone makes of its file."""
    host = _bases.sdxl()
    host.load_lora_weights(EXPORTS / "sdxl_diffusers.safetensors")
    return _bases.sdxl_outputs(host)


@pytest.mark.parametrize("form", ["kohya", "diffusers", "comfyui"])
def test_from_lora_reads_host_file_into_a_pipeline(
    form: str, outputs_of_diffusers: dict[str, Tensor], tmp_path: Path
) -> None:
    pipes = [_bases.sdxl()]
    from_lora(EXPORTS / f"sdxl_{form}.safetensors", pipes[0])
    if form == "kohya":  # the parts are the same in all forms
        pipes[0].save_nara_weights(tmp_path)
        pipes.append(_bases.sdxl())
        pipes[1].load_nara_weights(tmp_path)
    for pipe in pipes:
        for part, output in _bases.sdxl_outputs(pipe).items():
            _files.assert_near(output, outputs_of_diffusers[part], getattr(pipe, part))
