"""Broken files, and whole ones for other models, a row each: refused by what is wrong, and nothing is changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nara_diffusion import NaraConfig
from tests.acceptance import _bases, _files
from tests.acceptance._text import backbone

Tensors = dict[str, Tensor]
Break = Callable[[str, Path], "tuple[str, ...]"]
"""Breaks the file of weights of a form, and returns words that the error has to have."""
GOOD = {"pipeline": _files.FILES / "pipelines" / "sdxl_float32", "peft": _files.FILES / "peft" / "nara"}
WEIGHTS = {"pipeline": _files.PIPELINE_WEIGHTS, "peft": _files.PEFT_WEIGHTS}
MAKE: dict[str, Callable[[], Any]] = {"pipeline": _bases.sdxl, "peft": _bases.language_model}

# ---------------------------------------------------------------------- ways to break a file


def words(key: str) -> tuple[str, ...]:
    """What an error about that tensor has to say: its module and its kind, whatever a model puts between them."""
    module, lora, kind = re.sub(r"^(base_model\.model|unet|text_encoder)\.", "", key).partition(".lora_")
    return (module, f"lora_{kind[0]}") if lora else ("core", *key.rsplit(".", 1)[1:])


def edit(part: str, change: Callable[[Tensors, list[str]], Tensors]) -> Break:
    """`change` gets the tensors and the keys that match `part`, those of the denoiser first; a key of it is named."""

    def broken(form: str, path: Path) -> tuple[str, ...]:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        keys = sorted((key for key in tensors if re.search(part, key)), key=lambda key: (key.startswith("text"), key))
        changed = change(tensors, keys)
        save_file({key: tensor.contiguous() for key, tensor in changed.items()}, path, metadata=metadata)
        return words(next((key for key in changed if key not in tensors), keys[0]))

    return broken


def drop(part: str) -> Break:
    return edit(part, lambda found, keys: {key: tensor for key, tensor in found.items() if key not in keys})


def add(old: str, new: str) -> Break:
    """Another tensor, called like one that is there with `new` in place of `old`."""
    return edit(old, lambda found, keys: {**found, new.join(keys[0].rsplit(old, 1)): found[keys[0]].clone()})


def alter(part: str, change: Callable[[Tensor], Tensor]) -> Break:
    return edit(part, lambda found, keys: {**found, keys[0]: change(found[keys[0]])})


def metadata(content: dict[str, str], *parts: str) -> Break:
    def broken(form: str, path: Path) -> tuple[str, ...]:
        save_file(load_file(path), path, metadata={"format": "pt", **content})
        return parts

    return broken


def fields(change: dict[str, Any], *parts: str) -> Break:
    def broken(form: str, path: Path) -> tuple[str, ...]:
        if form == "peft":
            config = path.with_name(_files.PEFT_CONFIG)
            config.write_text(json.dumps(json.loads(config.read_text()) | change))
            return parts
        content = _files.header(path)[_files.METADATA]
        content["components"]["unet"] |= change
        return metadata({_files.METADATA: json.dumps(content)}, *parts)(form, path)

    return broken


def cut(length: int) -> Break:
    def broken(form: str, path: Path) -> tuple[str, ...]:
        path.write_bytes(path.read_bytes()[:length])
        return ()

    return broken


LAYER = r"(layers.0.mlp.down_proj|unet.conv_in)"
ROWS: dict[str, Break] = {
    "one tensor of the core missing": drop("shared.layers.1.weight"),
    "core missing": drop(r"^(unet|base_model)\..*core"),
    "frequencies missing": drop("freq"),
    "A of a layer missing": drop(rf"{LAYER}.lora_A"),
    "B of a layer missing": drop(rf"{LAYER}.lora_B"),
    "layer missing": drop(LAYER),
    "tensor too many": add("lora_A", "lora_C"),
    "layer too many": add("0.", "7."),
    "A of another width": alter("lora_A", lambda A: torch.cat([A, A[:, :1]], dim=1)),
    "A of another rank": alter("lora_A", lambda A: torch.cat([A, A[:1]])),
    "B of another height": alter("lora_B", lambda B: B[1:]),
    "core of another shape": alter("layers.1.weight", lambda W: W.t()),
    "core in bfloat16": alter("layers.1.weight", lambda W: W.bfloat16()),
    "factor with NaN": alter("lora_B", lambda B: B * torch.nan),
    "factor of integers": alter("lora_A", lambda A: A.int()),
    "core type of a later version": fields({"core_type": "splines"}, "splines"),
    "core sharing that the tensors deny": fields({"core_sharing": "layer"}, "nara_core"),
    "rank that the tensors deny": fields({"r": 5, "rank_pattern": {}}, "rank"),
    "fewer modules than tensors": fields({"target_modules": ["v_proj", "to_v"], "alpha_pattern": {}}, "target_modules"),
    "field of a later version": fields({"later_option": 3}, "later_option"),
    "cut off": cut(-9),
    "empty": cut(0),
}
"""Of either form of file, by turns, since one check serves both."""
OF_PIPELINES: dict[str, Break] = {
    "newer format": metadata({_files.METADATA: '{"format_version": 2}'}, "format_version 2", "update the package"),
    "no configuration": metadata({}, "configuration"),
    "no components": metadata({_files.METADATA: '{"format_version": 1}'}, "configuration", "'components'", "damaged"),
    "another noise level": fields({"noise_convention": "masked_share"}, "masked_share", "timestep"),
    "a tensor of the last part missing": drop("text_encoder_2.nara_core"),
    "a part without tensors": lambda *file: drop(r"^text_encoder\.")(*file) and ("text_encoder: ", "no A and B"),
}
BOTH = ["core missing", "layer missing", "A of another width", "rank that the tensors deny", "field of a later version"]
BOTH += ["core in bfloat16"]  # of which PEFT alone would make float32
CASES = [(row, list(GOOD)[index % 2]) for index, row in enumerate(ROWS)]
CASES += [(row, form) for row in [*BOTH, "cut off"] for form in GOOD if (row, form) not in CASES]
CASES += [(row, "pipeline") for row in OF_PIPELINES]
ROWS |= OF_PIPELINES

# ---------------------------------------------------------------------- what a refusal leaves


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {form: make() for form, make in MAKE.items()}


@pytest.fixture
def models(kept: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One pipeline and one language model, which meet every broken file; new ones after one was taken."""
    yield kept
    for form, model in kept.items():
        if any(getattr(part, "peft_config", None) for part in _files.parts_of(model).values()):
            kept[form] = MAKE[form]()


