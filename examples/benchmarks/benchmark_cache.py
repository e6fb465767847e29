"""Tokens a second of `generate` on a model in blocks (LLaDA2), with its cache of clean blocks and without.

    python examples/benchmarks/benchmark_cache.py

A random LLaDA2 of 5.1 M parameters, with a NaRA on its attention, generates 64, 256 and 1 024 tokens behind a prompt of
32, in blocks of 32, `steps` steps a block. Both ways take turns within a round; a ratio is the median of the
rounds' ratios. They make the same tokens, which is checked. One thread.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from benchmark_record import median_ratio, one_thread, run_command, save_record, times_in_turn
from peft import get_peft_model
from torch import nn

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import generate
from nara_diffusion.dllm.models.block_causal import LLaDA2ForCausalLM
from nara_diffusion.dllm.models.pretrained import LLaDA2MoeConfig
from nara_diffusion.noise.level import BLOCK_SHARE

BLOCK = 32
PROMPT = 32
VOCABULARY = 2048
LENGTHS = (64, 256, 1024)


def random_model() -> nn.Module:
    """A LLaDA2 of 5.1 M parameters, whose q, k, v and o have a NaRA that is disturbed as after training."""
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        max_position_embeddings=2048,
        block_length=BLOCK,
        mask_token_id=VOCABULARY - 1,
        pad_token_id=0,
    )
    config.is_causal = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    nara = NaraConfig(r=8, lora_alpha=8, target_modules=targets, noise_convention=BLOCK_SHARE)
    model = get_peft_model(LLaDA2ForCausalLM(config), nara)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def compare(model: nn.Module, length: int, steps: int, rounds: int) -> dict[str, Any]:
    """Tokens a second with the cache and without, and their ratio, of answers of `length` tokens."""
    prompt = torch.randint(1, VOCABULARY - 1, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    answers: dict[str, Any] = {}

    def answer(use_cache: bool) -> None:
        options: dict[str, Any] = {"gen_length": length, "steps": length // BLOCK * steps, "stop_at_eos": False}
        answers[str(use_cache)] = generate(model, prompt, use_cache=use_cache, **options)

    times = times_in_turn({"cache": lambda: answer(True), "none": lambda: answer(False)}, rounds)
    same = (answers["True"] == answers["False"]).float().mean().item()
    return {
        "tokens_per_second": {name: length / statistics.median(values) for name, values in times.items()},
        "ratio": median_ratio(times["none"], times["cache"]),
        "same_tokens": same,
    }


def main(
    steps: int = 8, rounds: int = 3, lengths: tuple[int, ...] = LENGTHS, output_dir: str = "outputs/benchmarks"
) -> dict[str, Any]:
    """Time all lengths, `steps` steps a block; print a table, save it as JSON, return the figures."""
    model = random_model()
    figures: dict[str, Any] = {}
    print("| tokens | with the cache, a second | without | ratio |\n|---:|---:|---:|---:|")
    with one_thread():
        for length in lengths:
            found = figures[str(length)] = compare(model, length, steps, rounds)
            speed = found["tokens_per_second"]
            print(f"| {length} | {speed['cache']:.1f} | {speed['none']:.1f} | {found['ratio']:.2f} |", flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    record = {"parameters": parameters, "block": BLOCK, "steps_a_block": steps, "rounds": rounds, "lengths": figures}
    print(f"saved to {save_record('benchmark_cache', record, output_dir)}")
    return record


if __name__ == "__main__":
    run_command(main)
