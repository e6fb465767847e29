"""`load_nara_weights`, `save_nara_weights` and `unload_nara_weights` of a pipeline, as their namesakes of a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.acceptance._lives import FILE, Lives, assert_near, fill, frozen_sd, predict, save_lora, save_nara
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
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {n: t.dtype for n, t in others.items()}
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


class State:
    """Modules with their types, what trains, and the tensors, of UNet and text encoder."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.structure: dict[Any, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        for part, model in {"unet": pipe.unet, "text_encoder": pipe.text_encoder}.items():
            self.structure |= {(part, name): type(module) for name, module in model.named_modules()}
            self.structure |= {(part, name, "trains"): p.requires_grad for name, p in model.named_parameters()}
            self.tensors |= {f"{part}.{name}": tensor.clone() for name, tensor in model.state_dict().items()}

    def assert_is(self, pipe: StableDiffusionPipeline, wrapped: bool = False) -> None:
        """`wrapped`: Diffusers may have left empty wrappers, as of a LoRA."""
        now = State(pipe)
        assert wrapped or now.structure == self.structure
        own = ".base_layer" if wrapped else "nothing"
        found = {name.replace(own, ""): tensor for name, tensor in now.tensors.items()}
        assert found.keys() == self.tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in self.tensors.items())


def test_each_form_loads_under_the_name_of_a_lora_and_is_saved_as_it_was(folder, with_text, tmp_path: Path) -> None:
    metadata, state = content(folder)
    forms: list[tuple[Any, dict[str, Any]]] = [
        (folder, {}),
        (str(folder), {"weight_name": FILE}),
        (folder / FILE, {}),
        (state, {"metadata": metadata}),
        (with_text, {}),  # one name for all components
    ]
    pipe: Any = frozen_sd()
    for source, options in forms:
        pipe.load_nara_weights(source, **options)
    pipe.load_lora_weights(save_lora(tmp_path))
    names = [f"default_{number}" for number in range(6)]
    assert pipe.get_list_adapters() == {"unet": names, "text_encoder": names[4:5]}
    for name in names[:5]:
        pipe.save_nara_weights(tmp_path / name, name)
        assert_same_file(tmp_path / name, with_text if name == names[4] else folder)
    before = State(pipe)
    with pytest.raises(ValueError, match=r"'default_0'.*(duplicate|already)"):
        pipe.load_nara_weights(with_text, adapter_name="default_0")
    before.assert_is(pipe)


def test_trained_and_saved_as_a_nara_and_no_lora_it_gives_the_same_outputs_elsewhere(folder, tmp_path: Path) -> None:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(folder, adapter_name="toy")
    fill(pipe.unet, seed=3)  # by its trainable tensors, as training does
    with pytest.raises(ValueError, match="save_nara_weights"):
        pipe.unet.save_lora_adapter(tmp_path, adapter_name="toy")
    assert not list(tmp_path.iterdir())
    expected = predict(pipe)
    pipe.save_nara_weights(tmp_path, adapter_name="toy")
    torch.manual_seed(77)
    assert_near(Lives().load(tmp_path, "other").check(), expected, pipe.unet)
    changed, original = load_file(tmp_path / FILE), load_file(folder / FILE)
    same = {name for name, tensor in original.items() if torch.equal(tensor, changed[name])}
    assert same == {name for name in original if "freq" in name}
    assert len(same) == 1


@pytest.mark.parametrize("way", ["unload_nara_weights", "unload_lora_weights", "delete_adapters", "unload_lora"])
def test_unloaded_pipeline_is_the_base_bit_for_bit(folder: Path, with_text: Path, way: str) -> None:
    pipe: Any = frozen_sd()
    image, before = pixels(pipe), State(pipe)
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
    before.assert_is(pipe, wrapped=way in ("delete_adapters", "unload_lora"))
    assert not pipe.get_list_adapters()
    pipe.load_nara_weights(folder, adapter_name="a")
    assert (pixels(pipe) - image).abs().max() > 0.02


def test_unload_nara_weights_keeps_a_lora_beside_and_saving_then_raises(folder: Path, tmp_path: Path) -> None:
    lora, pipe, expected = save_lora(tmp_path / "lora"), frozen_sd(), frozen_sd()
    expected.load_lora_weights(lora, adapter_name="plain")
    pipe.load_nara_weights(folder, adapter_name="toy")  # type: ignore[attr-defined]
    pipe.load_lora_weights(lora, adapter_name="plain")
    pipe.set_adapters(["toy", "plain"])
    pipe.unload_nara_weights()  # type: ignore[attr-defined]
    assert pipe.get_list_adapters() == {"unet": ["plain"]}
    assert pipe.get_active_adapters() == ["plain"]
    assert_near(predict(pipe), predict(expected), pipe.unet)
    assert State(pipe).structure.keys() == State(expected).structure.keys()
    with pytest.raises(ValueError, match="toy"):
        pipe.save_nara_weights(tmp_path / "out", adapter_name="toy")  # type: ignore[attr-defined]
    assert not (tmp_path / "out" / FILE).exists()
