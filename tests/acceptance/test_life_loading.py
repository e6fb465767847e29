"""`load_nara_weights`, `save_nara_weights` and `unload_nara_weights` of a pipeline, as their namesakes of a LoRA.

N and the meaning of small timesteps come from the present scheduler of the pipelines that loaded.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from tests.acceptance._files import assert_same_tensors, header, refused, state
from tests.acceptance._lives import (
    FILE,
    Lives,
    assert_near,
    fill,
    frozen_sd,
    nara_config,
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


def loaded(folder: Path, name: str = "toy") -> Any:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(folder, adapter_name=name)
    return pipe


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of UNet and text encoder whose core is I."""
    return save_nara(tmp_path_factory.mktemp("text"), seed=2, text=True, core_type="identity")


def assert_same_file(one: Path, other: Path) -> None:
    assert header(one / FILE) == header(other / FILE)
    assert_same_tensors(one / FILE, other / FILE)


def test_each_form_loads_by_name_and_saves_unchanged(folder, with_text, tmp_path: Path) -> None:
    with safe_open(folder / FILE, "pt") as file:
        metadata = file.metadata()
    forms: list[tuple[Any, dict[str, Any]]] = [
        (folder, {}),
        (str(folder), {"weight_name": FILE}),
        (folder / FILE, {}),
        (load_file(folder / FILE), {"metadata": metadata}),
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
    refused(lambda: pipe.load_nara_weights(with_text, adapter_name="default_0"), pipe, "'default_0' is a duplicate")


def test_trained_and_saved_nara_gives_same_outputs_elsewhere(folder, tmp_path: Path) -> None:
    pipe = loaded(folder)
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
    image, original = pixels(pipe), state(pipe)
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
    now, is_wrapped = state(pipe), way in ("delete_adapters", "unload_lora")  # Diffusers leaves wrappers, as of a LoRA
    for name, value in original.items():
        if "values" in name:
            assert {key.replace(".base_layer", ""): tensor for key, tensor in now[name].items()} == value
        elif not is_wrapped and ("attributes" not in name or way == "unload_nara_weights"):
            assert now[name] == value, name
    assert not pipe.get_list_adapters()
    if not is_wrapped:
        pipe.load_nara_weights(folder, adapter_name="a")
        assert (pixels(pipe) - image).abs().max() > 0.02


def test_unload_nara_weights_keeps_a_lora(folder: Path, tmp_path: Path) -> None:
    lora, pipe, expected = save_lora(tmp_path / "lora"), frozen_sd(), frozen_sd()
    expected.load_lora_weights(lora, adapter_name="plain")
    pipe.load_nara_weights(folder, adapter_name="toy")  # type: ignore[attr-defined]
    pipe.load_lora_weights(lora, adapter_name="plain")
    pipe.set_adapters(["toy", "plain"])
    pipe.unload_nara_weights()  # type: ignore[attr-defined]
    assert pipe.get_list_adapters() == {"unet": ["plain"]}
    assert pipe.get_active_adapters() == ["plain"]
    assert_near(predict(pipe), predict(expected), pipe.unet)
    assert state(pipe)["unet: modules"] == state(expected)["unet: modules"]
    pipe.load_nara_weights(folder, adapter_name="toy")  # type: ignore[attr-defined]
    pipe.unload_nara_weights()  # type: ignore[attr-defined]
    assert pipe.get_active_adapters() == []
    assert_near(predict(pipe), predict(frozen_sd()), pipe.unet)
    with pytest.raises(ValueError, match="toy"):
        pipe.save_nara_weights(tmp_path / "out", adapter_name="toy")  # type: ignore[attr-defined]
    assert not (tmp_path / "out" / FILE).exists()


def test_loading_after_disabling_says_what_is_on(folder: Path, caplog: Any) -> None:
    pipe = loaded(folder, "a")
    on = predict(pipe)
    pipe.disable_lora()
    off = predict(pipe)
    pipe.load_nara_weights(folder, adapter_name="b")
    assert "were disabled by disable_lora(), and loading 'b' enables them again" in caplog.text
    assert "are disabled" not in caplog.text
    assert pipe.get_active_adapters() == ["b"]
    assert_near(predict(pipe), on, pipe.unet)
    pipe.disable_lora()
    pipe.unet.add_adapter(nara_config(target_modules=["to_k", "to_v"]), "c")  # of one that is adapted, and a new one
    assert "are disabled (disable_lora() or disable_adapters()), and so is the new adapter 'c'" in caplog.text
    fill(pipe.unet, "c")
    assert torch.equal(predict(pipe), off)


def test_dropout_of_loaded_adapter_works_only_in_training(tmp_path: Path) -> None:
    pipe = loaded(save_nara(tmp_path, lora_dropout=0.5))
    assert torch.equal(predict(pipe), predict(pipe))
    pipe.unet.train()
    assert not torch.equal(predict(pipe), predict(pipe))


# ---------------------------------------------------------------- the scheduler of the pipelines that loaded

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction")


def test_timesteps_without_pipeline_use_the_last_scheduler(folder: Path) -> None:
    pipe, timesteps = loaded(folder), torch.tensor([100, 180, 50])
    at_1000 = predict(pipe, timesteps)
    pipe.scheduler = DDIMScheduler(**BETAS, num_train_timesteps=500)
    unet, expected = pipe.unet, predict(pipe, timesteps)
    assert not torch.allclose(expected, at_1000, atol=1e-3)
    del pipe
    gc.collect()
    alone: Any = frozen_sd()
    alone.unet = unet
    assert_near(predict(alone, timesteps), expected, unet)


def test_pipelines_with_different_lengths_are_refused(folder: Path) -> None:
    pipe, other = loaded(folder), frozen_sd()
    other.unet = pipe.unet
    other.load_nara_weights(folder, adapter_name="second")  # type: ignore[attr-defined]
    predict(pipe)
    other.scheduler = DDIMScheduler(**BETAS, num_train_timesteps=500)
    with pytest.raises(ValueError, match=r"N = 500 and N = 1000.*set_noise_source"):
        predict(pipe)
    del other
    gc.collect()
    predict(pipe)


def test_small_timesteps_are_discrete_if_the_scheduler_is(folder: Path) -> None:
    pipe = loaded(folder)
    predict(pipe, torch.tensor([0.4, 1.3, 2.1]))
    continuous = EulerDiscreteScheduler.from_config(V.config, timestep_type="continuous")
    for pipe.scheduler in (EDMEulerScheduler(), continuous):
        with pytest.raises(ValueError, match=rf"{type(pipe.scheduler).__name__} passes ¼ ln σ"):
            predict(pipe, torch.tensor([0.4, 1.3, 2.1]))
