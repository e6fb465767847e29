"""Whatever the package loads is compared with its file: a layer that was passed by, left out or left over is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, OFTConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from nara_diffusion import NaraConfig
from nara_diffusion.harness.loading import load_model
from nara_diffusion.loaders import insertion as adapters
from nara_diffusion.loaders.completeness import check_loaded, held_tensors, load_peft_adapter
from nara_diffusion.loaders.format import AdapterPart
from nara_diffusion.training.formats import load_checkpoint
from tests.helpers.adapted import disturb
from tests.helpers.files.saved_adapters import TARGETS, WEIGHTS, base_model
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.adapters import trained

# PEFT warns of what it leaves out, and goes on
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Some weights of :UserWarning"),
]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True),
    "nara": NaraConfig(r=3, lora_alpha=5, target_modules=TARGETS, core_hidden_dims=(4, 4)),
    "hira": HiraConfig(r=3, target_modules=TARGETS),
    "vera": VeraConfig(r=3, target_modules=["second"]),
    "oft": OFTConfig(r=1, oft_block_size=0, target_modules=TARGETS),
}


def saved(folder: Path, config: Any) -> PeftModel:
    """An adapter on two layers, none of whose tensors is at its start, in `folder`."""
    model = get_peft_model(base_model(), config)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


def change_file(folder: Path, change: Any) -> None:
    path = folder / WEIGHTS
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def old_style(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second layer by the names that Diffusers had before PEFT."""
    names = {"second.lora_A": "second.lora.down", "second.lora_B": "second.lora.up"}
    renamed = {}
    for key, value in tensors.items():
        for new, old in names.items():
            key = key.replace(new, old)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("method", CONFIGS)
def test_load_peft_adapter_returns_a_model_that_holds_the_file(tmp_path: Path, method: str) -> None:
    expected = held_tensors(saved(tmp_path, CONFIGS[method]), "default")
    found = held_tensors(load_peft_adapter(base_model(), tmp_path), "default")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_load_peft_adapter_names_the_file_that_is_damaged_or_missing(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["lora"])
    weights = tmp_path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"'.*{WEIGHTS}' is no whole safetensors file"):
        load_peft_adapter(base_model(), tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=rf"There is no '{WEIGHTS}' beside 'adapter_config.json' in"):
        load_peft_adapter(base_model(), tmp_path)


def test_load_peft_adapter_names_a_layer_of_another_style_of_names(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["lora"])
    change_file(tmp_path, old_style)
    with pytest.raises(ValueError, match=r"1 of the 2 layers in .* did not load into PeftModel: 'second'\. The file's"):
        load_peft_adapter(base_model(), tmp_path)


def test_load_peft_adapter_names_a_layer_without_tensors(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["hira"])
    change_file(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if "second" not in key})
    with pytest.raises(ValueError, match=r"PeftModel has 1 adapted layers of which there is nothing in .*: 'second'"):
        load_peft_adapter(base_model(), tmp_path)


@pytest.mark.parametrize("key", ["first.lora_B", "second.lora_magnitude_vector"])
def test_check_loaded_names_a_layer_whose_values_are_others(tmp_path: Path, key: str) -> None:
    model = saved(tmp_path, CONFIGS["dora"])
    tensors = load_file(tmp_path / WEIGHTS)
    check_loaded(model, "default", tensors, "the file")
    changed = next(name for name in tensors if key in name)
    tensors[changed] = tensors[changed].clone()
    tensors[changed].view(-1)[-1] += 1e-3
    with pytest.raises(ValueError, match=f"1 of the 2 layers in the file did not load .*: '{key.split('.')[0]}'"):
        check_loaded(model, "default", tensors, "the file")


def test_check_loaded_takes_a_file_in_another_precision(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["lora"])
    change_file(tmp_path, lambda tensors: {key: value.bfloat16() for key, value in tensors.items()})
    load_peft_adapter(base_model(), tmp_path)


def test_load_checkpoint_refuses_a_file_of_which_a_layer_is_passed_by(tmp_path: Path) -> None:
    model = saved(tmp_path, CONFIGS["lora"])
    load_checkpoint(model, tmp_path)
    change_file(tmp_path, old_style)
    with pytest.raises(ValueError, match=r"1 of the 2 layers in .* did not load into PeftModel: 'second'"):
        load_checkpoint(model, tmp_path)


def test_evaluation_refuses_an_adapter_of_which_a_layer_is_passed_by(tmp_path: Path, monkeypatch) -> None:
    saved(tmp_path, CONFIGS["lora"])
    monkeypatch.setattr("nara_diffusion.harness.loading.load_backbone", lambda *args, **kwargs: (base_model(), None))
    load_model("base", str(tmp_path), device="cpu")
    change_file(tmp_path, old_style)
    with pytest.raises(ValueError, match=r"1 of the 2 layers in .* did not load into PeftModel: 'second'"):
        load_model("base", str(tmp_path), device="cpu")


def test_load_nara_weights_that_leaves_a_layer_out_raises_and_takes_it_back(tmp_path: Path, monkeypatch) -> None:
    trained().save_nara_weights(tmp_path)
    pipe, fill = small_sdxl(), adapters._fill_layer
    keys = set(pipe.unet.state_dict())
    left_out = next(iter(name for name, _ in pipe.unet.named_modules() if name.endswith("to_v")))

    def forgetful(layer: Any, *arguments: Any) -> None:
        if layer is not pipe.unet.get_submodule(left_out):
            fill(layer, *arguments)

    monkeypatch.setattr(adapters, "_fill_layer", forgetful)
    with pytest.raises(ValueError, match=f"1 of the .* layers in the adapter did not load .*: '{left_out}'"):
        pipe.load_nara_weights(tmp_path, low_cpu_mem_usage=False)
    assert set(pipe.unet.state_dict()) == keys


def test_hotswap_is_compared_with_its_file(tmp_path: Path, monkeypatch) -> None:
    trained(seed=1, text=False).save_nara_weights(tmp_path / "1")
    other = trained(seed=2, text=False)
    disturb(other.unet, 2)
    other.save_nara_weights(tmp_path / "2")
    pipe = small_sdxl()
    pipe.load_nara_weights(tmp_path / "1", adapter_name="a")

    def copied(model: Any, adapter_name: str) -> AdapterPart:
        part = adapters.part_of(model, adapter_name)
        return AdapterPart(part.config, {key: tensor.clone() for key, tensor in part.tensors.items()})

    monkeypatch.setattr("nara_diffusion.loaders.hotswap.part_of", copied)
    with pytest.raises(ValueError, match="layers in the adapter did not load into UNet2DConditionModel"):
        pipe.load_nara_weights(tmp_path / "2", adapter_name="a", hotswap=True)
