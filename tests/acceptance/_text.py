"""A small masked-diffusion Llama with a NaRA adapter, and LLaDA's sampler for it by hand, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.acceptance._noise_models import Stock
from tests.helpers.adapted import adapted

END, PAD = 1, 2


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
        told, free = self([prompt + answer, blind + answer], level)[:, len(prompt) :]
        logits = (1 + scale) * told - scale * free
        logits[:, mask] = -torch.inf
        return logits


def adapted_pair(vocab_size: int) -> tuple[Any, ByHand]:
    """An adapted model, and its logits by hand."""
    model = nara(backbone(vocab_size))
    return model, ByHand(backbone(vocab_size), model).double()


def greedy(
    model: ByHand,
    prompt: list[int],
    *,
    gen_length: int,
    mask: int,
    block_length: int,
    steps: int | None = None,
    cfg_scale: float = 0.0,
    confidence_threshold: float | None = None,
    ends: Sequence[int] = (),
) -> tuple[list[int], list[float]]:
    """The answer of LLaDA's algorithm 5 without noise, remasking by low confidence; and λ before each step."""
    answer, levels, blocks = [mask] * gen_length, [], gen_length // block_length
    for block in range(blocks):
        places = range(block * block_length, (block + 1) * block_length)
        of_block = block_length if steps is None else steps // blocks
        counts = [len(part) for part in torch.zeros(block_length).tensor_split(of_block)]
        while any(answer[j] == mask for j in places):
            levels.append(answer.count(mask) / gen_length)
            probabilities, tokens = model.guided(prompt, answer, cfg_scale, mask).softmax(-1).max(-1)
            open_places = sorted((j for j in places if answer[j] == mask), key=lambda j: -probabilities[j])
            if confidence_threshold is None:
                kept = open_places[: counts.pop(0)]
            else:
                kept = [j for j in open_places if probabilities[j] > confidence_threshold] or open_places[:1]
            for j in kept:
                answer[j] = int(tokens[j])
            end = next((j for j, token in enumerate(answer) if token in (*ends, mask)), gen_length)
            if end < gen_length and answer[end] != mask:
                answer[end:] = [answer[end]] * (gen_length - end)
    return answer, levels


def two_tokens(
    model: ByHand, prompt: list[int], *, mask: int, remasking: str, temperature: float, cfg_scale: float
) -> Tensor:
    """The probability (v, v) of each answer of two tokens, sampled in two steps."""

    def sampled(answer: list[int]) -> tuple[Tensor, Tensor]:
        """The distributions (2, v) that tokens are drawn from, and by which their confidence is judged."""
        logits = model.guided(prompt, answer, cfg_scale, mask)
        confidence = logits.softmax(-1)
        if temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double(), confidence
        return (logits / temperature).softmax(-1), confidence

    drawn, confidence = sampled([mask, mask])
    vocabulary = range(drawn.shape[1])
    joint = torch.zeros(len(vocabulary), len(vocabulary), dtype=torch.float64)
    first = torch.zeros(2, len(vocabulary), dtype=torch.float64)  # that this token stays at this place in step 1
    for x, y in product(vocabulary, vocabulary):
        wins = 0.5 if remasking == "random" else float(confidence[0, x] > confidence[1, y])
        first[0, x] += drawn[0, x] * drawn[1, y] * wins
        first[1, y] += drawn[0, x] * drawn[1, y] * (1 - wins)
    for token in vocabulary:
        if token != mask:
            joint[token, :] += first[0, token] * sampled([token, mask])[0][1]
            joint[:, token] += first[1, token] * sampled([mask, token])[0][0]
    return joint
