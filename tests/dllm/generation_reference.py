"""LLaDA's sampler for one prompt at a time, in plain loops, written from the paper's algorithms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def reference_generate(
    logits_of: Callable[[list[int], float], torch.Tensor],
    prompt: list[int],
    *,
    gen_length: int,
    steps: int,
    block_length: int,
    mask: int,
    remasking: str = "low_confidence",
    cfg_scale: float = 0.0,
    temperature: float = 0.0,
    threshold: float | None = None,
    ends: tuple[int, ...] = (),
    uniform: Callable[[str, int], torch.Tensor] | None = None,
) -> tuple[list[int], list[float]]:
    """The answer, and the λ of every forward.

    Args:
        logits_of: (tokens, λ) → (len(tokens), v) float64.
        uniform: ("gumbel" or "random", forward's number) → this row's uniform numbers, (block, v) or (block,).
    """
    answer = [mask] * gen_length
    levels: list[float] = []
    blocks = gen_length // block_length
    per_block = steps // blocks
    for block in range(blocks):
        columns = range(block * block_length, (block + 1) * block_length)
        for step in range(block_length if threshold is not None else per_block):
            places = block_length // per_block + (step < block_length % per_block)
            open_columns = [j for j in columns if answer[j] == mask]
            if not open_columns or (threshold is None and places == 0):
                continue
            level = answer.count(mask) / gen_length
            number = len(levels)
            levels.append(level)
            logits = logits_of(prompt + answer, level)
            if cfg_scale > 0:
                free = logits_of([mask] * len(prompt) + answer, level)
                logits = free + (cfg_scale + 1) * (logits - free)
            candidates = []
            for j in open_columns:
                row = logits[len(prompt) + j].clone()
                row[mask] = -math.inf
                if temperature > 0:
                    u = uniform("gumbel", number)[j - columns.start]
                    token = int((row.exp() / (-u.log()) ** temperature).argmax())
                else:
                    token = int(row.argmax())
                probability = float(row.softmax(0)[token])
                if remasking == "random":
                    probability = float(uniform("random", number)[j - columns.start])
                candidates.append((probability, j, token))
            candidates.sort(reverse=True)
            if threshold is None:
                kept = candidates[:places]
            else:
                kept = candidates[:1] + [c for c in candidates[1:] if c[0] > threshold]
            for _, j, token in kept:
                answer[j] = token
            first = next((j for j, token in enumerate(answer) if token in ends), None)
            if first is not None and mask not in answer[:first]:
                answer[first:] = [answer[first]] * (gen_length - first)
    return answer, levels
