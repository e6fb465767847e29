"""Broken files, and whole ones for other models, a row each: refused by what is wrong, and nothing is changed."""

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
from tests.acceptance import _bases, _files

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], "tuple[str, ...]"]
"""Breaks the tensors of a file, and returns words that the error has to have."""
GOOD = {"pipeline": _files.FILES / "pipelines" / "sdxl_float32", "peft": _files.FILES / "peft" / "nara"}
WEIGHTS = {"pipeline": _files.PIPELINE_WEIGHTS, "peft": _files.PEFT_WEIGHTS}
MAKE: dict[str, Callable[[], Any]] = {"pipeline": _bases.sdxl, "peft": _bases.language_model}

# ---------------------------------------------------------------------- ways to break a file


def first(tensors: Tensors, part: str) -> str:
    """The first key with `part`, of the denoiser in a pipeline's file."""
    return next(key for key in sorted(tensors) if part in key and not key.startswith("text_encoder"))


def words(key: str) -> tuple[str, ...]:
    """What an error about that tensor has to say: its module and its kind, whatever a model puts between them."""
    key = key.removeprefix("base_model.model.").removeprefix("unet.")
    module, lora, kind = key.partition(".lora_")
    return (module, f"lora_{kind[0]}") if lora else ("core", *key.rsplit(".", 1)[1:])


def drop(part: str, *, all_of_them: bool = False) -> Change:
    def change(tensors: Tensors) -> tuple[str, ...]:
        one = first(tensors, part)
        for key in [key for key in tensors if part in key] if all_of_them else [one]:
            del tensors[key]
        return words(one)

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
    "one tensor of the core missing": drop("shared.layers.1.weight", all_of_them=True),
    "core missing": drop("core", all_of_them=True),
    "frequencies missing": drop("freq", all_of_them=True),
    "A of a layer missing": drop("lora_A"),
    "B of a layer missing": drop("lora_B"),
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
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "core type of a later version": ({"core_type": "splines"}, "splines"),
    "core sharing that the tensors deny": ({"core_sharing": "layer"}, "nara_core"),
    "rank that the tensors deny": ({"r": 5, "rank_pattern": {}}, "rank"),
    "fewer modules than tensors": ({"target_modules": ["v_proj", "to_v"], "alpha_pattern": {}}, "target_modules"),
    "field of a later version": ({"later_option": 3}, "later_option"),
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda whole: whole[:-9],
    "half": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
}


def copied(form: str, folder: Path) -> Path:
    """The file of weights of a copy of the good adapter in `folder`."""
    shutil.copytree(GOOD[form], folder, dirs_exist_ok=True)
    return folder / WEIGHTS[form]


def change_tensors(path: Path, change: Change) -> tuple[str, ...]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    named = change(tensors)
    save_file(tensors, path, metadata=metadata)
    return named


def change_fields(form: str, path: Path, fields: dict[str, Any]) -> None:
    if form == "peft":
        config = path.with_name(_files.PEFT_CONFIG)
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    else:
        content = _files.header(path)[_files.METADATA]
        content["components"]["unet"] |= fields
        save_file(load_file(path), path, metadata={"format": "pt", _files.METADATA: json.dumps(content)})


# ---------------------------------------------------------------------- what a refusal leaves


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


def parts_of(model: Any) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"model": model}
    parts = {name: getattr(model, name, None) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")}
    return {name: part for name, part in parts.items() if part is not None}


def state(model: Any) -> dict[str, Any]:
    """What a load could change."""
    found: dict[str, Any] = {} if isinstance(model, nn.Module) else {"scheduler": id(model.scheduler)}
    for name, part in parts_of(model).items():
        found |= {
            f"{name}: modules": [(n, type(m), m.training, len(m._forward_hooks)) for n, m in part.named_modules()],
            f"{name}: trained": {n for n, p in part.named_parameters() if p.requires_grad},
            f"{name}: adapters": dict(getattr(part, "peft_config", None) or {}),
            f"{name}: values": _bases.digest(part),
        }
    return found


def refused(call: Callable[[], Any], model: Any, *parts: str) -> None:
    """`call` raises ValueError whose message has these parts, and leaves `model` as it was."""
    before = state(model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the parts are matched below)
        call()
    assert all(part in str(caught.value) for part in parts), (parts, str(caught.value))
    assert state(model) == before


def loading(form: str, model: Any, folder: Path) -> Callable[[], Any]:
    if form == "pipeline":
        return lambda: model.load_nara_weights(folder)
    return lambda: PeftModel.from_pretrained(model, folder)


def pairs(rows: dict[str, Any], *both: str) -> list[tuple[str, str]]:
    """Each row with one form of file, by turns, since one check serves both; `both`: rows with either."""
    turns = [(row, list(GOOD)[index % 2]) for index, row in enumerate(rows)]
    return [*turns, *((row, form) for row in both for form in GOOD if (row, form) not in turns)]


# ---------------------------------------------------------------------- broken


@pytest.mark.parametrize(("row", "form"), pairs(TENSORS, "core missing", "layer missing", "A of another width"))
def test_file_with_wrong_tensors_is_refused_and_changes_nothing(row: str, form: str, models, tmp_path: Path) -> None:
    parts = change_tensors(copied(form, tmp_path), TENSORS[row])
    refused(loading(form, models[form], tmp_path), models[form], *parts)


@pytest.mark.parametrize(("row", "form"), pairs(FIELDS, "rank that the tensors deny", "field of a later version"))
def test_file_with_a_wrong_configuration_is_refused_and_changes_nothing(row, form, models, tmp_path) -> None:
    fields, part = FIELDS[row]
    change_fields(form, copied(form, tmp_path), fields)
    refused(loading(form, models[form], tmp_path), models[form], part)


@pytest.mark.parametrize(("row", "form"), pairs(BYTES, "cut off"))
def test_file_that_is_not_whole_is_refused_and_changes_nothing(row: str, form: str, models, tmp_path: Path) -> None:
    path = copied(form, tmp_path)
    path.write_bytes(BYTES[row](path.read_bytes()))
    refused(loading(form, models[form], tmp_path), models[form], str(tmp_path))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({_files.METADATA: '{"format_version": 2}'}, ("format_version 2", "update the package")),
        ({}, ("configuration",)),
    ],
    ids=["of a newer format", "without its own"],
)
def test_pipeline_file_with_other_metadata_is_refused(content, parts, models, tmp_path: Path) -> None:
    path = copied("pipeline", tmp_path)
    save_file(load_file(path), path, metadata={"format": "pt", **content})
    refused(loading("pipeline", models["pipeline"], tmp_path), models["pipeline"], *parts)