def loading(form: str, model: Any, folder: Path) -> Callable[[], Any]:
    if form == "pipeline":
        return lambda: model.load_nara_weights(folder)
    return lambda: PeftModel.from_pretrained(model, folder)


def broken(row: str, form: str, folder: Path) -> tuple[str, ...]:
    """Writes the good adapter of that form into `folder`, and breaks it."""
    shutil.copytree(GOOD[form], folder, dirs_exist_ok=True)
    return ROWS[row](form, folder / WEIGHTS[form])


# ---------------------------------------------------------------------- broken


@pytest.mark.parametrize(("row", "form"), CASES)
def test_broken_file_is_refused_and_changes_nothing(row: str, form: str, models, tmp_path: Path) -> None:
    parts = broken(row, form, tmp_path)
    _files.refused(loading(form, models[form], tmp_path), models[form], str(tmp_path), *parts)


@pytest.mark.parametrize("row", ["core missing", "B of a layer missing", "layer too many"])
def test_load_adapter_of_transformers_refuses_the_same(row: str, models, tmp_path: Path) -> None:
    parts, model = broken(row, "peft", tmp_path), models["peft"]
    _files.refused(lambda: model.load_adapter(tmp_path, adapter_name="mine"), model, str(tmp_path), *parts)


@pytest.mark.parametrize(
    "beside",
    [{"use_dora": True}, {"modules_to_save": ["near"]}, {"bias": "all"}, {"init_lora_weights": "pissa"}],
    ids=str,
)
def test_refused_file_leaves_other_trained_weights_unchanged(beside: dict[str, Any], tmp_path: Path) -> None:
    config = NaraConfig(r=3, target_modules=["head"], **beside)
    get_peft_model(_bases.mixed_model(), config).save_pretrained(tmp_path)
    parts, base = ROWS["frequencies missing"]("peft", tmp_path / WEIGHTS["peft"]), _bases.mixed_model()
    _files.refused(loading("peft", base, tmp_path), base, str(tmp_path), *parts)
    if "init_lora_weights" in beside:
        return  # PEFT warns of such a second adapter
    adapted = get_peft_model(base, NaraConfig(r=2, target_modules=["head"]))
    _files.refused(lambda: adapted.load_adapter(str(tmp_path), "other"), adapted, str(tmp_path), *parts)
    assert adapted.active_adapters == ["default"]


