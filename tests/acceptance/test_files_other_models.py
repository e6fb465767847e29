"""Whole files given to a model or a call that they aren't for: refused by the right name, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from nara_diffusion import NaraConfig
from tests.acceptance import _bases
from tests.acceptance._broken import GOOD, WEIGHTS, change_fields, copied, loading, refused


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One that refuses every file."""
    return _bases.sdxl()


OTHERS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "UNet of other widths": ("pipeline", lambda: _bases.sdxl(block_out_channels=(8, 24)), "another base model"),
    "UNet of fewer layers": ("pipeline", lambda: _bases.sdxl(layers_per_block=1), "another base model"),
    "pipeline of another family": ("pipeline", _bases.flux, "'text_encoder'"),
    "language model of fewer layers": ("peft", lambda: _small_llama(num_hidden_layers=1), "layers.1"),
    "language model of more layers": ("peft", lambda: _small_llama(num_hidden_layers=3), "layers.2"),
    "language model of another width": ("peft", lambda: _small_llama(hidden_size=24), "shape"),
}


def _small_llama(**changes: Any) -> LlamaForCausalLM:
    config = _bases.language_model().config
    for name, value in changes.items():
        setattr(config, name, value)
    config.head_dim = config.hidden_size // config.num_attention_heads
    return _bases.filled(LlamaForCausalLM(config), "other")


@pytest.mark.parametrize("row", OTHERS)
def test_file_of_another_base_is_refused_and_changes_nothing(row: str) -> None:
    form, make, part = OTHERS[row]
    model = make()
    refused(loading(form, model, GOOD[form]), model, part)


def test_file_whose_noise_level_is_another_than_the_models_is_refused(pipe: Any, tmp_path: Path) -> None:
    change_fields("pipeline", copied("pipeline", tmp_path), {"noise_convention": "masked_share"})
    refused(loading("pipeline", pipe, tmp_path), pipe, "masked_share", "timestep")


def lora_file(folder: Path) -> Path:
    """A LoRA of the UNet by Diffusers' own save_lora_weights."""
    pipe = _bases.sdxl()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return folder


def test_lora_given_to_load_nara_weights_is_refused_by_the_right_call(pipe: Any, tmp_path: Path) -> None:
    refused(loading("pipeline", pipe, lora_file(tmp_path)), pipe, "load_lora_weights")


@pytest.mark.parametrize("call", ["load_lora_weights", "load_lora_adapter"])
def test_nara_given_to_a_loader_of_loras_is_refused_by_the_right_call(call: str, pipe: Any) -> None:
    file = GOOD["pipeline"] / WEIGHTS["pipeline"]
    loader = pipe.load_lora_weights if call == "load_lora_weights" else pipe.unet.load_lora_adapter
    refused(lambda: loader(file), pipe, "load_nara_weights")


@pytest.mark.parametrize("core", ["rank_mask", "bins"])
def test_nara_whose_core_has_no_tensors_is_refused_by_a_loader_of_loras_too(
    core: str, pipe: Any, tmp_path: Path
) -> None:
    """All keys of its file are a LoRA's; what it is stands in the metadata alone."""
    trained = _bases.sdxl()
    trained.unet.add_adapter(NaraConfig(core_type=core, r=5, target_modules=["to_q"]))
    trained.save_nara_weights(tmp_path)
    assert all(".lora_" in key for key in load_file(tmp_path / WEIGHTS["pipeline"]))
    file = tmp_path / WEIGHTS["pipeline"]
    refused(lambda: pipe.load_lora_weights(file), pipe, "load_nara_weights")
