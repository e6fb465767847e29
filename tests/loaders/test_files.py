"""`load_nara_weights` and `save_nara_weights`: where files are found, and what is refused as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from nara_diffusion import strict
from nara_diffusion.dreambooth.pipelines import model_index
from nara_diffusion.loaders import tensor_files as files
from nara_diffusion.loaders.file import AdapterFile
from nara_diffusion.loaders.insertion import remove
from nara_diffusion.loaders.tensor_files import load_whole_model
from nara_diffusion.strict import check_loaded
from tests.acceptance import _bases, _files
from tests.acceptance._files import refused
from tests.helpers.adapted import TwoLayers, disturb, lora_config, nara_config
from tests.helpers.small_pipelines import small_sdxl

FOLDER, FILE = _files.FILES / "pipelines" / "sdxl_float32", _files.PIPELINE_WEIGHTS
"""A NaRA of SDXL's UNet and both text encoders."""


def test_repositories_of_both_formats_load_or_are_named(monkeypatch, tmp_path: Path) -> None:
    repositories = {"me/toy": FOLDER, "me/peft": _files.unet_folder(tmp_path / "given")}  # in place of the Hub

    def download(repository: str, *, weights_name: str, **options: Any) -> str:
        path = repositories.get(repository, tmp_path) / weights_name
        if not path.is_file():
            raise OSError(f"{repository} does not appear to have a file named {weights_name}.")
        return str(path)

    monkeypatch.setattr(files, "_get_model_file", download)
    for name, parts in (("me/toy", {"unet", "text_encoder", "text_encoder_2"}), ("me/peft", {"unet"})):
        pipe: Any = _bases.sdxl()
        pipe.load_nara_weights(name)
        assert set(pipe.get_list_adapters()) == parts
    with pytest.raises(OSError, match=r"me/other .*pytorch_nara_weights\.safetensors"):
        pipe.load_nara_weights("me/other")
    for source in ("./nowhere", tmp_path / "nowhere", "toy.safetensors"):
        with pytest.raises(ValueError, match=f"There is no file or folder '{source}'"):
            pipe.load_nara_weights(source)
    with pytest.raises(ValueError, match=r"There is no 'other\.safetensors' in .*: it has 'pytorch.*weight_name"):
        pipe.load_nara_weights(FOLDER, weight_name="other.safetensors")
    with pytest.raises(ValueError, match="it has no safetensors file"):
        pipe.load_nara_weights(tmp_path)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # which Diffusers passes
