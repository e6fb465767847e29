"""One small model of every kind of output head, and a batch with prompts and padding for them."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
    RobertaForMaskedLM,
)

from nara_diffusion import NaraConfig
from nara_diffusion.dllm.models.shifted_logits import ShiftedQwen2ForCausalLM

from .conftest import disturb

MASK = 49
SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
INPUT_IDS = torch.randint(2, MASK, (3, 14), generator=torch.Generator().manual_seed(0))
PROMPT_LENGTHS = [3, 6, 1]
ATTENTION_MASK = torch.tensor([[1] * 14, [1] * 9 + [0] * 5, [1] * 12 + [0] * 2])
BATCH = {"input_ids": INPUT_IDS, "prompt_lengths": PROMPT_LENGTHS, "attention_mask": ATTENTION_MASK}


def llama(**kwargs) -> LlamaForCausalLM:
    config = LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64, use_cache=False, **kwargs)
    config.is_causal = False
    return LlamaForCausalLM(config)


def dream() -> ShiftedQwen2ForCausalLM:
    config = Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=64, use_cache=False)
    config.is_causal = False
    return ShiftedQwen2ForCausalLM(config)


def lora_on_head() -> PeftModel:
    return get_peft_model(llama(), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"]))


def trained_head() -> PeftModel:
    return get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def nara_on_head() -> PeftModel:
    config = NaraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], core_hidden_dims=(8, 8))
    return get_peft_model(llama(), config)


def modernbert() -> ModernBertForMaskedLM:
    config = ModernBertConfig(**SIZES, max_position_embeddings=64, pad_token_id=0, local_attention=8)
    return ModernBertForMaskedLM(config)


MODELS = {
    "untied": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "dream": dream,
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=64)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=64, pad_token_id=0)),
    "modernbert": modernbert,
    "lora-on-head": lora_on_head,
    "trained-head": trained_head,
    "nara-on-head": nara_on_head,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = MODELS[name]().double()
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    inner.config.mask_token_id = MASK
    disturb(model, 0.1)
    return model.eval()


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> bool:
    """To float64's accuracy; to float32's where C(λ), which is always computed in it, has a part."""
    tolerance = 1e-5 if name.startswith("nara") else 1e-9
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max() + 1e-12)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads, strict=True)
    }
