"""Processor time of text: all blocks of an answer in one pass, and what NaRA adds to LoRA in `generate`.

    python examples/benchmarks/benchmark_text_steps.py --part blocks
    python examples/benchmarks/benchmark_text_steps.py --part sampling

blocks: training steps (loss, backward, AdamW) of a random LLaDA2 of 5 M parameters with a NaRA, one sample a step: a
prompt of 64 tokens and an answer of 1 024 in blocks of 32.

    all blocks  one forward of [noisy | clean], as `masked_diffusion_loss` computes it
    one block   the same loss of one block, each block in its turn; later blocks are cut off, since it doesn't see them

sampling: `generate` fills 32 tokens in 8 steps on llada-tiny (one answer, eight) and llada2-tiny (its cache, and
without it), with a LoRA and a NaRA of rank 8 on all linear layers. `base` has no adapter.

All ways take turns within a round, after a round that isn't timed. A ratio is of means over the rounds for blocks,
which differ in length, and the median of the rounds' ratios for sampling. Seconds are processor time of one thread.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from benchmark_cache import BLOCK, VOCABULARY, random_llada2
from benchmark_record import median_ratio, one_thread, run_command, save_record, times_in_turn
from peft import LoraConfig, get_peft_model
from torch import nn

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import generate, load_backbone, masked_diffusion_loss

ASSETS = Path(__file__).parents[1] / "assets"
PROMPT, TOKENS, STEPS = 64, 32, 8
METHODS = {"LoRA": LoraConfig, "NaRA": NaraConfig}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llada-tiny, one answer": ("llada-tiny", 1, {}),
    "llada-tiny, eight answers": ("llada-tiny", 8, {}),
    "llada2-tiny, cache": ("llada2-tiny", 1, {"use_cache": True}),
    "llada2-tiny, no cache": ("llada2-tiny", 1, {"use_cache": False}),
}


def in_turn(arms: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each arm in each round."""
    with one_thread():
        return times_in_turn(arms, rounds, time.process_time)


# ---------------------------------------------------------------- all blocks, one block


def measure_blocks(rounds: int, answer: int) -> dict[str, Any]:
    """Loss terms, positions and seconds of a step in both ways, and their ratios."""
    model = random_llada2().train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    text = torch.randint(VOCABULARY - 1, (1, PROMPT + answer), generator=torch.Generator().manual_seed(1))
    blocks = torch.randperm(answer // BLOCK, generator=torch.Generator().manual_seed(2))
    starts, generator = cycle((PROMPT + BLOCK * blocks).tolist()), torch.Generator().manual_seed(3)
    terms: dict[str, list[int]] = {"all blocks": [], "one block": []}
    positions: dict[str, list[int]] = {name: [] for name in terms}

    def step(name: str) -> None:
        start = PROMPT if name == "all blocks" else next(starts)
        stop = text.shape[1] if name == "all blocks" else start + BLOCK
        batch = masked_diffusion_loss(model, text[:, :stop], [start], generator=generator)
        batch.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        terms[name].append(int(batch.masked.sum()))
        positions[name].append(batch.input_ids.numel())

    times = in_turn({name: partial(step, name) for name in terms}, rounds)
    figures: dict[str, Any] = {
        "rounds": rounds,
        "answer": answer,
        "loss_terms": {name: statistics.mean(values[1:]) for name, values in terms.items()},
        "positions": {name: statistics.mean(values[1:]) for name, values in positions.items()},
        "seconds": {name: statistics.mean(values) for name, values in times.items()},
    }
    counted = ("loss_terms", "positions", "seconds")
    figures["ratios"] = {name: figures[name]["all blocks"] / figures[name]["one block"] for name in counted}
    return figures


# ---------------------------------------------------------------- sampling


def adapted(name: str, method: str) -> nn.Module:
    """A shipped model, with an adapter that is disturbed as after training."""
    torch.manual_seed(0)
    model: Any = load_backbone(str(ASSETS / name))[0].requires_grad_(False)
    if method != "base":
        model = get_peft_model(model, METHODS[method](r=8, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def measure_sampling(rounds: int) -> dict[str, Any]:
    """Seconds of `generate` for each case and method, and the ratios to LoRA."""
    seconds: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for title, (name, answers, options) in CASES.items():
        models = {method: adapted(name, method) for method in ("base", *METHODS)}
        prompt = torch.randint(5, 200, (answers, 16), generator=torch.Generator().manual_seed(1))
        sampling = {"gen_length": TOKENS, "steps": STEPS, "stop_at_eos": False, **options}
        arms = {method: partial(generate, model, prompt, **sampling) for method, model in models.items()}
        times = in_turn(arms, rounds)
        seconds[title] = {method: statistics.median(values) for method, values in times.items()}
        ratios[title] = {
            "NaRA / LoRA": median_ratio(times["NaRA"], times["LoRA"]),
            "LoRA / base": median_ratio(times["LoRA"], times["base"]),
        }
        print(f"{title}: " + ", ".join(f"{ways} {ratio:.3f}" for ways, ratio in ratios[title].items()), flush=True)
    return {"rounds": rounds, "tokens": TOKENS, "steps": STEPS, "seconds": seconds, "ratios": ratios}


def main(
    part: str = "blocks", rounds: int = 32, answer: int = 1024, output_dir: str = "outputs/benchmarks"
) -> dict[str, Any]:
    """Measure one part; print its figures, save them as JSON and return them."""
    figures = measure_blocks(rounds, answer) if part == "blocks" else measure_sampling(rounds)
    print(figures["ratios"])
    print(f"saved to {save_record(f'benchmark_text_{part}', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
