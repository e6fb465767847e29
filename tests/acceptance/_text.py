"""A small masked-diffusion Llama with a NaRA adapter, and LLaDA's sampler and likelihood for it by hand, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

from tests.acceptance._noise_models import Stock
from tests.helpers.adapted import adapted

END, PAD = 1, 2
LLADA_TINY, DREAM_TINY = (
    str(Path(__file__).parents[2] / "examples" / "assets" / name) for name in ("llada-tiny", "dream-tiny")
)
DREAM_MASK, DREAM_BOS = 283, 278


def backbone(vocab_size: int, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A bidirectional Llama of two layers with grouped heads, whose last token is the mask."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": END, "pad_token_id": PAD}
    config = LlamaConfig(vocab_size=vocab_size, **{**sizes, **changes})
    config.is_causal, config.mask_token_id = False, vocab_size - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


def nara(model: LlamaForCausalLM, **changes: Any) -> PeftModel:
    """`model` with an adapter whose A, B and C(λ) have moved far from their start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        return adapted(model, **{**options, **changes})


class ByHand(Stock):
    """Logits in float64 of an adapted Llama, for tokens without padding."""

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[int]], level: float) -> Tensor:
        """(n, l, v) of n rows of one length."""
        return self.at(level)(torch.tensor(rows)).logits

    def guided(self, prompt: list[int], answer: list[int], scale: float, mask: int) -> Tensor:
        """(g, v) at the answer, λ being its masked share; the mask itself is no prediction."""
        level, blind = answer.count(mask) / len(answer), [mask] * len(prompt)
        prompted, free = self([prompt + answer, blind + answer], level)[:, len(prompt) :]
        logits = (1 + scale) * prompted - scale * free
        logits[:, mask] = -torch.inf
        return logits


class DreamByHand(ByHand):
    """Logits of token i of the shipped Dream, which stock Qwen2 has at i − 1; the first has none."""

    def __init__(self) -> None:
        self.model = Qwen2ForCausalLM.from_pretrained(DREAM_TINY).eval().double()

    def at(self, level: float) -> Any:
        return self.model

    def __call__(self, rows: Sequence[Sequence[int]], level: float) -> Tensor:
        logits = super().__call__(rows, level)
        return torch.cat([torch.full_like(logits[:, :1], torch.nan), logits[:, :-1]], 1)


def adapted_pair(vocab_size: int) -> tuple[Any, ByHand]:
    """An adapted model, and its logits by hand."""
    model = nara(backbone(vocab_size))
    return model, ByHand(backbone(vocab_size), model).double()


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def nucleus(row: list[float], top_p: float) -> list[float]:
    """Probabilities of the fewest likeliest tokens that have top_p together."""
    p, chosen_tokens, total = softmax(row), [], 0.0
    for token in sorted(range(len(row)), key=lambda t: -p[t]):
        chosen_tokens.append(token)
        total += p[token]
        if total > top_p:
            break
    return [p[t] / total if t in chosen_tokens else 0.0 for t in range(len(row))]


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def score(remasking: str, p: list[float], q: list[float], token: int) -> float:
    first, second = sorted(q, reverse=True)[:2]
    scores = {"low_confidence": p[token], "maskgit_plus": q[token], "topk_margin": first - second}
    return -entropy(q) if remasking == "entropy" else scores[remasking]


def chosen(rows: list[list[float]], count: int, last: Sequence[int] = (), **settings: Any) -> dict[int, int]:
    """{place: token} for the logits of all masked places of one row, at temperature 0."""
    remasking = settings.get("remasking", "low_confidence")
    candidates = []
    for place, logits in enumerate(rows):
        token = max(range(len(logits)), key=lambda t: logits[t])
        without = [-50.0 if t in last else x for t, x in enumerate(logits)]
        p, q = softmax(without), nucleus(without, settings.get("top_p", 1.0))
        rank = 0.0 if token in last else -score(remasking, p, q, token)
        candidates.append((token in last, rank, place, token, p[token], entropy(q)))
    candidates.sort()
    n = 1
    for m in range(2, len(candidates) + 1):
        is_end, confidence, entropies = candidates[m - 1][0], candidates[m - 1][4], [one[5] for one in candidates[:m]]
        if "confidence_threshold" in settings:
            fits = confidence > settings["confidence_threshold"] and not is_end
        elif "factor" in settings:
            fits = (m + 1) * (1 - confidence) < settings["factor"] and not is_end
        elif "entropy_bound" in settings:
            fits = sum(entropies) - max(entropies) <= settings["entropy_bound"]
        else:
            fits = m <= count
        if not fits:
            break
        n = m
    return {place: token for _, _, place, token, _, _ in candidates[:n]}


def greedy(
    model: ByHand,
    prompt: list[int],
    *,
    gen_length: int,
    mask: int,
    block_length: int,
    steps: int | None = None,
    cfg_scale: float = 0.0,
    ends: Sequence[int] = (),
    **rule: Any,
) -> tuple[list[int], list[float]]:
    """The answer of LLaDA's algorithm 5 without noise, by a rule of `chosen`; and λ before each step."""
    answer, levels, blocks = [mask] * gen_length, [], gen_length // block_length
    for block in range(blocks):
        places = range(block * block_length, (block + 1) * block_length)
        counts = [len(part) for part in torch.zeros(block_length).tensor_split((steps or gen_length) // blocks)]
        while masked := [j for j in places if answer[j] == mask]:
            levels.append(answer.count(mask) / gen_length)
            logits = model.guided(prompt, answer, cfg_scale, mask)[masked].tolist()
            for place, token in chosen(logits, counts.pop(0), **rule).items():
                answer[masked[place]] = token
            end = next((j for j, token in enumerate(answer) if token in (*ends, mask)), gen_length)
            if end < gen_length and answer[end] != mask:
                answer[end:] = [answer[end]] * (gen_length - end)
    return answer, levels


def bound(prompt: list[int], answer: list[int], mask: int, log_p: Callable[[list[int], float], Tensor]) -> Any:
    """The likelihood bound as the sum over all masks of an answer, by the log-probabilities (l, v) of (ids, λ)."""
    n, total = len(answer), 0.0
    for masked in product((False, True), repeat=n):
        if k := sum(masked):
            visible = [mask if hidden else token for hidden, token in zip(masked, answer, strict=True)]
            log_answer = log_p(prompt + visible, k / n)[len(prompt) :]
            total = total + sum(log_answer[j, answer[j]] for j in range(n) if masked[j]) / k / comb(n, k)
    return total


# ---------------------------------------------------------------- a tokenizer of whole words

TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] + ' <turn> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)
SPECIAL = ["<unk>", "<end>", "<pad>", "<user>", "<bot>", "<turn>"]


def word_tokenizer(size: int, *, chat: bool) -> PreTrainedTokenizerBase:
    """Ids 0 to 5 are SPECIAL, the last is <mask>, and "w6", "w7", … lie between."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(6, size - 1)), "<mask>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<pad>", "mask_token": "<mask>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer
