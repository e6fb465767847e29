"""The likelihood of answers: exact where their masks are few, the same whatever stands beside them."""

from __future__ import annotations

import itertools
from math import comb

import pytest
import torch
from peft import PeftModel
from torch import nn

from nara_diffusion import noise_level
from nara_diffusion.dllm import log_likelihood
from nara_diffusion.dllm.evaluation.likelihood import all_masks

MASK = 49


@torch.no_grad()
def bound(model: nn.Module, tokens: list[int], prompt_length: int) -> float:
    """The formula, one mask at a time."""
    n = len(tokens) - prompt_length
    total = 0.0
    for k in range(1, n + 1):
        for subset in itertools.combinations(range(prompt_length, len(tokens)), k):
            corrupted = torch.tensor([[MASK if j in subset else token for j, token in enumerate(tokens)]])
            with noise_level(model, k / n):
                log_p = model(corrupted).logits[0].double().log_softmax(-1)
            total += sum(log_p[j, tokens[j]].item() for j in subset) * n / k / comb(n, k) / n
    return total


def count_sequences(model: nn.Module) -> list[int]:
    """How many sequences each forward from now on has."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def test_few_tokens_are_scored_exactly_and_by_as_many_sequences_as_they_have_masks(adapted_llama: PeftModel) -> None:
    input_ids = torch.tensor([[5, 6, 7, 8, 9, 0, 0], [5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 1, 0, 0, 0]])
    seen = count_sequences(adapted_llama)
    actual = log_likelihood(adapted_llama, input_ids, [2, 4, 3], answer_lengths=[3, 3, 1], samples=7)
    assert sum(seen) == 7 + 7 + 1
    rows = ([5, 6, 7, 8, 9], 2), ([5, 6, 7, 8, 9, 10, 11], 4), ([5, 6, 7, 1], 3)
    expected = torch.tensor([bound(adapted_llama, *row) for row in rows], dtype=torch.float64)
    assert torch.allclose(actual, expected, rtol=1e-5)


def test_one_sample_fewer_than_there_are_masks_is_an_estimate(adapted_llama: PeftModel) -> None:
    input_ids = torch.tensor([[5, 6, 7, 8, 9]])
    exact = bound(adapted_llama, [5, 6, 7, 8, 9], 2)
    estimates = [log_likelihood(adapted_llama, input_ids, [2], samples=6, seed=seed).item() for seed in range(3)]
    assert len(set(estimates)) == 3
    assert exact not in estimates


def test_a_row_does_not_depend_on_those_beside_it(adapted_llama: PeftModel) -> None:
    long = torch.randint(1, MASK, (2, 16), generator=torch.Generator().manual_seed(0))
    options = {"samples": 20, "seed": 3}
    both = log_likelihood(
        adapted_llama, long, [2, 5], answer_lengths=[12, 11], sample_indices=[4, 4], batch_size=7, **options
    )
    one = log_likelihood(adapted_llama, long[:1, :14], [2], sample_indices=[4], batch_size=20, **options)
    other = log_likelihood(adapted_llama, long[1:], [5], sample_indices=[4], batch_size=1, **options)
    assert torch.allclose(both, torch.cat([one, other]), rtol=1e-6)


def test_rows_of_one_index_are_compared_on_the_same_masks(adapted_llama: PeftModel) -> None:
    tokens = torch.randint(1, MASK, (1, 14), generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    same = log_likelihood(adapted_llama, tokens, [2, 2, 2], samples=9, sample_indices=[1, 1, 2])
    assert same[0] == pytest.approx(same[1].item(), rel=1e-6)
    assert same[0] != pytest.approx(same[2].item(), rel=1e-4)


def test_a_prompt_may_be_empty(adapted_llama: PeftModel) -> None:
    actual = log_likelihood(adapted_llama, torch.tensor([[5, 6, 7]]), [0], samples=8)
    assert actual.item() == pytest.approx(bound(adapted_llama, [5, 6, 7], 0), rel=1e-5)


def test_all_masks_are_all_subsets_with_probabilities_that_sum_to_one() -> None:
    answer = torch.tensor([False, True, True, False, True])
    masks, probabilities = all_masks(answer)
    subsets = {tuple(mask.nonzero()[:, 0].tolist()) for mask in masks}
    assert subsets == {s for k in (1, 2, 3) for s in itertools.combinations((1, 2, 4), k)}
    assert len(masks) == 7
    assert probabilities.sum().item() == pytest.approx(1)
    by_count = {k: probabilities[masks.sum(1) == k].sum().item() for k in (1, 2, 3)}
    assert by_count == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1 / 3})


def test_sample_indices_are_one_a_row(adapted_llama: PeftModel) -> None:
    with pytest.raises(ValueError, match="sample_indices has 1 values, input_ids 2 rows"):
        log_likelihood(adapted_llama, torch.ones(2, 4, dtype=torch.long), [1, 1], sample_indices=[0])
