"""A LLaDA checkpoint with random weights, and its forward pass in plain torch, written from the model's description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIG: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "d_model": 24,
    "embedding_dropout": 0.0,
    "embedding_size": 40,
    "eos_token_id": 1,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 39,
    "max_sequence_length": 64,
    "mlp_hidden_size": 56,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 3,
    "pad_token_id": 1,
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 5000.0,
    "scale_logits": False,
    "torch_dtype": "float32",
    "use_cache": False,
    "vocab_size": 40,
    "weight_tying": False,
}


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of that configuration, under LLaDA's names; norms are not at one."""
    generator = torch.Generator().manual_seed(seed)
    d, ff = config["d_model"], config["mlp_hidden_size"]
    kv = d // config["n_heads"] * config["n_kv_heads"]

    def normal(*shape: int, scale: float = 0.2, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale + mean

    tensors = {
        "model.transformer.wte.weight": normal(config["embedding_size"], d, scale=1.0),
        "model.transformer.ln_f.weight": normal(d, mean=1.0),
    }
    if not config["weight_tying"]:
        tensors["model.transformer.ff_out.weight"] = normal(config["embedding_size"], d)
    for n in range(config["n_layers"]):
        block = f"model.transformer.blocks.{n}"
        tensors |= {
            f"{block}.attn_norm.weight": normal(d, mean=1.0),
            f"{block}.ff_norm.weight": normal(d, mean=1.0),
            f"{block}.q_proj.weight": normal(d, d),
            f"{block}.k_proj.weight": normal(kv, d),
            f"{block}.v_proj.weight": normal(kv, d),
            f"{block}.attn_out.weight": normal(d, d),
            f"{block}.ff_proj.weight": normal(ff, d),
            f"{block}.up_proj.weight": normal(ff, d),
            f"{block}.ff_out.weight": normal(d, ff),
        }
    return tensors


def reference_logits(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], input_ids: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Logits (b, l, v) for `input_ids` (b, l), where keys that are not `real` (b, l) are attended to by nobody."""
    heads, groups = config["n_heads"], config["n_heads"] // config["n_kv_heads"]
    head_dim = config["d_model"] // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * tensors[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (b, h, l, head_dim)
        half = head_dim // 2
        frequencies = config["rope_theta"] ** (-torch.arange(half, dtype=x.dtype) * 2 / head_dim)
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * frequencies  # (l, half)
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    def split(x: torch.Tensor) -> torch.Tensor:  # (b, l, h * head_dim) → (b, h, l, head_dim)
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    x = tensors["model.transformer.wte.weight"][input_ids]
    for n in range(config["n_layers"]):
        block = f"model.transformer.blocks.{n}"
        weight = {key: tensors[f"{block}.{key}.weight"] for key in ("q_proj", "k_proj", "v_proj", "attn_out")}
        h = norm(x, f"{block}.attn_norm.weight")
        q = rotate(split(h @ weight["q_proj"].T))
        k = rotate(split(h @ weight["k_proj"].T)).repeat_interleave(groups, 1)
        v = split(h @ weight["v_proj"].T).repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) / head_dim**0.5
        scores = scores.masked_fill(~real[:, None, None], float("-inf"))
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ weight["attn_out"].T
        h = norm(x, f"{block}.ff_norm.weight")
        gate, up = h @ tensors[f"{block}.ff_proj.weight"].T, h @ tensors[f"{block}.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ tensors[f"{block}.ff_out.weight"].T
    head = "wte" if config["weight_tying"] else "ff_out"
    return norm(x, "model.transformer.ln_f.weight") @ tensors[f"model.transformer.{head}.weight"].T


def save_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], *, shards: int = 1, chat: bool = False
) -> None:
    """Write config.json, safetensors (in `shards` files with an index) and a tokenizer to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(tensors)
        index = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_tokenizer(folder, config["vocab_size"], chat=chat)


def save_tokenizer(folder: Path, vocab_size: int, *, mask: bool = True, chat: bool = False) -> None:
    """A word-level tokenizer: w0 … , <eos> = 1, and the mask token last."""
    vocab = {f"w{i}": i for i in range(vocab_size)}
    del vocab["w1"]
    vocab["<eos>"] = 1
    if mask:
        del vocab[f"w{vocab_size - 1}"]
        vocab["<mask>"] = vocab_size - 1
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", **({"mask_token": "<mask>"} if mask else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if chat:
        tokenizer.chat_template = (
            "{% for message in messages %}{{ 'w2 ' if message['role'] == 'user' else 'w4 ' }}"
            "{{ message['content'] + ' w3 ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
        )
    tokenizer.save_pretrained(folder)
