"""Forwards a token and exact match of each rule by which `generate` places tokens, on the shipped model.

    python examples/benchmarks/benchmark_decoding.py

Two sets of questions: two-step, the shipped task, after a NaRA's fine-tuning, and random letters to be sorted, which
llada-tiny without an adapter does imperfectly. Greedily, in one block. One forward a token is the rule of LLaDA's
algorithm; rules with fewer place several tokens at once. Each answer is generated alone, so that the forwards are its
own.
"""

from __future__ import annotations

import random
import string
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark_record import run_command, save_record
from datasets import Dataset
from peft import get_peft_model

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import encode_records, exact_match

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


def letters_to_sort(tokenizer: Any, n: int) -> Any:
    """n questions such as "sort: qdkwpe"."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(6, 9))) for _ in range(n)]
    answers = ["".join(sorted(word)) for word in words]
    texts = {
        "instruction": [f"sort: {word}" for word in words],
        "input": [""] * n,
        "output": answers,
        "answer": answers,
    }
    return encode_records(Dataset.from_dict(texts), tokenizer, max_length=64).rows


def main(questions: int = 200, steps: int = 400, output_dir: str = "outputs/benchmarks") -> dict[str, Any]:
    """Answer `questions` of each set by each rule; print forwards and exact match, save and return them."""
    torch.manual_seed(0)
    model, tokenizer = load_shipped_model()
    figures: dict[str, Any] = {"sort": compare_rules(model, tokenizer, letters_to_sort(tokenizer, questions))}
    model = get_peft_model(model, NaraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    fine_tune(model, load_rows(tokenizer, "train"), make_collator(tokenizer), steps)
    rows = load_rows(tokenizer, "test")
    figures["two-step"] = compare_rules(model, tokenizer, rows.select(range(min(questions, len(rows)))))
    record = {"questions": questions, "steps": steps, "rules": figures}
    print(f"saved to {save_record('benchmark_decoding', record, output_dir)}")
    return record


def compare_rules(model: Any, tokenizer: Any, rows: Any) -> dict[str, dict[str, float]]:
    """{rule: {"forwards" a token, "exact_match"}}, which are printed too."""
    figures = {}
    alone: dict[str, Any] = {"gen_length": GEN_LENGTH, "batch_size": 1, "stop_at_eos": False, "progress": False}
    print(f"\n{len(rows)} questions like {rows[0]['instruction']!r}, {GEN_LENGTH} tokens each\n")
    print("| rule | forwards a token | exact match |\n|---|---:|---:|")
    for name, rule in RULES.items():
        result = exact_match(model, tokenizer, rows, **alone, **rule, generator=torch.Generator().manual_seed(0))
        figures[name] = {"forwards": result.forwards / len(rows) / GEN_LENGTH, "exact_match": result.score}
        print(f"| {name} | {figures[name]['forwards']:.2f} | {result.score:.1%} |", flush=True)
    return figures


if __name__ == "__main__":
    run_command(main)
