"""`load_nara_weights`, `save_nara_weights` and `unload_nara_weights` of a pipeline, as their namesakes of a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.acceptance._lives import (
    FILE,
    Lives,
    add_nara,
    assert_far,
    assert_near,
    fill,
    frozen_sd,
    predict,
    save_lora,
    save_nara,
)
from tests.helpers.small_pipelines import pixels

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT, at a second LoRA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NaRA of the UNet, with convolutions."""
    return save_nara(tmp_path_factory.mktemp("nara"))


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of UNet and text encoder whose core is I."""
    return save_nara(tmp_path_factory.mktemp("text"), seed=2, text=True, core_type="identity")


def content(folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(folder / FILE, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same_file(one: Path, other: Path) -> None:
    (metadata, tensors), (metadata_of_other, others) = content(one), content(other)
    assert metadata == metadata_of_other
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor, others[name]), name


def parts(pipe: StableDiffusionPipeline) -> dict[str, nn.Module]:
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def structure(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    """Modules with their types, tensors, and what trains."""
    found: dict[str, Any] = {}
    for part, model in parts(pipe).items():
        found |= {(part, name): type(module) for name, module in model.named_modules()}
        found |= {(part, name, "trains"): parameter.requires_grad for name, parameter in model.named_parameters()}
    return found


def tensors(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": t.clone() for part, model in parts(pipe).items() for name, t in model.state_dict().items()
    }


def assert_is(pipe: StableDiffusionPipeline, modules: dict[str, Any], before: dict[str, Tensor]) -> None:
    assert structure(pipe) == modules
    after = tensors(pipe)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_loaded_nara_equals_the_lora_of_each_lambda(folder: Path) -> None:
    lives = Lives()
    base = predict(lives.nara)
    found = lives.load(folder, "toy").check()
    assert_far(found, base)
    assert_far(found, predict(lives.loras[0], torch.tensor([900, 370, 900])))


@pytest.mark.parametrize("form", ["folder", "folder and weight name", "file", "dict"])
def test_load_of_each_form_gives_the_same_adapter(folder: Path, tmp_path: Path, form: str) -> None:
    metadata, state = content(folder)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "folder": ((folder,), {}),
        "folder and weight name": ((str(folder),), {"weight_name": FILE}),
        "file": ((folder / FILE,), {}),
        "dict": ((state,), {"metadata": metadata}),
    }
    args, options = calls[form]
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(*args, adapter_name="toy", **options)
    assert pipe.get_list_adapters() == {"unet": ["toy"]}
    pipe.save_nara_weights(tmp_path, "toy")
    assert_same_file(tmp_path, folder)


def test_names_that_are_not_given_are_those_of_loras(folder: Path, with_text: Path) -> None:
    lives = Lives().load(folder).load(folder)
    lives.check_names()
    assert lives.nara.get_list_adapters() == {"unet": ["default_0", "default_1"]}
    lives.nara.load_nara_weights(with_text)  # one name for all components
    assert lives.nara.get_list_adapters() == {
        "unet": ["default_0", "default_1", "default_2"],
        "text_encoder": ["default_2"],
    }


def test_a_taken_name_raises_and_the_first_adapter_stays(folder: Path, with_text: Path, tmp_path: Path) -> None:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(folder, adapter_name="toy")
    modules, before = structure(pipe), tensors(pipe)
    with pytest.raises(ValueError, match=r"toy.*(duplicate|already)"):
        pipe.load_nara_weights(with_text, adapter_name="toy")
    assert_is(pipe, modules, before)
    pipe.save_nara_weights(tmp_path, adapter_name="toy")
    assert_same_file(tmp_path, folder)


def test_saved_and_loaded_into_another_pipeline_gives_the_same_outputs(folder: Path, tmp_path: Path) -> None:
    first: Any = frozen_sd()
    first.load_nara_weights(folder, adapter_name="toy")
    fill(first.unet, seed=3)  # by its trainable tensors, as training does
    expected = predict(first)
    first.save_nara_weights(tmp_path, adapter_name="toy")
    torch.manual_seed(77)
    second: Any = frozen_sd()
    second.load_nara_weights(tmp_path, adapter_name="other")
    assert_near(predict(second), expected, second.unet)
    changed, original = load_file(tmp_path / FILE), load_file(folder / FILE)
    same = {name for name, tensor in original.items() if torch.equal(tensor, changed[name])}
    assert same == {name for name in original if "freq" in name}
    assert len(same) == 1


def test_save_of_one_of_two_adapters_writes_that_one(folder: Path, with_text: Path, tmp_path: Path) -> None:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(folder, adapter_name="a")
    pipe.load_nara_weights(with_text, adapter_name="b")
    for name, source in (("a", folder), ("b", with_text)):
        pipe.save_nara_weights(tmp_path / name, adapter_name=name)
        assert_same_file(tmp_path / name, source)


def test_adapters_of_unet_and_text_encoder_give_the_pixels_of_the_lora(with_text: Path) -> None:
    lives = Lives()
    base = pixels(lives.nara)
    lives.load(with_text, "toy")
    assert (lives.check_pixels() - base).abs().max() > 0.02
    with_both = pixels(lives.nara)
    lives.call(lambda pipe: pipe.set_adapters("toy", {"unet": 0.6, "text_encoder": 0.0}))
    assert (lives.check_pixels() - with_both).abs().max() > 0.02
    lives.call(lambda pipe: pipe.set_adapters("toy", {"unet": 0.0, "text_encoder": 1.3}))
    assert (lives.check_pixels() - base).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["unload_nara_weights", "unload_lora_weights", "delete_adapters", "unload_lora"])
def test_unloaded_pipeline_is_the_base_bit_for_bit(folder: Path, with_text: Path, way: str) -> None:
    pipe: Any = frozen_sd()
    image, modules, before = pixels(pipe), structure(pipe), tensors(pipe)
    pipe.load_nara_weights(folder, adapter_name="a")
    pipe.load_nara_weights(with_text, adapter_name="b")
    pipe.set_adapters(["a", "b"])
    assert (pixels(pipe) - image).abs().max() > 0.02
    if way == "unload_lora":
        pipe.unet.unload_lora()
        pipe.delete_adapters("b")  # of the text encoder
    else:
        getattr(pipe, way)(*([["a", "b"]] if way == "delete_adapters" else []))
    assert torch.equal(pixels(pipe), image)
    if way.startswith("unload_") and way != "unload_lora":
        assert_is(pipe, modules, before)
    else:  # Diffusers leaves empty wrappers, as of a LoRA
        after = {name.replace(".base_layer", ""): tensor for name, tensor in tensors(pipe).items()}
        assert after.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not pipe.get_list_adapters()
    pipe.load_nara_weights(folder, adapter_name="a")
    assert (pixels(pipe) - image).abs().max() > 0.02


def test_unload_nara_weights_keeps_a_lora_beside(folder: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path)
    expected: Any = frozen_sd()
    expected.load_lora_weights(lora, adapter_name="plain")
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(folder, adapter_name="toy")
    pipe.load_lora_weights(lora, adapter_name="plain")
    pipe.set_adapters(["toy", "plain"])
    pipe.unload_nara_weights()
    assert pipe.get_list_adapters() == {"unet": ["plain"]}
    assert pipe.get_active_adapters() == ["plain"]
    assert_near(predict(pipe), predict(expected), pipe.unet)
    assert structure(pipe).keys() == structure(expected).keys()


def test_save_after_unload_raises_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(folder, adapter_name="toy")
    pipe.unload_nara_weights()
    with pytest.raises(ValueError, match="toy"):
        pipe.save_nara_weights(tmp_path / "out", adapter_name="toy")
    assert not (tmp_path / "out" / FILE).exists()


def test_a_trained_adapter_is_saved_without_having_been_loaded(tmp_path: Path) -> None:
    pipe: Any = add_nara(frozen_sd(), "mine", seed=4)
    expected = predict(pipe)
    pipe.save_nara_weights(tmp_path, "mine")
    lives = Lives().load(tmp_path, "toy")
    assert_near(lives.check(), expected, pipe.unet)


def test_calls_that_read_and_write_loras_refuse_a_nara_by_name(folder: Path, with_text: Path, tmp_path: Path) -> None:
    pipe: Any = frozen_sd()
    modules, before = structure(pipe), tensors(pipe)
    for source in (folder, folder / FILE, load_file(folder / FILE), with_text / FILE):  # whose α only the NaRA's has
        refusal = "all LoRA param names" if isinstance(source, dict) else "load_nara_weights"  # of Diffusers
        with pytest.raises(ValueError, match=refusal):
            pipe.load_lora_weights(source, adapter_name="toy")
        assert_is(pipe, modules, before)
    pipe.load_nara_weights(folder, adapter_name="toy")
    with pytest.raises(ValueError, match="save_nara_weights"):
        pipe.unet.save_lora_adapter(tmp_path, adapter_name="toy")
    assert not list(tmp_path.iterdir())
