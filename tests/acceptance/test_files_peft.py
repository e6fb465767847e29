"""Folders in PEFT's form that version 0.1 wrote: each loads by its user's call and computes what it did then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from nara_diffusion import noise_level
from nara_diffusion.dllm import load_backbone
from tests.acceptance import _bases, _files

PEFT = _files.FILES / "peft"
SHIPPED = _files.ROOT / "examples" / "assets" / "llada-tiny"
OF_TEXT = ["nara", "nara_dora", "knots", "constant", "rank_mask", "bins", "module_type", "layer", "strength", "mixed"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    # PEFT's, of a base that it can't look up on the Hub
    pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-language:UserWarning"),
]


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    return _files.expected("peft")


@pytest.fixture
def base_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the adapters' configurations say that their base is: in tiny-language, of the present directory."""
    monkeypatch.chdir(tmp_path)
    _bases.language_model().save_pretrained("tiny-language")
    return tmp_path / "tiny-language"


def loaded(name: str) -> PeftModel:
    """With another draw at hand, should anything of the adapter be drawn anew."""
    torch.manual_seed(4321)
    base = _bases.mixed_model() if name == "mixed" else _bases.language_model()
    return PeftModel.from_pretrained(base, PEFT / name).eval()


@pytest.mark.parametrize("name", _bases.BASES)
def test_base_of_the_files_has_the_same_bytes_as_when_they_were_written(name: str) -> None:
    stored = json.loads((_files.FILES / "bases.json").read_text())["sha256"]
    assert _bases.digest(_bases.BASES[name]()) == stored[name]


@pytest.mark.parametrize("name", OF_TEXT)
def test_peft_folder_of_0_1_computes_the_stored_outputs_and_is_saved_as_it_was(name: str, outputs, tmp_path) -> None:
    model = loaded(name)
    _files.assert_near(_bases.text_output(model), outputs[name], model)
    held = {layer.removeprefix("base_model.model.") for layer in _files.adapted_layers(model)}
    assert held == _files.layers_of(load_file(PEFT / name / _files.PEFT_WEIGHTS), "base_model.model.")
    model.save_pretrained(tmp_path)
    _files.assert_same_tensors(tmp_path / _files.PEFT_WEIGHTS, PEFT / name / _files.PEFT_WEIGHTS)
    fields = [json.loads((folder / _files.PEFT_CONFIG).read_text()) for folder in (tmp_path, PEFT / name)]
    _files.assert_same_fields(*fields)


@pytest.mark.parametrize(
    ("name", "kind"), [("nara", AutoPeftModelForCausalLM), ("knots", AutoPeftModel)], ids=["causal", "by its class"]
)
def test_auto_class_of_peft_finds_base_and_adapter(name, kind, base_folder: Path, outputs) -> None:
    model = kind.from_pretrained(str(PEFT / name)).eval()
    assert isinstance(model.base_model.model, LlamaForCausalLM)
    _files.assert_near(_bases.text_output(model), outputs[name], model)


@pytest.mark.parametrize("name", ["nara_dora", "layer"])
def test_load_adapter_of_transformers_computes_the_stored_outputs(name: str, outputs) -> None:
    model = _bases.language_model()
    model.load_adapter(PEFT / name, adapter_name="mine")
    _files.assert_near(_bases.text_output(model), outputs[name], model)
    tensors = load_file(PEFT / name / _files.PEFT_WEIGHTS)
    assert _files.adapted_layers(model, "mine") == _files.layers_of(tensors, "base_model.model.")


def test_from_pretrained_of_transformers_takes_an_adapters_folder(base_folder: Path, outputs) -> None:
    model = LlamaForCausalLM.from_pretrained(PEFT / "nara")
    _files.assert_near(_bases.text_output(model), outputs["nara"], model)


def test_adapter_of_a_checkpoint_loads_into_the_backbone_of_its_run(outputs) -> None:
    base, _ = load_backbone(str(SHIPPED))
    model = PeftModel.from_pretrained(base, PEFT / "checkpoint-2").eval()
    found = _bases.shipped_output(model)
    _files.assert_near(found, outputs["checkpoint-2"], model)
    with model.disable_adapter():
        assert (_bases.shipped_output(model) - found).abs().max() > 0.1


def test_peft_folder_of_a_unet_loads_into_a_pipeline_with_its_scheduler(outputs) -> None:
    pipe = _bases.sdxl()
    before = pipe.scheduler
    pipe.load_nara_weights(PEFT / "converted", adapter_name="v")
    _files.assert_near(_bases.sdxl_outputs(pipe)["unet"], outputs["converted"], pipe.unet)
    assert type(pipe.scheduler) is type(before)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.unload_nara_weights()
    assert pipe.scheduler is before
    assert pipe.scheduler.config.prediction_type == "epsilon"


def test_peft_folder_of_a_unet_loads_into_the_unet_alone(tmp_path: Path, outputs) -> None:
    model = PeftModel.from_pretrained(_bases.unet(), PEFT / "converted").eval()
    pipe: Any = _bases.sdxl()
    pipe.unet = model.base_model.model
    _files.assert_near(_bases.sdxl_outputs(pipe)["unet"], outputs["converted"], pipe.unet)
    model.save_pretrained(tmp_path)
    _files.assert_same_tensors(tmp_path / _files.PEFT_WEIGHTS, PEFT / "converted" / _files.PEFT_WEIGHTS)
    stored, found = (json.loads((path / _files.PEFT_CONFIG).read_text()) for path in (PEFT / "converted", tmp_path))
    assert found["scheduler"] == stored["scheduler"]
    assert found["noise_convention"] == "timestep"


def test_an_adapter_loaded_for_training_moves_factors_and_core_alone(tmp_path: Path) -> None:
    shutil.copytree(PEFT / "nara", tmp_path / "nara")
    model = PeftModel.from_pretrained(_bases.language_model(), tmp_path / "nara", is_trainable=True)
    with noise_level(model, _bases.LEVELS):
        model(input_ids=_bases.tokens(29)).logits.square().mean().backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / _files.PEFT_WEIGHTS) for name in ("nara", "after"))
    unmoved = {key for key, tensor in before.items() if torch.equal(tensor, after[key])}
    assert unmoved == {key for key in before if "freq" in key}
    assert all(torch.equal(p, q) for p, q in _shared(model, _bases.language_model()))


def _shared(model: PeftModel, base: LlamaForCausalLM) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The base's weights in `model`, and in `base`."""
    held = {name.replace(".base_layer", ""): p for name, p in model.base_model.model.named_parameters()}
    return [(held[name], parameter) for name, parameter in base.named_parameters()]
