"""The shipped model with an adapter, as lm-eval loads and asks it, and its logits at one λ."""

from __future__ import annotations

from pathlib import Path

import torch
from lm_eval.api.instance import Instance

from nara_diffusion import noise_level
from nara_diffusion.harness.model import NaraDLLM

from .conftest import LLADA_TINY


def load(adapter: Path) -> NaraDLLM:
    return NaraDLLM(str(LLADA_TINY), str(adapter), batch_size=3, device="cpu")


def as_loaded(harness: NaraDLLM) -> NaraDLLM:
    """Its settings are what they are for every test, whatever the one before made of them."""
    harness.has_template, harness.greedy, harness.samples, harness.max_length = False, True, 128, 64
    return harness


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=args, idx=i, metadata=("t", i, 1)) for i, args in enumerate(arguments)]


@torch.no_grad()
def logits_at(harness: NaraDLLM, tokens: list[int], level: float) -> torch.Tensor:
    with noise_level(harness.model, level):
        return harness.model(torch.tensor([tokens])).logits[0].double()
