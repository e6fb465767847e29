"""Adapters in the LLaDA pipeline answer as in PEFT: loaded, mixed, switched, scaled, offloaded and unloaded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import load_backbone
from pipelines.llada import LLaDAPipeline

from .llada_answers import LENGTH, MODEL, QUESTIONS, by_generate, loaded_pipeline, states


@pytest.fixture
def pipe() -> LLaDAPipeline:
    return loaded_pipeline()


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder as train_scripts/dllm.py writes it, whose adapter changes answers, by λ too."""
    return save_adapter(tmp_path / "adapter", seed=7)


def save_adapter(folder: Path, seed: int, **options) -> Path:
    adapted(seed, **options).save_pretrained(folder)
    return folder


def adapted(seed: int, **options) -> PeftModel:
    model, _ = load_backbone(str(MODEL))
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "core_hidden_dims": (8, 8), **options}
    model = get_peft_model(model, NaraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def test_the_adapter_of_a_training_run_answers_as_in_peft(pipe, adapter):
    base = pipe(QUESTIONS, **LENGTH).sequences
    before = states(pipe)
    pipe.load_nara_weights(adapter)
    model = PeftModel.from_pretrained(load_backbone(str(MODEL))[0], adapter)
    expected = by_generate(model, pipe.tokenizer)
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, expected)
    assert not torch.equal(expected, base)
    pipe.unload_nara_weights()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    assert states(pipe).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(pipe).items())


def test_each_step_is_answered_at_its_own_noise_level(pipe, adapter):
    pipe.load_nara_weights(adapter)
    seen = []
    layer = pipe.transformer.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    told = []
    result = pipe(QUESTIONS, **LENGTH, callback_on_step_end=lambda pipe, step, level, tensors: told.append(level))
    hook.remove()
    assert len(told) == len(seen) == result.forwards
    assert told[0].tolist() == [1.0, 1.0, 1.0]
    assert all((later <= earlier).all() for earlier, later in pairwise(told))


def test_adapters_are_saved_mixed_and_switched(pipe, adapter, tmp_path):
    second = save_adapter(tmp_path / "second", seed=8, r=4)
    base = pipe(QUESTIONS, **LENGTH).sequences
    pipe.load_nara_weights(adapter, adapter_name="first")
    first = pipe(QUESTIONS, **LENGTH).sequences
    pipe.load_nara_weights(second, adapter_name="second")
    pipe.set_adapters("second")
    assert pipe.get_active_adapters() == ["second"]
    alone = pipe(QUESTIONS, **LENGTH).sequences
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, first)
    pipe.set_adapters(["first", "second"], [0.0, 1.0])
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, alone)
    pipe.save_nara_weights(tmp_path / "saved", "second")
    pipe.disable_lora()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    pipe.enable_lora()
    pipe.delete_adapters("first")
    assert pipe.get_list_adapters() == {"transformer": ["second"]}
    pipe.unload_lora_weights()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    fresh = LLaDAPipeline.from_pretrained(MODEL)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_nara_weights(tmp_path / "saved")
    assert torch.equal(fresh(QUESTIONS, **LENGTH).sequences, alone)
    assert len({tuple(found.flatten().tolist()) for found in (base, first, alone)}) == 3


def test_half_an_adapter_is_half_its_update(pipe, adapter):
    pipe.load_nara_weights(adapter, adapter_name="weak")
    pipe.set_adapters("weak", 0.5)
    model = PeftModel.from_pretrained(load_backbone(str(MODEL))[0], adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.5
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, by_generate(model, pipe.tokenizer))


def test_offload_gives_the_same_answers(pipe, adapter):
    pipe.load_nara_weights(adapter)
    expected = pipe(QUESTIONS, **LENGTH).sequences
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")
    for _ in range(2):
        assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, expected)
