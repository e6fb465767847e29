"""Backbones and adapters for the tests of masked-diffusion language models."""

from __future__ import annotations

import builtins

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from nara_diffusion import NaraConfig


def disturb(model: torch.nn.Module, scale: float = 0.3) -> None:
    """Move every trainable parameter away from its initial value, so that adapters and cores do something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def enable_checkpointing(model: torch.nn.Module, options: dict[str, bool]) -> None:
    """By the name that the installed transformers has for it."""
    new_name = "activation_checkpointing_enable"
    getattr(model, new_name if hasattr(model, new_name) else "gradient_checkpointing_enable")(options)


@pytest.fixture
def double_llama(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    return tiny_llama.double()


@pytest.fixture
def adapted_llama(tiny_llama: LlamaForCausalLM) -> PeftModel:
    """NaRA on q and v, disturbed: its output depends on λ."""
    config = NaraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], core_hidden_dims=(8, 8))
    model = get_peft_model(tiny_llama, config)
    disturb(model)
    return model.eval()


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may wait for an answer on the terminal."""

    def ask(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr(builtins, "input", ask)
