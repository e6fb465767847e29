"""The two families of small text models: how each is built and written, llada in LLaDA's own checkpoint format.

LLaDA is a Llama with bidirectional attention under other names. The tensors are the same, bit for bit, so writing one
is a renaming of keys, which `nara_diffusion.dllm.load_backbone` undoes, and a config.json with LLaDA's field names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from nara_diffusion.dllm.models.model_classes import ShiftedQwen2ForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "use_cache": False,
}


LLADA_NAMES = {
    r"^model\.embed_tokens\.": "model.transformer.wte.",
    r"^model\.norm\.": "model.transformer.ln_f.",
    r"^lm_head\.": "model.transformer.ff_out.",
    r"^model\.layers\.": "model.transformer.blocks.",
    r"\.input_layernorm\.": ".attn_norm.",
    r"\.post_attention_layernorm\.": ".ff_norm.",
    r"\.self_attn\.o_proj\.": ".attn_out.",
    r"\.self_attn\.": ".",
    r"\.mlp\.gate_proj\.": ".ff_proj.",
    r"\.mlp\.up_proj\.": ".up_proj.",
    r"\.mlp\.down_proj\.": ".ff_out.",
}
"""{tensors of LlamaForCausalLM: tensors of LLaDA}"""


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


# What LLaDA-8B's config.json says about options that a Llama has no choice in, or that only training would read.
FIXED_FIELDS = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "scale_logits": False,
    "input_emb_norm": False,
    "multi_query_attention": None,
    "flash_attention": False,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "init_device": "meta",
    "use_cache": False,
    "torch_dtype": "float32",
}


def llada_config(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict:
    """config.json as LLaDA-8B has it, with this model's sizes and this tokenizer's ids."""
    llama = model.config
    return FIXED_FIELDS | {
        "d_model": llama.hidden_size,
        "n_layers": llama.num_hidden_layers,
        "n_heads": llama.num_attention_heads,
        "n_kv_heads": llama.num_key_value_heads,
        "mlp_hidden_size": llama.intermediate_size,
        "mlp_ratio": llama.intermediate_size // llama.hidden_size,
        "vocab_size": llama.vocab_size,
        "embedding_size": llama.vocab_size,
        "max_sequence_length": llama.max_position_embeddings,
        "rope_theta": llama.rope_parameters["rope_theta"],
        "rms_norm_eps": llama.rms_norm_eps,
        "weight_tying": llama.tie_word_embeddings,
        "init_std": llama.initializer_range,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def llada_name(name: str) -> str:
    """The name in a LLaDA checkpoint of a LlamaForCausalLM tensor."""
    for ours, theirs in LLADA_NAMES.items():
        name = re.sub(ours, theirs, name)
    return name


def save_llada_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """config.json and model.safetensors in LLaDA's format, beside the tokenizer's two files."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {llada_name(key): value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(llada_config(model, tokenizer), indent=2) + "\n")
    tokenizer.save_pretrained(directory, save_jinja_files=False)


BACKBONES = {
    "llada": Backbone(build_llada, save_llada_checkpoint),
    "dream": Backbone(build_dream, save_dream_checkpoint),
}
