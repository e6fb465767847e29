"""Memory of training LLaDA-8B with NaRA in bfloat16, 8 and 4 bits, estimated without a GPU.

    python examples/benchmarks/benchmark_memory_8b.py

Weights are those of accelerate's estimate (`compute_module_sizes`) of the model on the meta device, in the dtypes that
`dllm.py --load_in_8bit`, `--load_in_4bit` load: linear layers rounded, NF4 with double quantisation at 0.516 bytes a
number, all else in float32, by PEFT. The adapter counts weights, gradients and AdamW's two states in float32.

Activations are what autograd keeps for the backward, measured at three small sizes of the same shape (ff = 3 d, heads
of 64) under bfloat16 autocast, fitted as bytes a token and layer = α + β d, and extrapolated to d = 4096. With
--gradient_checkpointing they are one layer's, and the input of each layer. Totals hold besides the logits of one chunk
of 256 masked positions, with what their cross-entropy keeps, and one linear layer's weight as it is unpacked for use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import compute_module_sizes
from benchmark_record import run_command, save_record
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import NaraConfig, noise_level

SIZES = ((256, 2), (512, 2), (768, 3))  # width, layers
TOKENS = 128  # of a measured forward
GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a number: half, a constant a 64, whose own scale is one a 256
LLADA_8B: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
VOCABULARY = 126464


def build(rank: int, vocab_size: int, **sizes: Any) -> PeftModel:
    """A bidirectional Llama of LLaDA's shape with NaRA on its attention, as the shipped configurations have it."""
    config = LlamaConfig(vocab_size=vocab_size, intermediate_size=3 * sizes["hidden_size"], **sizes)
    config.is_causal = config.use_cache = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(LlamaForCausalLM(config), NaraConfig(r=rank, target_modules=targets))


def small(rank: int, quantised: bool, width: int, layers: int) -> PeftModel:
    """One of that width in the dtypes of a run in bfloat16, or of one beside rounded weights."""
    torch.manual_seed(0)
    model = build(rank, 64, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
    for name, module in model.named_modules():
        is_rounded = isinstance(module, nn.Linear) and "lora_" not in name
        if is_rounded or (not quantised and isinstance(module, nn.Embedding | type(model.model.model.norm))):
            module.to(torch.bfloat16)
    return model


def kept_bytes(model: PeftModel, tokens: int) -> int:
    """What autograd keeps of a forward of the layers, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no other gets its address
        return tensor

    alive: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks, noise_level(model, 0.5):
        model.model.model(torch.zeros(1, tokens, dtype=torch.long))
    return sum(kept.values())


def activations(rank: int, quantised: bool) -> tuple[float, float, float]:
    """α, β of bytes a token and layer, and the largest relative error of the fit at the three sizes."""
    rows = torch.tensor([[1.0, width] for width, _ in SIZES], dtype=torch.float64)
    found = torch.tensor([kept_bytes(small(rank, quantised, *size), TOKENS) / TOKENS / size[1] for size in SIZES])
    solution = torch.linalg.lstsq(rows, found.double()[:, None]).solution
    alpha, beta = solution[:, 0].tolist()
    return alpha, beta, float(((rows @ solution)[:, 0] / found - 1).abs().max())


def weights(model: PeftModel, bits: int) -> float:
    """Bytes of the frozen weights."""
    base = model.get_base_model()
    sizes = compute_module_sizes(base, dtype=torch.float32)  # type: ignore[arg-type]
    names = [name for name, module in base.named_modules() if hasattr(module, "base_layer")]
    names += [n for n, m in base.named_modules() if type(m) is nn.Linear and "lm_head" not in n and "lora" not in n]
    linear = sum(base.get_submodule(name).weight.numel() for name in set(names) if "base_layer" not in name)
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    rest = sizes[""] / 4 - trained - linear
    return {16: 2 * (linear + rest), 8: linear + 4 * rest, 4: NF4 * linear + 4 * rest}[bits]


def main(
    rank: int = 8, tokens: int = 1024, batch_size: int = 4, output_dir: str = "outputs/benchmarks"
) -> dict[str, Any]:
    """Print the table, as Markdown, in GiB; returns its figures."""
    with init_empty_weights():
        model = build(rank, VOCABULARY, tie_word_embeddings=False, **LLADA_8B)
    trained = 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    width, layers, count = LLADA_8B["hidden_size"], LLADA_8B["num_hidden_layers"], tokens * batch_size
    chunk, unpacked = 256 * VOCABULARY * 12, 3 * width * width * 2
    rows: dict[str, Any] = {}
    for bits in (16, 8, 4):
        alpha, beta, error = activations(rank, quantised=bits < 16)
        layer = (alpha + beta * width) * count
        inputs = width * count * (4 if bits < 16 else 2) * layers
        parts = {"weights": weights(model, bits), "adapter": trained, "activations": layer * layers, "fit error": error}
        parts["with checkpointing"] = inputs + layer
        other = parts["weights"] + trained + chunk + (unpacked if bits < 16 else 0)
        rows[str(bits)] = parts | {"total": other + layer * layers, "total with checkpointing": other + inputs + layer}
    print(f"GiB, {batch_size} × {tokens} tokens, rank {rank}, logits of a chunk {chunk / GIB:.2f}")
    names = [name for name in rows["4"] if name != "fit error"]
    print(f"| bits | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for bits, parts in rows.items():
        print(f"| {bits} | {' | '.join(f'{parts[name] / GIB:.1f}' for name in names)} |")
    print(f"largest error of the fit: {max(row['fit error'] for row in rows.values()):.1%}")
    save_record("memory_8b", rows, Path(output_dir))
    return rows


if __name__ == "__main__":
    run_command(main)
