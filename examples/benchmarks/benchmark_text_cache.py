"""Speed and exact match of `generate` on LLaDA and Dream, with its approximate caches and without.

    python examples/benchmarks/benchmark_text_cache.py --part quality
    python examples/benchmarks/benchmark_text_cache.py --part speed

quality: 256 questions for each of llada-tiny and dream-tiny, one token a step, in blocks of 4 and in one block. The
base sorts random letters, which it does imperfectly; LoRA and NaRA answer the shipped task after their fine-tuning.

speed: a random LLaDA of 134 M parameters answers a prompt of 224 tokens with 32 tokens, in one block and one token a
step, as it is and with a LoRA or a NaRA. All ways take turns within a round; a ratio is the median of the rounds'
ratios. Seconds are processor time of one thread, which other programs change little.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_decoding import letters_to_sort
from benchmark_record import median_ratio, one_thread, run_command, save_record, times_in_turn
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import exact_match, generate, load_backbone

sys.path.append(str(Path(__file__).parents[1]))

from shipped_task import ASSETS, GEN_LENGTH, fine_tune, load_rows, make_collator

CACHES = ("none", "prefix", "dual")
METHODS = {"LoRA": LoraConfig, "NaRA": NaraConfig}
BLOCKS = (4, GEN_LENGTH)
PROMPT, ANSWER = 224, 32


def options_of(cache: str, block_length: int) -> dict[str, Any]:
    return {"cache": None if cache == "none" else cache, "block_length": block_length, "stop_at_eos": False}


# ---------------------------------------------------------------- quality


def scores(model: nn.Module, tokenizer: Any, rows: Any, title: str) -> dict[str, dict[str, float]]:
    """{block length: {cache: exact match}}, which are printed too."""
    figures: dict[str, dict[str, float]] = {}
    for block in BLOCKS:
        figures[str(block)] = {}
        for cache in CACHES:
            sampling = {"gen_length": GEN_LENGTH, "batch_size": 64, "progress": False, **options_of(cache, block)}
            figures[str(block)][cache] = exact_match(model, tokenizer, rows, **sampling).score
        numbers = " | ".join(f"{score:.1%}" for score in figures[str(block)].values())
        print(f"| {title} | {block} | {numbers} |", flush=True)
    return figures


def measure_quality(questions: int, steps: int) -> dict[str, Any]:
    """{model: {method: {block length: {cache: exact match}}}}."""
    figures: dict[str, Any] = {}
    print("| model | block | none | prefix | dual |\n|---|---:|---:|---:|---:|")
    for name in ("llada-tiny", "dream-tiny"):
        base, tokenizer = load_backbone(str(ASSETS / name))
        figures[name] = {"base": scores(base, tokenizer, letters_to_sort(tokenizer, questions), f"{name}, base")}
        test = load_rows(tokenizer, "test")
        test = test.select(range(min(questions, len(test))))
        for method, config in METHODS.items():
            torch.manual_seed(0)
            model = load_backbone(str(ASSETS / name))[0]
            adapted = get_peft_model(model, config(r=8, lora_alpha=8, target_modules="all-linear"))
            fine_tune(adapted, load_rows(tokenizer, "train"), make_collator(tokenizer), steps)
            figures[name][method] = scores(adapted, tokenizer, test, f"{name}, {method}")
    return figures


# ---------------------------------------------------------------- speed


def random_llada(method: str, width: int, layers: int) -> nn.Module:
    """A bidirectional Llama, with an adapter on q, k, v and o that is disturbed as after training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=512,
    )
    config.is_causal, config.mask_token_id = False, 31999
    model: Any = LlamaForCausalLM(config).requires_grad_(False)
    if method != "base":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, METHODS[method](r=8, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def measure_speed(rounds: int, width: int, layers: int) -> dict[str, Any]:
    """Seconds of an answer for each method and cache, and their ratios."""
    models = {method: random_llada(method, width, layers) for method in ("base", *METHODS)}
    prompt = torch.randint(31999, (1, PROMPT), generator=torch.Generator().manual_seed(1))

    def run(method: str, cache: str) -> None:
        generate(models[method], prompt, gen_length=ANSWER, **options_of(cache, ANSWER))

    ways = {f"{method} {cache}": (method, cache) for method in models for cache in CACHES}
    arms = {name: lambda way=way: run(*way) for name, way in ways.items()}
    with one_thread():
        for method in models:
            run(method, "dual")  # allocates and fills caches
        times = times_in_turn(arms, rounds, time.process_time, warm_up=False)
    ratios = {}
    for method in models:
        for cache in CACHES[1:]:
            of_none = median_ratio(times[f"{method} {cache}"], times[f"{method} none"])
            ratios[f"{method}: {cache} / none"] = of_none
    for cache in CACHES:
        ratios[f"{cache}: NaRA / LoRA"] = median_ratio(times[f"NaRA {cache}"], times[f"LoRA {cache}"])
    for name, ratio in ratios.items():
        print(f"{name:22s} {ratio:.3f}")
    seconds = {name: statistics.median(values) for name, values in times.items()}
    parameters = sum(parameter.numel() for parameter in models["base"].parameters())
    return {"parameters": parameters, "rounds": rounds, "seconds": seconds, "ratios": ratios}


def main(
    part: str = "quality",
    questions: int = 256,
    steps: int = 400,
    rounds: int = 3,
    width: int = 768,
    layers: int = 12,
    output_dir: str = "outputs/benchmarks",
) -> dict[str, Any]:
    """Measure one part; print its figures, save them as JSON and return them."""
    if part == "quality":
        figures = {"questions": questions, "steps": steps, "exact_match": measure_quality(questions, steps)}
    else:
        figures = measure_speed(rounds, width, layers)
    print(f"saved to {save_record(f'benchmark_text_cache_{part}', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