def test_unreachable_hub_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers says then: "does not appear to have a file named …"."""

    def fail(*_: Any, **__: Any) -> None:
        raise OfflineModeIsEnabled("as without a network")

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", fail)
    pipe: Any = _bases.sdxl()
    for call in (pipe.load_nara_weights, model_index, files.read_peft_tensors):
        with pytest.raises((OSError, ValueError), match=r"(not|no).* folder.* the Hub.* can't be reached") as caught:
            call("me/toy")
        assert "me/toy" in str(caught.value)


def test_file_of_another_name_loads_from_subfolder(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    shutil.copy(FOLDER / FILE, tmp_path / "deeper" / "style.safetensors")
    pipe: Any = _bases.sdxl()
    pipe.load_nara_weights(tmp_path, subfolder="deeper")
    assert pipe.get_active_adapters() == ["default_0"]


TEXTS = {
    "a BOM": lambda text: "\ufeff" + text,
    "an HTML page": lambda text: "<!DOCTYPE html><html>Sign in</html>",
    "cut off": lambda text: text[:-9],
    "nested deeply": lambda text: "[" * 100_000,
    "a number of 4301 digits": lambda text: f'{{"r": {"9" * 4301}}}',
    "a list": lambda text: "[1]",
    "no type of adapter": lambda text: text.replace("peft_type", "peft_kind"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_configuration_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(_files.FILES / "peft" / "nara", tmp_path / "nara"))
    config = folder / _files.PEFT_CONFIG
    config.write_text(TEXTS[text](config.read_text()))
    for read in (
        AdapterFile.read,
        lambda folder: PeftModel.from_pretrained(_bases.language_model(), folder),
        lambda folder: _bases.language_model().load_adapter(folder),
    ):
        with pytest.raises(ValueError, match=str(folder)):
            read(str(folder))


def with_fields(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = folder / _files.PEFT_CONFIG
        config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))

    return change


def without_weights(put: Callable[[Path], object] = Path.exists) -> Callable[[Path], None]:
    """Delete the weights, and `put` something else in their place."""

    def change(folder: Path) -> None:
        (folder / _files.PEFT_WEIGHTS).unlink()
        put(folder / _files.PEFT_WEIGHTS)

    return change


NO_FILE = r"There is no '\w+\.safetensors' in"
UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "another peft_type": (with_fields(peft_type="NARAA"), "NARAA.* not '?NARA"),
    "modules_to_save is no pattern": (with_fields(modules_to_save=["("]), r"missing \)"),
    "another bias": (with_fields(bias="some"), "bias is 'some'"),
    "another type": (with_fields(use_rslora="false"), "use_rslora is 'false'"),
    "weights missing": (without_weights(), NO_FILE),
    "weights are a folder": (without_weights(Path.mkdir), NO_FILE),
    "weights are a pipe": (without_weights(os.mkfifo), NO_FILE),
}
"""{what is wrong: (make it so, the error)}."""


@pytest.mark.parametrize("row", UNREADABLE)
def test_unreadable_peft_folder_is_refused_in_one_line(row: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(_files.FILES / "peft" / "nara", tmp_path / "nara"))
    change, message = UNREADABLE[row]
    change(folder)
    for read in (
        AdapterFile.read,
        lambda folder: PeftModel.from_pretrained(_bases.language_model(), folder),
        lambda folder: _bases.language_model().load_adapter(folder),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read(str(folder))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_loaders_refuse_each_others_files_with_remedy(tmp_path: Path) -> None:
    pipe, trained, masked = (_bases.sdxl() for _ in range(3))
    trained.unet.add_adapter(lora_config(target_modules=["to_q"]))
    trained.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(trained.unet))
    refused(lambda: pipe.load_nara_weights(tmp_path / "lora"), pipe, "load_lora_weights")
    masked.unet.add_adapter(nara_config(core_type="rank_mask", target_modules=["to_q"]))
    masked.save_nara_weights(tmp_path / "nara")
    like_a_lora = tmp_path / "nara" / FILE  # what it is stands in its metadata alone
    assert all(".lora_" in key for key in load_file(like_a_lora))
    save_file(load_file(FOLDER / FILE), tmp_path / "core.safetensors")  # no metadata
    for file in (FOLDER / FILE, like_a_lora, tmp_path / "core.safetensors"):
        for loader in (pipe.load_lora_weights, pipe.unet.load_lora_adapter):
            refused(lambda loader=loader, file=file: loader(file), pipe, "load_nara_weights")


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    pipe: Any = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"pass the name of a \.safetensors file"):
        pipe.save_nara_weights(tmp_path, weight_name="toy.bin")
    with pytest.raises(ValueError, match=r"There is no NaRA adapter 'other' to save\. The pipeline has 'default'"):
        pipe.save_nara_weights(tmp_path, "other")
    inject_adapter_in_model(nara_config(core_type="identity", target_modules=["conv_in"]), pipe.vae, "default")
    with pytest.raises(ValueError, match="'default' is also in 'vae', which a pipeline's file cannot contain"):
        pipe.save_nara_weights(tmp_path)
    remove(pipe.vae, ["default"])
    inject_adapter_in_model(lora_config(target_modules=["q_proj"]), pipe.text_encoder, "default")
    with pytest.raises(ValueError, match="is a plain LoRA, which a NaRA's file cannot contain"):
        pipe.save_nara_weights(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- loading


def test_every_tensor_is_checked_once_per_load(monkeypatch, tmp_path: Path) -> None:
    checked: list[str] = []
    check = strict._check_tensor

    def counted(key: str, *args: Any, **options: Any) -> None:
        checked.append(key)
        check(key, *args, **options)

    monkeypatch.setattr(strict, "_check_tensor", counted)
    pipe, number = _bases.sdxl(), len(load_file(FOLDER / FILE))
    peft = _files.FILES / "peft" / "nara"
    for load in (
        lambda: pipe.load_nara_weights(FOLDER, adapter_name="toy"),
        lambda: pipe.load_nara_weights(FOLDER, adapter_name="toy", hotswap=True),
        lambda: AdapterFile.read(FOLDER),
    ):
        checked.clear()
        load()
        assert (len(checked), len(set(checked))) == (number, number)
    for load in (AdapterFile.read, lambda folder: PeftModel.from_pretrained(_bases.language_model(), folder)):
        checked.clear()
        load(peft)
        assert len(checked) == len(set(checked)) == len(load_file(peft / _files.PEFT_WEIGHTS))


# ---------------------------------------------------------------------- after a load


def test_peft_load_with_lost_tensors_is_refused(tmp_path: Path) -> None:
    model: Any = get_peft_model(TwoLayers(), lora_config(target_modules=["first", "second"]))
    disturb(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = {key: tensor + ("second.lora_B" in key) for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"1 of the 4 tensors of the file did not load .*: 'second"):
        check_loaded(model, "default", changed, "the file")
    assert isinstance(files.load_peft_adapter(TwoLayers(), tmp_path), PeftModel)
    for changed, message in [
        ({key: tensor for key, tensor in tensors.items() if "first" not in key}, "and 2 others are not .*: 'first"),
        ({key.replace("first", "block.first"): tensor for key, tensor in tensors.items()}, r"block\.first"),
    ]:
        save_file(changed, file)
        with pytest.warns(UserWarning, match="missing adapter keys"), pytest.raises(ValueError, match=message):
            files.load_peft_adapter(TwoLayers(), tmp_path)
    for other, message in (
        (tmp_path / "model.safetensors", "it has 'model.*Pass another folder"),
        (None, "no safetensors file"),
    ):
        file = file.rename(other) if other else file.unlink()
        with pytest.raises(ValueError, match=rf"There is no 'adapter_model\.safetensors' in .*{message}"):
            files.load_peft_adapter(TwoLayers(), tmp_path)


def test_load_whole_model_refuses_missing_weights(tmp_path: Path) -> None:
    unet: nn.Module = small_sdxl().unet
    unet.save_pretrained(tmp_path)  # type: ignore[operator]
    load_whole_model(type(unet), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["more"] = tensors.pop("conv_in.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"UNet2DConditionModel: 'conv_in\.weight' is missing, and 'more' is unexpected"
    ):
        load_whole_model(type(unet), tmp_path, low_cpu_mem_usage=False)


def test_lora_with_peft_names_is_refused_with_remedy(tmp_path: Path) -> None:
    """Pipelines of text models have no `load_lora_weights`."""
    model = get_peft_model(TwoLayers(), lora_config(target_modules=["first"]))
    model.save_pretrained(tmp_path)
    for source in (tmp_path, load_file(tmp_path / "adapter_model.safetensors")):
        with pytest.raises(ValueError, match=r"load it with peft\.PeftModel\.from_pretrained\(…\)"):
            AdapterFile.read(source)
    with pytest.raises(ValueError, match=r"load it with pipe\.load_lora_weights\(…\)"):
        AdapterFile.read({"unet.conv_in.lora_A.weight": next(model.parameters())})
