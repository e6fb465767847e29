"""Broken files, a row each: refused with an error that names what is wrong, and nothing of the model is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nara_diffusion import NaraConfig
from tests.acceptance import _files

Tensors = dict[str, Tensor]
Fields = dict[str, Any]
Change = Callable[[Tensors], "tuple[str, ...]"]
"""Breaks the tensors of a file, and returns words that the error has to have."""
GOOD = {"pipeline": _files.FILES / "pipelines" / "sdxl_float32", "peft": _files.FILES / "peft" / "nara"}
WEIGHTS = {"pipeline": _files.PIPELINE_WEIGHTS, "peft": _files.PEFT_WEIGHTS}


def first(tensors: Tensors, part: str) -> str:
    """The first key with `part`, of the denoiser in a pipeline's file."""
    return next(key for key in sorted(tensors) if part in key and not key.startswith("text_encoder"))


def words(key: str) -> tuple[str, ...]:
    """What an error about that tensor has to say: its module and its kind, whatever a model puts between them."""
    key = key.removeprefix("base_model.model.").removeprefix("unet.")
    module, lora, kind = key.partition(".lora_")
    return (module, f"lora_{kind[0]}") if lora else ("core", *key.rsplit(".", 1)[1:])


def drop(part: str) -> Change:
    """All tensors with `part` in their names."""

    def change(tensors: Tensors) -> tuple[str, ...]:
        dropped = [key for key in tensors if part in key]
        named = words(first(tensors, part))
        for key in dropped:
            del tensors[key]
        return named

    return change


def drop_one(part: str) -> Change:
    def change(tensors: Tensors) -> tuple[str, ...]:
        key = first(tensors, part)
        del tensors[key]
        return words(key)

    return change


def drop_layer(tensors: Tensors) -> tuple[str, ...]:
    layer = first(tensors, ".lora_A").partition(".lora_A")[0]
    for kind in "AB":
        del tensors[f"{layer}.lora_{kind}.weight"]
    return words(f"{layer}.lora_A")[:1]


def add(old: str, new: str) -> Change:
    """Another tensor, called like one that is there with `new` in place of `old`."""

    def change(tensors: Tensors) -> tuple[str, ...]:
        key = first(tensors, old)
        other = new.join(key.rsplit(old, 1))
        tensors[other] = tensors[key].clone()
        return words(other)[:1]

    return change


def alter(part: str, change: Callable[[Tensor], Tensor]) -> Change:
    def changed(tensors: Tensors) -> tuple[str, ...]:
        key = first(tensors, part)
        tensors[key] = change(tensors[key]).contiguous()
        return words(key)

    return changed


TENSORS: dict[str, Change] = {
    "one tensor of the core missing": drop("shared.layers.1.weight"),
    "core missing": drop("core"),
    "frequencies missing": drop("freq"),
    "A of a layer missing": drop_one("lora_A"),
    "B of a layer missing": drop_one("lora_B"),
    "layer missing": drop_layer,
    "tensor too many": add("lora_A", "lora_C"),
    "layer too many": add("0.", "7."),
    "A of another width": alter("lora_A", lambda A: torch.cat([A, A[:, :1]], dim=1)),
    "A of another rank": alter("lora_A", lambda A: torch.cat([A, A[:1]])),
    "B of another height": alter("lora_B", lambda B: B[1:]),
    "core of another shape": alter("layers.1.weight", lambda W: W.t()),
    "core in bfloat16": alter("layers.1.weight", lambda W: W.bfloat16()),
    "factor with NaN": alter("lora_B", lambda B: B * torch.nan),
    "factor of integers": alter("lora_A", lambda A: A.int()),
}
FIELDS: dict[str, tuple[Fields, str]] = {
    "core type of a later version": ({"core_type": "splines"}, "splines"),
    "core sharing that the tensors deny": ({"core_sharing": "layer"}, "nara_core"),
    "rank that the tensors deny": ({"r": 5, "rank_pattern": {}}, "rank"),
    "fewer modules than tensors": ({"target_modules": ["v_proj", "to_v"], "alpha_pattern": {}}, "target_modules"),
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda whole: whole[:-9],
    "half": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
}


MAKE: dict[str, Callable[[], Any]] = {"pipeline": _files.sdxl, "peft": _files.language_model}


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


