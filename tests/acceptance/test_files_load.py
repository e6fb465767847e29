"""Files that version 0.1 wrote, in PEFT's and pipelines' form: each loads by its user's call and gives what it gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftConfig, PeftModel, load_peft_weights
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from nara_diffusion.dllm import load_backbone
from tests.acceptance import _bases, _files

PEFT = _files.FILES / "peft"
OUTPUTS = _files.expected("peft")
SHIPPED = _files.ROOT / "examples" / "assets" / "llada-tiny"
OF_TEXT = ["nara", "nara_dora", "knots", "constant", "rank_mask", "bins", "layer", "strength", "mixed"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    # PEFT's, of a base that it can't look up on the Hub
    pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-language:UserWarning"),
]


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
def test_base_files_have_the_bytes_originally_written(name: str) -> None:
    stored = json.loads((_files.FILES / "bases.json").read_text())["sha256"]
    assert _bases.digest(_bases.BASES[name]()) == stored[name]


@pytest.mark.parametrize("name", OF_TEXT)
def test_peft_folder_of_0_1_gives_stored_outputs(name: str, tmp_path) -> None:
    model = loaded(name)
    _files.assert_near(_bases.text_output(model), OUTPUTS[name], model)
    layers = {layer.removeprefix("base_model.model.") for layer in _files.adapted_layers(model)}
    assert layers == _files.layers_of(load_file(PEFT / name / _files.PEFT_WEIGHTS), "base_model.model.")
    model.save_pretrained(tmp_path)
    _files.assert_same_tensors(tmp_path / _files.PEFT_WEIGHTS, PEFT / name / _files.PEFT_WEIGHTS)
    fields = [json.loads((folder / _files.PEFT_CONFIG).read_text()) for folder in (tmp_path, PEFT / name)]
    _files.assert_same_fields(*fields)


def test_mask_density_file_is_refused_without_change() -> None:
    base, message = (
        _bases.language_model(),
        "module_type' can't be loaded: core_input is 'both': choose one of 'noise_level'",
    )
    _files.refused(lambda: PeftModel.from_pretrained(base, PEFT / "module_type"), base, message)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("nara", AutoPeftModelForCausalLM), ("knots", AutoPeftModel), ("nara", LlamaForCausalLM)],
    ids=["causal", "by its class", "of transformers"],
)
def test_auto_classes_load_an_adapter_folder(name: str, kind: Any, base_folder: Path) -> None:
    model = kind.from_pretrained(str(PEFT / name)).eval()
    assert any(type(module) is LlamaForCausalLM for module in model.modules())
    _files.assert_near(_bases.text_output(model), OUTPUTS[name], model)


@pytest.mark.parametrize(("name", "dtype"), [("nara_dora", torch.float32), ("layer", torch.bfloat16)], ids=str)
def test_transformers_load_adapter_equals_peft_and_swaps_nothing(name: str, dtype: torch.dtype) -> None:
    model: Any = _bases.language_model().to(dtype)
    report = model.load_adapter(PEFT / name, adapter_name="mine")
    base = _bases.language_model().to(dtype)
    expected = PeftModel.from_pretrained(base, PEFT / name, autocast_adapter_dtype=False).eval()  # as transformers does
    actual = _bases.text_output(model)
    assert torch.equal(actual, _bases.text_output(expected))
    if dtype == torch.float32:
        _files.assert_near(actual, OUTPUTS[name], model)
    assert not any(report.to_dict().values())
    assert not any(parameter.requires_grad for name_of, parameter in model.named_parameters() if "mine" in name_of)
    assert not model.training
    tensors = load_file(PEFT / name / _files.PEFT_WEIGHTS)
    assert _files.adapted_layers(model, "mine") == _files.layers_of(tensors, "base_model.model.")
    with pytest.raises(ValueError, match=r"has an adapter 'mine'.* does not replace"):
        model.load_adapter(PEFT / "nara", adapter_name="mine", hotswap=True)
    assert torch.equal(_bases.text_output(model), actual)


def test_transformers_load_adapter_takes_tensors_with_configuration() -> None:
    model: Any = _bases.language_model()
    config, tensors = PeftConfig.from_pretrained(PEFT / "nara"), load_peft_weights(str(PEFT / "nara"))
    layers, names = {name: t for name, t in tensors.items() if "nara_core" not in name}, list(model.state_dict())
    with pytest.raises(ValueError, match=r"lacks '.*nara_core"):
        model.load_adapter(peft_config=config, adapter_state_dict=layers)
    assert list(model.state_dict()) == names
    model.load_adapter(peft_config=config, adapter_state_dict=tensors, is_trainable=True)
    _files.assert_near(_bases.text_output(model), OUTPUTS["nara"], model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert config.inference_mode  # the caller's own, as it was


def test_checkpoint_adapter_loads_into_its_runs_backbone() -> None:
    base, _ = load_backbone(str(SHIPPED))
    model = PeftModel.from_pretrained(base, PEFT / "checkpoint-2").eval()
    actual = _bases.shipped_output(model)
    _files.assert_near(actual, OUTPUTS["checkpoint-2"], model)
    with model.disable_adapter():
        assert (_bases.shipped_output(model) - actual).abs().max() > 0.1


def test_file_of_another_prediction_is_refused_naming_scheduler() -> None:
    pipe = _bases.sdxl()
    for load in (pipe.load_nara_weights, lambda folder: PeftModel.from_pretrained(pipe.unet, folder)):
        with pytest.raises(ValueError, match=r"converted.*can't have a scheduler any more.*version 0\.1 or 0\.2"):
            load(PEFT / "converted")
        assert not hasattr(pipe.unet, "peft_config")


def test_peft_folder_of_unet_loads_into_unet_only(tmp_path: Path) -> None:
    folder = _files.unet_folder(tmp_path / "given")
    model = PeftModel.from_pretrained(_bases.unet(), folder).eval()
    pipe: Any = _bases.sdxl()
    pipe.unet = model.base_model.model
    _files.assert_near(_bases.sdxl_outputs(pipe)["unet"], OUTPUTS["converted"], pipe.unet)
    model.save_pretrained(tmp_path)
    _files.assert_same_tensors(tmp_path / _files.PEFT_WEIGHTS, PEFT / "converted" / _files.PEFT_WEIGHTS)
    assert json.loads((tmp_path / _files.PEFT_CONFIG).read_text())["noise_convention"] == "timestep"


PIPELINES = _files.FILES / "pipelines"
OF_PIPELINES = _files.expected("pipelines")
NAMES = [f"{name}_{kind}" for name in _bases.PIPELINES for kind in ("float32", "bfloat16")]


def base(name: str) -> Any:
    return _bases.PIPELINES[name.rpartition("_")[0]][0]()


def say(pipe: Any, name: str) -> dict[str, torch.Tensor]:
    return _bases.PIPELINES[name.rpartition("_")[0]][1](pipe)


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_file_of_0_1_gives_stored_outputs(name: str, tmp_path: Path) -> None:
    """In float32 to rounding; the model in the file's dtype keeps the core in float32."""
    path, own_dtype = (
        PIPELINES / name / _files.PIPELINE_WEIGHTS,
        torch.bfloat16 if "bfloat16" in name else torch.float32,
    )
    tensors = load_file(path)
    for dtype in dict.fromkeys((torch.float32, own_dtype)):
        pipe = base(name)
        for part in _files.parts_of(pipe).values():
            part.to(dtype)
        torch.manual_seed(4321)
        pipe.load_nara_weights(PIPELINES / name, adapter_name="mine")
        for part, value in say(pipe, name).items():
            model, expected = getattr(pipe, part), OF_PIPELINES[f"{name}.{part}"]
            assert value.dtype == dtype
            assert _files.adapted_layers(model, "mine") == _files.layers_of(tensors, f"{part}.")
            dtypes = {n: p.dtype for n, p in model.named_parameters()}
            assert {each for n, each in dtypes.items() if "core" not in n} == {dtype}
            assert {each for n, each in dtypes.items() if "core" in n} <= {torch.float32}
            if dtype == torch.float32:
                _files.assert_near(value, expected, model)
            elif part != "transformer":  # whose base alone is far off in bfloat16
                torch.testing.assert_close(value.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())
                assert (value.float() - expected).abs().mean() < 0.02 * expected.abs().max()
    pipe.save_nara_weights(tmp_path, adapter_name="mine")
    written = tmp_path / _files.PIPELINE_WEIGHTS
    _files.assert_same_tensors(written, path)
    fields, of_0_1 = (_files.header(each)[_files.METADATA] for each in (written, path))
    assert fields["format_version"] == of_0_1["format_version"]
    assert fields["components"].keys() == of_0_1["components"].keys()
    for part, config in of_0_1["components"].items():
        _files.assert_same_fields(fields["components"][part], config)


@pytest.mark.parametrize(("name", "part"), [("sdxl_unet_float32", "unet"), ("sdxl_float32", "text_encoder_2")])
def test_convert_to_peft_and_back_keeps_each_tensor(name: str, part: str, tmp_path: Path) -> None:
    source, chosen = PIPELINES / name, [] if part == "unet" else ["--component", part]
    _files.nara("convert", source, tmp_path / "peft", "--to", "peft", *chosen)
    pipe = _bases.sdxl()
    setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), tmp_path / "peft").eval().base_model.model)
    _files.assert_near(_bases.sdxl_outputs(pipe)[part], OF_PIPELINES[f"{name}.{part}"], getattr(pipe, part))
    _files.nara("convert", tmp_path / "peft", tmp_path / "back", "--to", "pipeline", "--component", part)
    back, stored = (load_file(folder / _files.PIPELINE_WEIGHTS) for folder in (tmp_path / "back", source))
    of_part = {key: tensor for key, tensor in stored.items() if key.startswith(f"{part}.")}
    torch.testing.assert_close(back, of_part, rtol=0, atol=0)
