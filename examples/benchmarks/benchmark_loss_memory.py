"""Peak memory of logits and loss: at masked positions in chunks, beside the usual loss over all positions.

    python examples/benchmarks/benchmark_loss_memory.py

LLaDA's vocabulary (126 464 tokens) and a batch of 4 × 1024 tokens, forward and backward. The backbone is small, so that
logits and loss are nearly all of what is measured. The usual loss asks the model for logits at all b · l positions and
hands them to the cross-entropy; both ways see the same masks and give the same loss, which is printed too.

Each way runs in a process of its own. Its peak is how far the process's high-water mark rises above the one that the
same step on a few tokens left behind. Needs Linux, about 9 GB of memory and a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_record import save_record
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import masked_diffusion_loss
from nara_diffusion.dllm.masking import mask_answers

LLADA_VOCABULARY = 126464
TARGET = 0.4  # of the usual loss's peak, at most
USUAL, CHUNKED, CHUNKED_FULL = "all positions", "masked positions in chunks", "the same, every position masked"
SEED = 0


def adapted_model(vocabulary: int) -> PeftModel:
    """A bidirectional Llama of width 64 with NaRA on its attention; its head, like the rest of the base, is frozen."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    config.is_causal = False
    config.mask_token_id = vocabulary - 1
    model = LlamaForCausalLM(config)
    return get_peft_model(model, NaraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


def usual_loss(model: PeftModel, input_ids: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
    """LLaDA's objective as it is usually written, from logits (b, l, v): mean over b of Σ_masked CE / (λ · l)."""
    batch = mask_answers(input_ids, prompt_lengths, mask_token_id=model.config.mask_token_id, seed=SEED)
    with noise_level(model, batch.noise_level):
        logits = model(input_ids=batch.input_ids).logits
    token_losses = cross_entropy(logits.flatten(0, 1), input_ids.flatten(), reduction="none")  # (b · l,)
    weights = batch.masked / batch.noise_level[:, None]  # (b, l)
    return (token_losses.view_as(weights) * weights).mean()


def step(way: str, model: PeftModel, input_ids: torch.Tensor) -> float:
    """One forward and backward over answers without a prompt; returns the loss."""
    prompt_lengths = torch.zeros(len(input_ids), dtype=torch.long)
    if way == USUAL:
        loss = usual_loss(model, input_ids, prompt_lengths)
    else:
        noise_levels = torch.ones(len(input_ids)) if way == CHUNKED_FULL else None
        loss = masked_diffusion_loss(model, input_ids, prompt_lengths, noise_level=noise_levels, seed=SEED).loss
    loss.backward()
    return loss.item()


def high_water_mark() -> float:
    """The most memory that this process has held so far, in GiB.

    Not `getrusage`'s figure: that one starts from the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return kibibytes / 2**20


def measure(way: str, vocabulary: int, batch: int, length: int) -> dict[str, float]:
    """Peak, time and loss of one step; meant to run in a fresh process."""
    torch.set_num_threads(1)
    model = adapted_model(vocabulary)
    input_ids = torch.randint(vocabulary - 1, (batch, length), generator=torch.Generator().manual_seed(SEED))
    step(way, model, input_ids[:, :2])
    before, start = high_water_mark(), time.perf_counter()
    loss = step(way, model, input_ids)
    return {"peak_gib": high_water_mark() - before, "seconds": time.perf_counter() - start, "loss": loss}


def main(
    vocabulary: int = LLADA_VOCABULARY,
    batch: int = 4,
    length: int = 1024,
    output_dir: str | Path = "outputs/benchmarks",
) -> dict[str, Any]:
    """Measure the three ways one after the other; print them, save them as JSON, return the figures."""
    ways = {}
    for way in (USUAL, CHUNKED, CHUNKED_FULL):
        command = [sys.executable, __file__, "--measure", way, *map(str, (vocabulary, batch, length))]
        ways[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"{way:32s} {ways[way]['peak_gib']:6.2f} GiB {ways[way]['seconds']:7.1f} s   loss {ways[way]['loss']:.5f}"
        )
    ratios = {way: ways[way]["peak_gib"] / ways[USUAL]["peak_gib"] for way in (CHUNKED, CHUNKED_FULL)}
    for way, ratio in ratios.items():
        print(f"{way} / {USUAL}: {ratio:.3f}, {'within' if ratio <= TARGET else 'ABOVE'} {TARGET}")
    figures = {"vocabulary": vocabulary, "batch": [batch, length], "ways": ways, "peak_ratios": ratios}
    print(f"saved to {save_record('benchmark_loss_memory', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the peak memory of two ways to compute the loss.")
    parser.add_argument("--output_dir", default="outputs/benchmarks", help="where the JSON record goes")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)  # what a fresh process measures
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], *map(int, args.measure[1:]))))
    else:
        main(output_dir=args.output_dir)