class Touch:
    """Leaves a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("suffix", "form", "zipped", "message"),
    [
        (".safetensors", "pipeline", True, "not a complete safetensors file.*other formats are not read"),
        (".safetensors", "pipeline", False, "not a complete safetensors file.*other formats are not read"),
        (".bin", "pipeline", True, "it has no safetensors file"),
        (".bin", "peft", True, "[Ww]eights.only"),
    ],
)
def test_pickle_is_refused_and_not_run(suffix, form, zipped, message, models, tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOOD[form], tmp_path / "adapter")) / WEIGHTS[form]
    content = {**load_file(path), "code": Touch(tmp_path / "was run")}
    path.unlink()
    torch.save(content, path.with_suffix(suffix), _use_new_zipfile_serialization=zipped)
    original = _files.state(models[form])
    with pytest.raises(Exception, match=message):
        loading(form, models[form], tmp_path / "adapter")()
    assert _files.state(models[form]) == original
    assert not (tmp_path / "was run").exists()


# ---------------------------------------------------------------------- whole, and for other models


NARROW = {"hidden_size": 16, "intermediate_size": 24}
"""Of the language model that the adapter is for."""
OTHERS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "UNet of other widths": ("pipeline", lambda: _bases.sdxl(block_out_channels=(8, 24)), "another base model"),
    "pipeline of another family": ("pipeline", _bases.flux, "'text_encoder'"),
    "language model of fewer layers": ("peft", lambda: backbone(29, num_hidden_layers=1, **NARROW), "layers.1"),
    "language model of more layers": ("peft", lambda: backbone(29, num_hidden_layers=3, **NARROW), "layers.2"),
    "language model of another width": ("peft", lambda: backbone(29), "another base model"),
}


@pytest.mark.parametrize("row", OTHERS)
def test_file_of_another_base_is_refused_without_change(row: str) -> None:
    form, make, part = OTHERS[row]
    model = make()
    _files.refused(loading(form, model, GOOD[form]), model, part)


def test_value_beyond_layer_dtype_is_refused_without_change(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOOD["pipeline"], tmp_path / "adapter")) / WEIGHTS["pipeline"]
    parts, pipe = alter("lora_B", lambda B: B + 1e6)("pipeline", path), _bases.sdxl()
    pipe.unet.half()
    _files.refused(loading("pipeline", pipe, path), pipe, "too large for its layer", *parts)


def test_models_that_refused_files_load_a_complete_one(models) -> None:
    """Last, on those that all tests above have left."""
    pipe = models["pipeline"]
    with pytest.raises(ValueError, match="metadata is for a dict of tensors"):
        pipe.load_nara_weights(GOOD["pipeline"], metadata={})
    pipe.load_nara_weights(GOOD["pipeline"])
    _files.assert_near(_bases.sdxl_outputs(pipe)["unet"], _files.expected("pipelines")["sdxl_float32.unet"], pipe.unet)
    model = PeftModel.from_pretrained(models["peft"], GOOD["peft"]).eval()
    _files.assert_near(_bases.text_output(model), _files.expected("peft")["nara"], model)
