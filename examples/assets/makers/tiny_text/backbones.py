"""The two families of small text models: how each is built, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from nara_diffusion.dllm.models.shifted_logits import ShiftedQwen2ForCausalLM

from .checkpoint import save_llada_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "use_cache": False,
}


class Backbone(NamedTuple):
    build: Callable[[int], PreTrainedModel]  # from the size of the vocabulary
    save: Callable[[Any, PreTrainedTokenizerFast, Path], None]


def build_llada(vocab_size: int) -> LlamaForCausalLM:
    """0.73 M parameters: 4 layers, width 128, 4 heads, SwiGLU of 256; attention in both directions."""
    config = LlamaConfig(vocab_size=vocab_size, num_key_value_heads=4, rms_norm_eps=1e-5, **SIZES)
    config.is_causal = False
    return LlamaForCausalLM(config)


def build_dream(vocab_size: int) -> ShiftedQwen2ForCausalLM:
    """0.67 M parameters: the same sizes with 2 key heads, biases of q, k and v, and logits shifted by one position."""
    config = Qwen2Config(vocab_size=vocab_size, num_key_value_heads=2, rms_norm_eps=1e-6, **SIZES)
    config.is_causal = False
    config.shifted_logits = True
    return ShiftedQwen2ForCausalLM(config)


def save_dream_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """As transformers writes it: config.json says `shifted_logits`, which `load_backbone` reads."""
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)


BACKBONES = {
    "llada": Backbone(build_llada, save_llada_checkpoint),
    "dream": Backbone(build_dream, save_dream_checkpoint),
}