def loading(form: str, model: Any, folder: Path) -> Callable[[], Any]:
    if form == "pipeline":
        return lambda: model.load_nara_weights(folder)
    return lambda: PeftModel.from_pretrained(model, folder)


def parts_of(model: Any) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"model": model}
    parts = {name: getattr(model, name, None) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")}
    return {name: part for name, part in parts.items() if part is not None}


def state(model: Any) -> dict[str, Any]:
    """What a load could change."""
    found: dict[str, Any] = {} if isinstance(model, nn.Module) else {"scheduler": id(model.scheduler)}
    for name, part in parts_of(model).items():
        found[f"{name}: modules"] = {key: (type(module), module.training) for key, module in part.named_modules()}
        found[f"{name}: trainable"] = {key: parameter.requires_grad for key, parameter in part.named_parameters()}
        found[f"{name}: adapters"] = list(getattr(part, "peft_config", {}))
        found[f"{name}: tensors"] = {key: tensor.clone() for key, tensor in part.state_dict().items()}
    return found


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.endswith("tensors"):
            torch.testing.assert_close(after[key], value, rtol=0, atol=0)
        else:
            assert after[key] == value, key


def refused(load: Callable[[], Any], model: Any, *parts: str) -> None:
    """The call raises an error with all `parts` and changes nothing of `model`."""
    before = state(model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load()
    for part in parts:
        assert part in str(caught.value)
    assert_unchanged(before, state(model))


def copied(form: str, folder: Path) -> Path:
    """A copy of the good file, to be broken; returns the file with the tensors."""
    shutil.copytree(GOOD[form], folder, dirs_exist_ok=True)
    return folder / WEIGHTS[form]


def change_tensors(path: Path, change: Change) -> tuple[str, ...]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    named = change(tensors)
    save_file(tensors, path, metadata=metadata)
    return named


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("row", TENSORS)
def test_file_with_wrong_tensors_is_refused_and_changes_nothing(row: str, form: str, models, tmp_path: Path) -> None:
    parts = change_tensors(copied(form, tmp_path), TENSORS[row])
    refused(loading(form, models[form], tmp_path), models[form], *parts)


def change_fields(form: str, path: Path, fields: Fields) -> None:
    if form == "peft":
        config = path.with_name(_files.PEFT_CONFIG)
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    else:
        content = _files.header(path)[_files.METADATA]
        content["components"]["unet"] |= fields
        save_file(load_file(path), path, metadata={"format": "pt", _files.METADATA: json.dumps(content)})


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("row", FIELDS)
def test_file_with_a_wrong_configuration_is_refused_and_changes_nothing(row, form, models, tmp_path) -> None:
    fields, part = FIELDS[row]
    change_fields(form, copied(form, tmp_path), fields)
    refused(loading(form, models[form], tmp_path), models[form], part)


_IGNORED = pytest.mark.xfail(strict=True, reason="PEFT drops the field with a warning, and nothing refuses the folder")


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
@pytest.mark.parametrize("form", ["pipeline", pytest.param("peft", marks=_IGNORED)])
def test_file_with_a_field_that_this_version_lacks_is_refused(form: str, models, tmp_path: Path) -> None:
    change_fields(form, copied(form, tmp_path), {"later_option": 3})
    refused(loading(form, models[form], tmp_path), models[form], "later_option")


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("row", BYTES)
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


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
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


def test_file_whose_noise_level_is_another_than_the_models_is_refused(models, tmp_path: Path) -> None:
    change_fields("pipeline", copied("pipeline", tmp_path), {"noise_convention": "masked_share"})
    refused(loading("pipeline", models["pipeline"], tmp_path), models["pipeline"], "masked_share", "timestep")


def test_pipeline_file_without_its_metadata_is_refused(models, tmp_path: Path) -> None:
    path = copied("pipeline", tmp_path)
    save_file(load_file(path), path, metadata={"format": "pt"})
    refused(loading("pipeline", models["pipeline"], tmp_path), models["pipeline"], "configuration")


OTHERS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "UNet of other widths": ("pipeline", lambda: _files.sdxl(block_out_channels=(8, 24)), "another base model"),
    "UNet of fewer layers": ("pipeline", lambda: _files.sdxl(layers_per_block=1), "another base model"),
    "pipeline of another family": ("pipeline", _files.flux, "'text_encoder'"),
    "language model of fewer layers": ("peft", lambda: _small_llama(num_hidden_layers=1), "layers.1"),
    "language model of more layers": ("peft", lambda: _small_llama(num_hidden_layers=3), "layers.2"),
    "language model of another width": ("peft", lambda: _small_llama(hidden_size=24), "shape"),
}


def _small_llama(**changes: Any) -> LlamaForCausalLM:
    config = _files.language_model().config
    for name, value in changes.items():
        setattr(config, name, value)
    config.head_dim = config.hidden_size // config.num_attention_heads
    return _files.filled(LlamaForCausalLM(config), "other")


@pytest.mark.parametrize("row", OTHERS)
def test_file_of_another_base_is_refused_and_changes_nothing(row: str) -> None:
    form, make, part = OTHERS[row]
    model = make()
    refused(loading(form, model, GOOD[form]), model, part)


@pytest.mark.parametrize("row", ["core missing", "B of a layer missing", "layer too many"])
def test_load_adapter_of_transformers_refuses_the_same(row: str, models, tmp_path: Path) -> None:
    parts, model = change_tensors(copied("peft", tmp_path), TENSORS[row]), models["peft"]
    refused(lambda: model.load_adapter(tmp_path, adapter_name="mine"), model, *parts)


@pytest.mark.parametrize("row", ["core missing", "A of a layer missing", "A of another width"])
def test_second_adapter_that_is_broken_leaves_the_first_as_it_was(row: str, tmp_path: Path) -> None:
    parts = change_tensors(copied("peft", tmp_path), TENSORS[row])
    model = PeftModel.from_pretrained(_files.language_model(), GOOD["peft"]).eval()
    refused(lambda: model.load_adapter(str(tmp_path), adapter_name="other"), model, *parts)
    _files.assert_near(_files.text_output(model), _files.expected("peft")["nara"], model)


def lora_file(folder: Path) -> Path:
    """A LoRA of the UNet by Diffusers' own save_lora_weights."""
    pipe = _files.sdxl()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return folder


def test_lora_given_to_load_nara_weights_is_refused_by_the_right_call(models, tmp_path: Path) -> None:
    refused(loading("pipeline", models["pipeline"], lora_file(tmp_path)), models["pipeline"], "load_lora_weights")


@pytest.mark.parametrize("call", ["load_lora_weights", "load_lora_adapter"])
def test_nara_given_to_a_loader_of_loras_is_refused_by_the_right_call(call: str, models) -> None:
    pipe, file = models["pipeline"], GOOD["pipeline"] / WEIGHTS["pipeline"]
    loader = pipe.load_lora_weights if call == "load_lora_weights" else pipe.unet.load_lora_adapter
    refused(lambda: loader(file), pipe, "load_nara_weights")


@pytest.mark.parametrize("core", ["rank_mask", "bins"])
def test_nara_whose_core_has_no_tensors_is_refused_by_a_loader_of_loras_too(core: str, models, tmp_path: Path) -> None:
    """All keys of its file are a LoRA's; what it is stands in the metadata alone."""
    trained = _files.sdxl()
    trained.unet.add_adapter(NaraConfig(core_type=core, r=5, target_modules=["to_q"]))
    trained.save_nara_weights(tmp_path)
    assert all(".lora_" in key for key in load_file(tmp_path / WEIGHTS["pipeline"]))
    file = tmp_path / WEIGHTS["pipeline"]
    refused(lambda: models["pipeline"].load_lora_weights(file), models["pipeline"], "load_nara_weights")


def test_models_that_refused_every_file_take_a_whole_one(models) -> None:
    """Last, on those that all tests above have left."""
    pipe = models["pipeline"]
    pipe.load_nara_weights(GOOD["pipeline"])
    _files.assert_near(_files.sdxl_outputs(pipe)["unet"], _files.expected("pipelines")["sdxl_float32.unet"], pipe.unet)
    model = PeftModel.from_pretrained(models["peft"], GOOD["peft"]).eval()
    _files.assert_near(_files.text_output(model), _files.expected("peft")["nara"], model)