class Touch:
    """Leaves a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("suffix", "form", "zipped", "message"),
    [
        (".safetensors", "pipeline", True, r"safetensors' is a pickle .*torch.load\(path, weights_only=True"),
        (".safetensors", "pipeline", False, r"safetensors' is a pickle .*torch.load\(path, weights_only=True"),
        (".bin", "pipeline", True, r"no safetensors file, but 'pytorch_nara_weights\.bin', a pickle"),
        (".bin", "peft", True, "[Ww]eights.only"),
    ],
)
def test_pickle_is_refused_as_one_and_not_run(suffix, form, zipped, message, models, tmp_path: Path) -> None:
    path = copied(form, tmp_path / "adapter")
    content = {**load_file(path), "code": Touch(tmp_path / "was run")}
    path.unlink()
    torch.save(content, path.with_suffix(suffix), _use_new_zipfile_serialization=zipped)
    before = state(models[form])
    with pytest.raises(Exception, match=message):
        loading(form, models[form], tmp_path / "adapter")()
    assert state(models[form]) == before
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("row", ["core missing", "B of a layer missing", "layer too many"])
def test_load_adapter_of_transformers_refuses_the_same(row: str, models, tmp_path: Path) -> None:
    parts, model = change_tensors(copied("peft", tmp_path), TENSORS[row]), models["peft"]
    refused(lambda: model.load_adapter(tmp_path, adapter_name="mine"), model, str(tmp_path), *parts)


# ---------------------------------------------------------------------- whole, and for other models


def _llama(**changes: Any) -> LlamaForCausalLM:
    config = _bases.language_model().config
    for name, value in changes.items():
        setattr(config, name, value)
    config.head_dim = config.hidden_size // config.num_attention_heads
    return _bases.filled(LlamaForCausalLM(config), "other")


OTHERS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "UNet of other widths": ("pipeline", lambda: _bases.sdxl(block_out_channels=(8, 24)), "another base model"),
    "pipeline of another family": ("pipeline", _bases.flux, "'text_encoder'"),
    "language model of fewer layers": ("peft", lambda: _llama(num_hidden_layers=1), "layers.1"),
    "language model of more layers": ("peft", lambda: _llama(num_hidden_layers=3), "layers.2"),
    "language model of another width": ("peft", lambda: _llama(hidden_size=24), "another base model"),
}


@pytest.mark.parametrize("row", OTHERS)
def test_file_of_another_base_is_refused_and_changes_nothing(row: str) -> None:
    form, make, part = OTHERS[row]
    model = make()
    refused(loading(form, model, GOOD[form]), model, part)


def test_file_whose_noise_level_is_another_than_the_models_is_refused(models, tmp_path: Path) -> None:
    change_fields("pipeline", copied("pipeline", tmp_path), {"noise_convention": "masked_share"})
    refused(loading("pipeline", models["pipeline"], tmp_path), models["pipeline"], "masked_share", "timestep")


def test_naras_and_loras_are_refused_by_each_others_loaders_with_the_right_call(models, tmp_path: Path) -> None:
    pipe, trained, masked = models["pipeline"], _bases.sdxl(), _bases.sdxl()
    trained.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    trained.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(trained.unet))
    refused(loading("pipeline", pipe, tmp_path / "lora"), pipe, "load_lora_weights")
    masked.unet.add_adapter(NaraConfig(core_type="rank_mask", r=5, target_modules=["to_q"]))
    masked.save_nara_weights(tmp_path / "nara")
    like_a_lora = tmp_path / "nara" / WEIGHTS["pipeline"]  # what it is stands in its metadata alone
    assert all(".lora_" in key for key in load_file(like_a_lora))
    save_file(load_file(GOOD["pipeline"] / WEIGHTS["pipeline"]), tmp_path / "core.safetensors")  # no metadata
    for file in (GOOD["pipeline"] / WEIGHTS["pipeline"], like_a_lora, tmp_path / "core.safetensors"):
        for loader in (pipe.load_lora_weights, pipe.unet.load_lora_adapter):
            refused(lambda loader=loader, file=file: loader(file), pipe, "load_nara_weights")


def test_models_that_refused_every_file_take_a_whole_one(models) -> None:
    """Last, on those that all tests above have left."""
    pipe = models["pipeline"]
    pipe.load_nara_weights(GOOD["pipeline"])
    _files.assert_near(_bases.sdxl_outputs(pipe)["unet"], _files.expected("pipelines")["sdxl_float32.unet"], pipe.unet)
    model = PeftModel.from_pretrained(models["peft"], GOOD["peft"]).eval()
    _files.assert_near(_bases.text_output(model), _files.expected("peft")["nara"], model)
