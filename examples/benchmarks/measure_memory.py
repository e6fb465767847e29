"""The memory of a training step on a device beside what --plan says of it.

    python examples/benchmarks/measure_memory.py [--device cuda --size 1b]

A bidirectional Llama with random weights in bfloat16 and a NaRA on all its linear layers takes two steps of the
masked-diffusion loss and AdamW. On a CUDA device the measured figure is `max_memory_allocated`; on a CPU the storages
that live at once are counted.
"""

from __future__ import annotations

from typing import Any

import torch
from benchmark_record import run_command
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import masked_diffusion_loss
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.training.planned_step import PlannedStep, StepCounter, measure, nbytes, tensors_of

SIZES = {
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 1000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "vocab_size": 32000},
}
BATCH, LENGTH = 2, {"tiny": 128, "1b": 1024}
STEPS = 2


def model_of(size: str) -> nn.Module:
    """Return the adapted model on meta."""
    heads = {"num_attention_heads": 4 if size == "tiny" else 16, "max_position_embeddings": LENGTH[size]}
    config = LlamaConfig(**SIZES[size], **heads)
    config.is_causal, config.mask_token_id = False, 0
    with torch.device("meta"):
        base = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
        return get_peft_model(base, NaraConfig(r=16, target_modules="all-linear"))


def main(size: str = "tiny", device: str = "cpu") -> dict[str, int]:
    """Print the highest memory of the second of two steps, in bytes, as planned and as measured; return both."""
    planned = planned_bytes(size)
    measured = measured_bytes(size, device)
    print(f"{size} on {device}: planned {planned / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB")
    return {"planned": planned, "measured": measured}


def loss_of(model: nn.Module, size: str, device: str) -> Tensor:
    ids = torch.ones(BATCH, LENGTH[size], dtype=torch.long, device=device)
    masking: dict[str, Any] = {"noise_level": 1.0, "seed": 0, "sample_indices": [0, 1]}
    return masked_diffusion_loss(model, ids, [LENGTH[size] // 8] * BATCH, **masking).loss


def planned_bytes(size: str) -> int:
    """Return the peak that `--plan` computes."""
    model = model_of(size)
    words = {"pretrained_model_name_or_path": size, "train_file": size, "mixed_precision": "bf16"}
    step = PlannedStep(model, lambda: loss_of(model, size, "cpu"), f"{BATCH} x {LENGTH[size]} tokens")
    return measure(step, Arguments(**words)).peak


def measured_bytes(size: str, device: str) -> int:
    """Return the peak of the same step on real tensors of `device`."""
    model = model_of(size).to_empty(device=device)
    with torch.no_grad():
        for tensor in tensors_of(model):
            tensor.normal_(std=0.02)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    of_model = nbytes(tensors_of(model))
    counter = StepCounter(tensors_of(model))
    with counter:
        for _ in range(STEPS):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model, size, device)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return of_model + counter.peak if device == "cpu" else torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    run_command(main)
