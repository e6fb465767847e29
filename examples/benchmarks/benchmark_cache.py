"""Tokens a second of `generate` on LLaDA2 and DiffusionGemma, with their cache of clean text and without it.

    python examples/benchmarks/benchmark_cache.py

A random LLaDA2 and a random DiffusionGemma of some 5 M parameters, and a DiffusionGemma twice as wide, with a NaRA on
their attention, generate 64, 256 and 1 024 tokens behind a prompt of 32, in blocks of 32, `steps` steps a block:

    cache       the default of `generate`
    each step   without a cache: every step computes the whole text before its block, too
    each block  DiffusionGemma only: every block starts from the text alone, which is encoded once a block

All ways take turns within a round, after a round at the first length that isn't timed; a ratio is the median of the
rounds' ratios. Seconds are processor time of one thread, which other programs change little. The tokens that the ways
share with the cache's are counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from benchmark_record import median_ratio, one_thread, run_command, save_record, times_in_turn
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    DynamicCache,
    Gemma4VisionConfig,
)

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import generate
from nara_diffusion.dllm.models.checkpoint_formats import LLaDA2MoeConfig
from nara_diffusion.dllm.models.model_classes import LLaDA2ForCausalLM
from nara_diffusion.noise.sources import BLOCK_SHARE

BLOCK = 32
PROMPT = 32
VOCABULARY = 2048
LENGTHS = (64, 256, 1024)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
Ways = Mapping[str, Callable[[], Tensor]]


# ---------------------------------------------------------------- models


def adapted(model: nn.Module, targets: str, **options: Any) -> nn.Module:
    """`model` with a NaRA on q, k, v and o that is disturbed as after training."""
    nara = NaraConfig(r=8, lora_alpha=8, target_modules=rf"{targets}(q_proj|k_proj|v_proj|o_proj)", **options)
    model = get_peft_model(model, nara)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def random_llada2() -> nn.Module:
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        **SHAPE,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        block_length=BLOCK,
        mask_token_id=VOCABULARY - 1,
    )
    config.is_causal = False
    return adapted(LLaDA2ForCausalLM(config), r".*\.layers\..*", noise_convention=BLOCK_SHARE)


def random_diffusion_gemma(times: int = 1) -> nn.Module:
    """A DiffusionGemma whose widths and numbers of heads are those of `SHAPE`, each multiplied."""
    torch.manual_seed(0)
    shape = SHAPE | {name: times * SHAPE[name] for name in WIDTHS}
    text = DiffusionGemmaTextConfig(
        **shape,
        num_global_key_value_heads=shape["num_key_value_heads"],
        global_head_dim=32,
        num_experts=8,
        top_k_experts=2,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        sliding_window=1024,
    )
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 8)
    counts = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    vision = Gemma4VisionConfig(**sizes, **counts, patch_size=2, position_embedding_size=4, pooling_kernel_size=1)
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=BLOCK)
    model = DiffusionGemmaForBlockDiffusion(config)
    return adapted(model, r".*(encoder\.language_model|decoder)\.layers\..*")


# ---------------------------------------------------------------- with the cache and without


@contextmanager
def encoding_each_step(model: Any) -> Iterator[None]:
    """Inside, a DiffusionGemma encodes the whole text before each call of its decoder, and reads no older cache."""
    inner = model.get_base_model()
    forward, encoder, texts = inner.forward, inner.model.encoder, []
    read = encoder.forward

    def reading(**given: Any) -> Any:
        texts.append(given["input_ids"])
        return read(**given)

    def slow(**given: Any) -> Any:
        cache = DynamicCache(config=inner.config.get_text_config())
        text = torch.cat(texts, 1)
        encoder.forward = read
        given["cache"] = encoder(input_ids=text, cache=cache).cache
        encoder.forward = reading
        return forward(**given)

    encoder.forward, inner.forward = reading, slow
    try:
        yield
    finally:
        del encoder.forward, inner.forward


def ways_of_llada2(model: nn.Module, prompt: Tensor, options: dict[str, Any]) -> Ways:
    def answer(use_cache: bool) -> Tensor:
        sequences = generate(model, prompt, use_cache=use_cache, **options)
        assert isinstance(sequences, Tensor)
        return sequences

    return {"cache": lambda: answer(True), "each step": lambda: answer(False)}


def ways_of_gemma(model: nn.Module, prompt: Tensor, options: dict[str, Any]) -> Ways:
    blocks = options["gen_length"] // BLOCK

    def answer(blocks_at_once: int) -> Tensor:
        torch.manual_seed(0)
        text: Any = prompt
        for _ in range(blocks // blocks_at_once):
            lengths = {name: options[name] * blocks_at_once // blocks for name in ("gen_length", "steps")}
            text = generate(model, text, **options | lengths)
        return text

    def slow() -> Tensor:
        with encoding_each_step(model):
            return answer(blocks)

    return {"cache": lambda: answer(blocks), "each step": slow, "each block": lambda: answer(1)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Ways]]] = {
    "llada2": (random_llada2, ways_of_llada2),
    "diffusion_gemma": (random_diffusion_gemma, ways_of_gemma),
    "wide_diffusion_gemma": (partial(random_diffusion_gemma, times=2), ways_of_gemma),
}


def compare(ways: Ways, length: int, rounds: int, warm_up: bool) -> dict[str, Any]:
    """Tokens a second of each way, how much faster the cache is, and the share of tokens that are the cache's."""
    answers: dict[str, Tensor] = {}

    def run(name: str) -> None:
        answers[name] = ways[name]()

    arms = {name: lambda name=name: run(name) for name in ways}
    times = times_in_turn(arms, rounds, time.process_time, warm_up)
    without_cache = [name for name in ways if name != "cache"]
    return {
        "tokens_per_second": {name: length / statistics.median(values) for name, values in times.items()},
        "ratio": {name: median_ratio(times[name], times["cache"]) for name in without_cache},
        "same_tokens": {name: (answers[name] == answers["cache"]).float().mean().item() for name in without_cache},
    }


def main(
    steps: int = 8, rounds: int = 3, lengths: tuple[int, ...] = LENGTHS, output_dir: str = "outputs/benchmarks"
) -> dict[str, Any]:
    """Time all lengths, `steps` steps a block; print a table, save it as JSON, return the figures."""
    prompt = torch.randint(1, VOCABULARY - 1, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    record: dict[str, Any] = {"block": BLOCK, "steps_a_block": steps, "rounds": rounds, "models": {}}
    print("| model | tokens | without | with the cache, a second | without | ratio | same tokens |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for name, (make, ways_of) in MODELS.items():
        model, figures = make(), {}
        with one_thread():
            for length in lengths:
                options = {"gen_length": length, "steps": length // BLOCK * steps, "stop_at_eos": False}
                comparison = compare(ways_of(model, prompt, options), length, rounds, length == lengths[0])
                figures[str(length)] = comparison
                speed = comparison["tokens_per_second"]
                for way, ratio in comparison["ratio"].items():
                    same = comparison["same_tokens"][way]
                    numbers = f"{speed['cache']:.1f} | {speed[way]:.1f} | {ratio:.2f} | {same:.3f}"
                    print(f"| {name} | {length} | {way} | {numbers} |", flush=True)
        parameters = sum(p.numel() for p in model.parameters())
        record["models"][name] = {"parameters": parameters, "lengths": figures}
    print(f"saved to {save_record('benchmark_cache', record, output_dir)}")
    return record


if __name__ == "__main__":
    run_command(main)
