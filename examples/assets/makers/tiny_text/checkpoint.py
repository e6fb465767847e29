"""Writes a Llama model of transformers as a checkpoint in LLaDA's own format.

LLaDA is a Llama with bidirectional attention under other names. The tensors are the same, bit for bit, so writing one
is a renaming of keys, which `nara_diffusion.dllm.load_backbone` undoes, and a config.json with LLaDA's field names.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nara_diffusion.dllm.models.llada_format import checkpoint_name

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


def save_llada_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """config.json and model.safetensors in LLaDA's format, beside the tokenizer's two files."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {checkpoint_name(key): value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(llada_config(model, tokenizer), indent=2) + "\n")
    tokenizer.save_pretrained(directory, save_jinja_files=False)
