"""Sampling with an approximate cache: compared with a slow loop that splices keys and values by hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, Qwen2Config, Qwen2ForCausalLM

from nara_diffusion.dllm import generate
from nara_diffusion.dllm.models.model_classes import ShiftedQwen2ForCausalLM
from tests.acceptance._noise_models import Stock
from tests.acceptance._text import backbone, greedy, nara
from tests.helpers.adapted import disturb, lora_config

VOCABULARY, MASK = 40, 39
PROMPTS = [[5, 9, 11], [7, 7, 30, 8, 21, 3], [12]]
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
BLOCKS = {"gen_length": 9, "block_length": 3}
RULES: dict[str, dict[str, Any]] = {
    "two tokens a step": BLOCKS | {"steps": 6},
    "threshold": BLOCKS | {"confidence_threshold": 0.45},
    "one block": {"gen_length": 6, "block_length": 6, "remasking": "entropy"},
}


class Still:
    """A stock model whose weights don't depend on λ."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.double()

    def at(self, level: float) -> Any:
        return self.model


class Spliced:
    """`guided` of a model by hand for one answer: it computes all of the text, and puts keys and values of the block's
    first call in the places that a cache keeps.

    `early` is 1 if position i predicts token i + 1. Keys are those before their rotation, which depends on the position
    only.
    """

    def __init__(self, hand: Any, cache: str, block_length: int, early: int) -> None:
        self.hand, self.cache, self.block_length, self.early = hand, cache, block_length, early
        self.first: dict[nn.Module, Tensor] = {}
        self.block, self.computed, self.handles = -1, slice(None), []
        for name, module in hand.model.named_modules():
            if name.endswith(("k_proj", "v_proj")):
                self.handles.append(module.register_forward_hook(self.splice))

    def splice(self, projection: nn.Module, _: Any, output: Tensor) -> Tensor:
        if self.computed == slice(None):
            self.first[projection] = output.clone()
        spliced = self.first[projection].clone()
        spliced[:, self.computed] = output[:, self.computed]
        return spliced

    @torch.no_grad()
    def guided(self, prompt: list[int], answer: list[int], scale: float, mask: int) -> Tensor:
        block = answer.index(mask) // self.block_length
        start = len(prompt) + block * self.block_length
        end = start + self.block_length if self.cache == "dual" else None
        self.computed = slice(start - self.early, end) if block == self.block else slice(None)
        self.block = block
        logits = self.hand.at(answer.count(mask) / len(answer))(torch.tensor([prompt + answer])).logits[0]
        if self.early:
            logits = torch.cat([torch.full_like(logits[:1], torch.nan), logits[:-1]])
        logits = logits[len(prompt) :]
        logits[:, mask] = -torch.inf
        return logits


def slow_answers(hand: Any, prompts: Sequence[list[int]], mask: int, cache: str, early: int, **rule: Any) -> Any:
    answers = []
    for prompt in prompts:
        spliced: Any = Spliced(hand, cache, rule["block_length"], early)
        answers.append(greedy(spliced, prompt, mask=mask, **rule)[0])
        for handle in spliced.handles:
            handle.remove()
    return answers


def sampled(model: Any, prompts: Sequence[list[int]], **options: Any) -> Any:
    width = max(map(len, prompts))
    rows = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    lengths = list(map(len, prompts))
    result: Any = generate(model, rows, prompt_lengths=lengths, stop_at_eos=False, return_stats=True, **options)
    return result.answers.tolist()


def random_model(family: str) -> Any:
    """A bidirectional model of two layers, as it is loaded; "stock": a Dream without its shift."""
    if family == "llada":
        return backbone(VOCABULARY)
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 64}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=VOCABULARY, **sizes, **heads)
    config.is_causal, config.mask_token_id = False, MASK
    model = (Qwen2ForCausalLM if family == "stock" else ShiftedQwen2ForCausalLM)(config).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def pair(family: str, adapter: str) -> tuple[Any, Any]:
    """A model with an adapter, and its logits by hand."""
    stock = random_model("stock" if family == "dream" else family)
    if adapter == "nara":
        model = nara(random_model(family), target_modules=TARGETS).double()
        return model, Stock(stock, model).double()
    if adapter == "base":
        return random_model(family).double(), Still(stock)
    models = [get_peft_model(model, lora_config(target_modules=TARGETS)) for model in (random_model(family), stock)]
    for model in models:
        disturb(model)
        model.eval().double()
    return models[0], Still(models[1].merge_and_unload())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("family", "adapter", "rule", "cache"),
    [
        ("llada", "nara", "two tokens a step", "prefix"),
        ("llada", "nara", "threshold", "dual"),
        ("llada", "nara", "one block", "prefix"),
        ("llada", "lora", "threshold", "prefix"),
        ("llada", "base", "two tokens a step", "dual"),
        ("dream", "nara", "threshold", "prefix"),
        ("dream", "nara", "threshold", "dual"),
        ("dream", "lora", "two tokens a step", "dual"),
        ("dream", "base", "one block", "prefix"),
    ],
)
def test_cached_answers_match_spliced_keys_and_values(family: str, adapter: str, rule: str, cache: str) -> None:
    model, hand = pair(family, adapter)
    settings, early = RULES[rule], int(family == "dream")
    actual = sampled(model, PROMPTS, cache=cache, **settings)
    assert actual == slow_answers(hand, PROMPTS, MASK, cache, early, **settings)
    assert actual != sampled(model, PROMPTS, **settings)


def test_cache_computes_only_what_its_rule_says() -> None:
    widths: dict[str, list[int]] = {"prefix": [], "dual": []}
    for family, early in (("llada", 0), ("dream", 1)):
        for cache, seen in widths.items():
            model = random_model(family)
            seen.clear()
            model.model.embed_tokens.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].shape[1]))
            sampled(model, PROMPTS, cache=cache, gen_length=6, block_length=3)
        assert widths["prefix"] == [12, 6 + early, 6 + early, 12, 3 + early, 3 + early]
        assert widths["dual"] == [12, 3 + early, 3 + early] * 2


def test_cache_in_eager_attention_gives_the_same_answers() -> None:
    model, same_length = random_model("llada"), [[5, 9, 11], [7, 8, 30]]
    expected = [sampled(model, prompts, cache="dual", **BLOCKS) for prompts in (PROMPTS, same_length)]
    model.set_attn_implementation("eager")
    assert [sampled(model, prompts, cache="dual", **BLOCKS) for prompts in (PROMPTS, same_length)] == expected


def test_cache_that_is_impossible_is_refused_by_name() -> None:
    llada = random_model("llada")
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.mask_token_id = MASK
    bert = BertForMaskedLM(config)
    virtual = get_peft_model(random_model("llada"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for model, options, message in [
        (llada, {"cache": "both"}, "cache is 'both', expected 'prefix' or 'dual'"),
        (llada, {"cfg_scale": 1.0}, r"cache is 'dual' and cfg_scale is 1\.0"),
        (llada, {"block_length": None}, "in any order without blocks: give block_length"),
        (llada, {"use_cache": True}, "leave use_cache out; cache='dual'"),
        (virtual, {}, "virtual tokens before a text: leave cache out"),
        (bert, {}, "BertForMaskedLM keeps no keys and values: leave cache out"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampled(model, PROMPTS, **{"cache": "dual", **BLOCKS, **options})
