"""Tiny checkpoints in the public formats of LLaDA2, LLaDA-MoE and Qwen's relatives, and their logits by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.acceptance._text import word_tokenizer

VOCABULARY = 40
MASK = VOCABULARY - 1
LLADA2: dict[str, Any] = {
    "model_type": "llada2_moe",
    "architectures": ["LLaDA2MoeModelLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rope_theta": 600.0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "use_qk_norm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_head": False,
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "output_router_logits": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 20,
    "use_cache": False,
}
"""All fields that the public configuration of LLaDA2.0-mini has, at a tiny size."""
LLADA_MOE: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAMoEModelLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "dense_intermediate_size": 40,
    "expert_intermediate_size": 12,
    "shared_expert_intermediate_size": None,
    "moe_layer_freq": [0, 1, 1],
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "router_num_group": None,
    "router_topk_group": None,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": 0.01,
    "output_router_logits": False,
    "qk_layernorm": True,
    "clip_qkv": None,
    "rope_scaling": None,
    "partial_rotary_factor": 1,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": False,
    "rope_theta": 600.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""All fields that the public configuration of LLaDA-MoE-7B-A1B has, at a tiny size."""


SDAR: dict[str, Any] = {
    "model_type": "sdar",
    "architectures": ["SDARForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "bos_token_id": 1,
    "debug": False,
    "eos_token_id": 1,
    "block_size": 4,
    "mask_token_id": MASK,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "max_window_layers": 36,
    "micro_forward": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600.0,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
"""All fields that the public configuration of SDAR-4B-Chat has, at a tiny size."""
SDAR_MOE: dict[str, Any] = {
    "model_type": "sdar_moe",
    "architectures": ["SDARMoeForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
"""All fields that the public configuration of SDAR-30B-A3B-Chat has, at a tiny size."""
FAST_DLLM: dict[str, Any] = {
    "model_type": "Fast_dLLM_Qwen",
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "attention_dropout": 0.0,
    "bd_size": 4,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_types": ["full_attention"] * 2,
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
"""The fields of Fast-dLLM v2's configuration class, at a tiny size."""
A2D_QWEN3 = {key: SDAR[key] for key in ("head_dim", *(FAST_DLLM.keys() & SDAR.keys()))} | {"model_type": "a2d-qwen3"}
A2D_QWEN2 = {key: value for key, value in FAST_DLLM.items() if key != "bd_size"} | {"model_type": "a2d-qwen2"}


def write_checkpoint(folder: Path, fields: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Write a checkpoint of random weights, norms and biases included, and return its tensors."""
    torch.manual_seed(seed)
    states = {"llada2_moe": llada2_state, "llada": llada_moe_state}
    state = states.get(fields["model_type"], qwen_state)(fields)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))
    word_tokenizer(VOCABULARY, chat=True).save_pretrained(folder)
    return state


def _around(mean: float, *shape: int) -> Tensor:
    return mean + 0.3 * torch.randn(*shape)


def _mlp(prefix: str, width: int, inner: int) -> dict[str, Tensor]:
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return {f"{prefix}.{name}.weight": _around(0, *shape) for name, shape in shapes.items()}


def llada2_state(fields: dict[str, Any]) -> dict[str, Tensor]:
    d, heads, keys, size = (
        fields[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    state = {"model.word_embeddings.weight": _around(0, VOCABULARY, d), "model.norm.weight": _around(1, d)}
    state["lm_head.weight"] = _around(0, VOCABULARY, d)
    for layer in range(fields["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}.{norm}.weight"] = _around(1, d)
        state[f"{at}.attention.query_key_value.weight"] = _around(0, (heads + 2 * keys) * size, d)
        state[f"{at}.attention.query_layernorm.weight"] = _around(1, size)
        state[f"{at}.attention.key_layernorm.weight"] = _around(1, size)
        state[f"{at}.attention.dense.weight"] = _around(0, d, heads * size)
        if layer < fields["first_k_dense_replace"]:
            state |= _mlp(f"{at}.mlp", d, fields["intermediate_size"])
            continue
        state[f"{at}.mlp.gate.weight"] = _around(0, fields["num_experts"], d)
        state[f"{at}.mlp.gate.expert_bias"] = _around(0, fields["num_experts"])
        state |= _mlp(f"{at}.mlp.shared_experts", d, fields["moe_intermediate_size"])
        for expert in range(fields["num_experts"]):
            state |= _mlp(f"{at}.mlp.experts.{expert}", d, fields["moe_intermediate_size"])
    return state


def qwen_state(fields: dict[str, Any]) -> dict[str, Tensor]:
    """Qwen3, with norms of q and k, if `fields` has head_dim, and with experts if it has these; else Qwen2."""
    d, heads, keys = (fields[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    size = fields.get("head_dim") or d // heads
    state = {"model.embed_tokens.weight": _around(0, VOCABULARY, d), "model.norm.weight": _around(1, d)}
    state["lm_head.weight"] = _around(0, VOCABULARY, d)
    for layer in range(fields["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}.{norm}.weight"] = _around(1, d)
        for name, count in {"q": heads, "k": keys, "v": keys}.items():
            state[f"{at}.self_attn.{name}_proj.weight"] = _around(0, count * size, d)
            if "head_dim" not in fields:
                state[f"{at}.self_attn.{name}_proj.bias"] = _around(0, count * size)
            elif name != "v":
                state[f"{at}.self_attn.{name}_norm.weight"] = _around(1, size)
        state[f"{at}.self_attn.o_proj.weight"] = _around(0, d, heads * size)
        if "num_experts" in fields:
            state[f"{at}.mlp.gate.weight"] = _around(0, fields["num_experts"], d)
            for expert in range(fields["num_experts"]):
                state |= _mlp(f"{at}.mlp.experts.{expert}", d, fields["moe_intermediate_size"])
        else:
            state |= _mlp(f"{at}.mlp", d, fields["intermediate_size"])
    return state


def llada_moe_state(fields: dict[str, Any]) -> dict[str, Tensor]:
    d, heads = fields["hidden_size"], fields["num_attention_heads"]
    state = {"model.embed_tokens.weight": _around(0, VOCABULARY, d), "model.norm.weight": _around(1, d)}
    state["lm_head.weight"] = _around(0, VOCABULARY, d)
    for layer, frequency in enumerate(fields["moe_layer_freq"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}.{norm}.weight"] = _around(1, d)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state[f"{at}.self_attn.{name}.weight"] = _around(0, d, d)
        for name in ("q_norm", "k_norm"):
            state[f"{at}.self_attn.{name}.weight"] = _around(1, d // heads)
        if not frequency:
            state |= _mlp(f"{at}.mlp", d, fields["dense_intermediate_size"])
            continue
        state[f"{at}.mlp.gate.weight"] = _around(0, fields["num_experts"], d)
        for expert in range(fields["num_experts"]):
            state |= _mlp(f"{at}.mlp.experts.{expert}", d, fields["expert_intermediate_size"])
    return state


# ---------------------------------------------------------------- logits by hand, in float64


class ByHand:
    """Logits of one sequence at a time, straight from a public checkpoint's tensors.

    `seen` (l, l) says which position i sees which position j.
    """

    def __init__(self, fields: dict[str, Any], state: dict[str, Tensor]) -> None:
        self.fields = fields
        self.state = {key: value.double() for key, value in state.items()}
        self.is_llada2 = fields["model_type"] == "llada2_moe"

    def __call__(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        seen = torch.ones(len(ids), len(ids), dtype=torch.bool) if seen is None else seen
        x = self.state["model.word_embeddings.weight" if self.is_llada2 else "model.embed_tokens.weight"][ids]
        for layer in range(self.fields["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{at}.input_layernorm"), at, seen)
            x = x + self.feed_forward(self.norm(x, f"{at}.post_attention_layernorm"), f"{at}.mlp")
        return self.norm(x, "model.norm") @ self.state["lm_head.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = (x * x).mean(-1, keepdim=True)
        return x / (mean + self.fields["rms_norm_eps"]).sqrt() * self.state[f"{name}.weight"]

    def attention(self, x: Tensor, at: str, seen: Tensor) -> Tensor:
        heads, groups = self.fields["num_attention_heads"], self.fields["num_key_value_heads"]
        size = self.fields.get("head_dim") or self.fields["hidden_size"] // heads
        if self.is_llada2:
            fused = self.state[f"{at}.attention.query_key_value.weight"]
            parts = fused.unflatten(0, (heads + 2 * groups, size))
            weights = parts[:heads], parts[heads : heads + groups], parts[heads + groups :]
            norms = f"{at}.attention.query_layernorm", f"{at}.attention.key_layernorm"
            out = self.state[f"{at}.attention.dense.weight"]
        else:
            prefix = f"{at}.self_attn"
            weights = tuple(
                self.state[f"{prefix}.{name}.weight"].unflatten(0, (-1, size))
                for name in ("q_proj", "k_proj", "v_proj")
            )
            norms = f"{prefix}.q_norm", f"{prefix}.k_norm"
            out = self.state[f"{prefix}.o_proj.weight"]
        q, k, v = (torch.einsum("hsd,ld->hls", weight, x) for weight in weights)
        if f"{at}.self_attn.q_proj.bias" in self.state:
            biases = (self.state[f"{at}.self_attn.{name}_proj.bias"].unflatten(0, (-1, 1, size)) for name in "qkv")
            q, k, v = (states + bias for states, bias in zip((q, k, v), biases, strict=True))
        if f"{norms[0]}.weight" in self.state:
            q, k = self.norm(q, norms[0]), self.norm(k, norms[1])
        q, k = self.rotated(q), self.rotated(k)
        results = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = (q[head] @ k[group].T / size**0.5).masked_fill(~seen, -torch.inf)
            results.append(scores.softmax(-1) @ v[group])
        return torch.cat(results, -1) @ out.T

    def rotated(self, x: Tensor) -> Tensor:
        """Rotate pairs (i, i + n/2) of the first n features by position · θ^(−2 i / n)."""
        n = int(x.shape[-1] * self.fields.get("partial_rotary_factor", 1.0))
        turned = x.clone()
        for i in range(n // 2):
            angle = torch.arange(x.shape[-2]).double() * self.fields["rope_theta"] ** (-2 * i / n)
            a, b = x[..., i], x[..., i + n // 2]
            turned[..., i] = a * angle.cos() - b * angle.sin()
            turned[..., i + n // 2] = b * angle.cos() + a * angle.sin()
        return turned

    def gated(self, x: Tensor, at: str) -> Tensor:
        gate, up, down = (self.state[f"{at}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def feed_forward(self, x: Tensor, at: str) -> Tensor:
        if f"{at}.gate.weight" not in self.state:
            return self.gated(x, at)
        routed = torch.stack([self.mixture(token, at) for token in x])
        return routed + self.gated(x, f"{at}.shared_experts") if self.is_llada2 else routed

    def mixture(self, token: Tensor, at: str) -> Tensor:
        scores, chosen = self.chosen(self.state[f"{at}.gate.weight"] @ token, at)
        return sum(scores[i] * self.gated(token, f"{at}.experts.{i}") for i in chosen)  # type: ignore[return-value]

    def chosen(self, logits: Tensor, at: str) -> tuple[Tensor, list[int]]:
        count = self.fields["num_experts_per_tok"]
        if not self.is_llada2:
            scores, chosen = logits.softmax(-1), logits.topk(count).indices.tolist()
            return scores / scores[chosen].sum() if self.fields["norm_topk_prob"] else scores, chosen
        scores, groups = logits.sigmoid(), self.fields["n_group"]
        expected = scores + self.state[f"{at}.gate.expert_bias"]
        of_group = expected.view(groups, -1)
        best = of_group.topk(2).values.sum(-1).topk(self.fields["topk_group"]).indices.tolist()
        for group in set(range(groups)) - set(best):
            of_group[group] = -torch.inf
        chosen = expected.topk(count).indices.tolist()
        return scores / scores[chosen].sum() * self.fields["routed_scaling_factor"], chosen


def block_seen(length: int, block_length: int) -> Tensor:
    """(l, l) bool: each position sees its own block and the earlier ones."""
    block = torch.arange(length) // block_length
    return block[:, None] >= block
