"""Forwards a token and exact match of each rule by which `generate` places tokens, on the shipped task.

    python examples/benchmarks/benchmark_decoding.py

llada-tiny with a NaRA that is fine-tuned on two-step first, greedily, in one block. One forward a token is the rule of
LLaDA's algorithm; rules with fewer place several tokens at once. Each answer is generated alone, so that the forwards
are its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from benchmark_record import run_command, save_record
from peft import get_peft_model

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import exact_match

sys.path.append(str(Path(__file__).parents[1]))

from shipped_task import GEN_LENGTH, fine_tune, load_rows, load_shipped_model, make_collator

RULES: dict[str, dict[str, Any]] = {
    "one a step, by confidence": {},
    "one a step, by entropy": {"remasking": "entropy"},
    "one a step, by margin": {"remasking": "topk_margin"},
    "one a step, at random": {"remasking": "random"},
    "two a step": {"steps": GEN_LENGTH // 2},
    "three a step": {"steps": GEN_LENGTH // 3},
    "four a step": {"steps": GEN_LENGTH // 4},
    **{f"confidence above {c}": {"confidence_threshold": c} for c in (0.99, 0.9, 0.7)},
    **{f"factor {f}": {"factor": f} for f in (0.1, 0.5, 1.0)},
    **{f"entropy bound {g}": {"entropy_bound": g} for g in (0.01, 0.1, 0.5)},
}


def main(questions: int = 200, steps: int = 400, output_dir: str = "outputs/benchmarks") -> dict[str, Any]:
    """Fine-tune for `steps`, answer `questions` by each rule; print forwards and exact match, save and return them."""
    torch.manual_seed(0)
    base, tokenizer = load_shipped_model()
    model = get_peft_model(base, NaraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    fine_tune(model, load_rows(tokenizer, "train"), make_collator(tokenizer), steps)
    rows = load_rows(tokenizer, "test")
    rows = rows.select(range(min(questions, len(rows))))
    figures = {}
    alone: dict[str, Any] = {"gen_length": GEN_LENGTH, "batch_size": 1, "stop_at_eos": False, "progress": False}
    print(
        f"{len(rows)} questions, {GEN_LENGTH} tokens each\n| rule | forwards a token | exact match |\n|---|---:|---:|"
    )
    for name, rule in RULES.items():
        result = exact_match(model, tokenizer, rows, **alone, **rule, generator=torch.Generator().manual_seed(0))
        figures[name] = {"forwards": result.forwards / len(rows) / GEN_LENGTH, "exact_match": result.score}
        print(f"| {name} | {figures[name]['forwards']:.2f} | {result.score:.1%} |", flush=True)
    record = {"questions": len(rows), "steps": steps, "rules": figures}
    print(f"saved to {save_record('benchmark_decoding', record, output_dir)}")
    return record


if __name__ == "__main__":
    run_command(main)
