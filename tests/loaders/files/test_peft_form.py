"""The folder that PEFT's `save_pretrained` and train_scripts/dllm.py write, loaded into a pipeline's denoiser."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model

from nara_diffusion import noise_level
from tests.helpers.adapted import nara_config
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import State, shake


class TextPipeline(DiffusionPipeline):
    """A language model as a pipeline's denoiser; it has none of Diffusers' LoRA mixins."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


def save_as_peft(folder: Path) -> PeftModel:
    """An adapter of SDXL's UNet, by PEFT."""
    model = get_peft_model(small_sdxl().unet, nara_config(target_modules=["to_q", "to_v"], lora_alpha=3))
    shake(model, 4)
    model.save_pretrained(str(folder))
    return model


@pytest.fixture
def language_folder(tmp_path, tiny_llama) -> Path:
    config = nara_config(
        target_modules=["q_proj", "o_proj", "down_proj"], noise_convention="masked_share", task_type="CAUSAL_LM"
    )
    model = get_peft_model(copy.deepcopy(tiny_llama), config)
    shake(model, 4)
    model.save_pretrained(tmp_path)
    return tmp_path


def logits(model: Any, level: Any) -> torch.Tensor:
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad(), noise_level(model, level):
        return model(tokens).logits


def test_a_unet_of_peft(tmp_path):
    save_as_peft(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    pipe, by_file = small_sdxl(), small_sdxl()
    pipe.load_nara_weights(tmp_path, "mine")
    by_file.load_nara_weights(tmp_path / "adapter_model.safetensors")
    assert torch.equal(pixels(pipe), pixels(by_file))
    expected = PeftModel.from_pretrained(small_sdxl().unet, str(tmp_path))
    reference = small_sdxl()
    reference.unet = expected.base_model.model
    assert torch.equal(pixels(pipe), pixels(reference))
    pipe.save_nara_weights(tmp_path / "ours")  # from one form to the other
    again = small_sdxl()
    again.load_nara_weights(tmp_path / "ours")
    assert torch.equal(pixels(again), pixels(pipe))


def test_a_language_model(language_folder, tiny_llama):
    base = copy.deepcopy(tiny_llama)
    pipe = TextPipeline(copy.deepcopy(tiny_llama))
    pristine = State(pipe)
    plain = pipe.transformer(torch.arange(12).view(2, 6)).logits
    pipe.load_nara_weights(language_folder, adapter_name="task")
    expected = PeftModel.from_pretrained(base, str(language_folder)).eval()
    levels = torch.tensor([0.2, 0.9])
    assert torch.equal(logits(pipe.transformer, levels), logits(expected, levels))
    assert not torch.allclose(logits(pipe.transformer, 0.5), plain, atol=1e-2)
    assert pipe.transformer.peft_config["task"].noise_convention == "masked_share"
    pipe.save_nara_weights(language_folder / "ours")
    again = TextPipeline(copy.deepcopy(tiny_llama))
    again.load_nara_weights(language_folder / "ours")
    assert torch.equal(logits(again.transformer, levels), logits(expected, levels))
    pipe.unload_nara_weights()
    pipe.transformer.requires_grad_(True)  # PEFT froze it
    assert pristine == State(pipe)
    assert torch.equal(pipe.transformer(torch.arange(12).view(2, 6)).logits, plain)


def test_what_is_no_nara_or_damaged(tmp_path, language_folder, tiny_llama):
    lora = tmp_path / "lora"
    get_peft_model(small_sdxl().unet, LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(str(lora))
    pipe = small_sdxl()
    before = State(pipe)
    with pytest.raises(ValueError, match=r"adapter of type LORA, not NARA: load it by pipe.load_lora_weights"):
        pipe.load_nara_weights(lora)
    config = language_folder / "adapter_config.json"
    with pytest.raises(ValueError, match=r"unet .* has no module 'model.layers.0.*another base model"):
        pipe.load_nara_weights(language_folder)
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "noise_convention": "flow"}))
    text = TextPipeline(tiny_llama)
    text.load_nara_weights(language_folder)  # no source of λ that could contradict
    text.unload_nara_weights()
    config.write_text(json.dumps({**content, "modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\], which changes the base model itself"):
        text.load_nara_weights(language_folder)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json' can't be read .*damaged"):
        text.load_nara_weights(language_folder)
    config.unlink()
    with pytest.raises(ValueError, match=r"no 'adapter_config.json' beside 'adapter_model.safetensors'"):
        text.load_nara_weights(language_folder, weight_name="adapter_model.safetensors")
    assert before == State(pipe)


def test_a_denoiser_without_diffusers_mixins_keeps_the_rest_of_the_family(language_folder, tiny_llama):
    pipe = TextPipeline(tiny_llama)
    pipe.load_nara_weights(language_folder, "one")
    pipe.load_nara_weights(language_folder, "two")
    with pytest.raises(ValueError, match="'two' is a duplicate"):
        pipe.load_nara_weights(language_folder, "two")
    assert list(pipe.transformer.peft_config) == ["one", "two"]
    pipe.unload_nara_weights()
    assert not hasattr(pipe.transformer, "peft_config")
