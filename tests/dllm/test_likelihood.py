"""`log_likelihood` with guidance and with gradients, against a float64 sum over all masks of an answer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import noise_level
from nara_diffusion.dllm import log_likelihood
from tests.acceptance._text import PAD, ByHand, adapted_pair, backbone, nara

VOCABULARY = 30
MASK = VOCABULARY - 1
ROWS = [[5, 9, 11, 4, 6, 20, 8, 7, 1], [7, 21, 8, 21, 3, 1], [12, 4, 9, 25, 16, 10, 17]]
PROMPTS = [5, 2, 4]
LENGTHS = [len(row) - prompt for row, prompt in zip(ROWS, PROMPTS, strict=True)]
IDS = torch.tensor([row + [PAD] * (9 - len(row)) for row in ROWS])


@pytest.fixture(scope="module")
def pair() -> tuple[Any, ByHand]:
    return adapted_pair(VOCABULARY)


def bound(row: list[int], prompt: int, log_p: Callable[[list[int], list[int], float], Tensor]) -> Any:
    """The sum over all masks of an answer, by the log-probabilities (l, v) of (masked row, masked places, λ)."""
    places, total = range(prompt, len(row)), 0.0
    for bits in product((False, True), repeat=len(places)):
        masked = [j for j, bit in zip(places, bits, strict=True) if bit]
        if k := len(masked):
            ids = [MASK if j in masked else token for j, token in enumerate(row)]
            own = log_p(ids, masked, k / len(places))
            total = total + sum(own[j, row[j]] for j in masked) / k / comb(len(places), k)
    return total


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_guided_likelihood_combines_the_logits_of_both_halves_at_one_level(pair: Any, scale: float) -> None:
    model, by_hand = pair
    found = log_likelihood(model, IDS, PROMPTS, answer_lengths=LENGTHS, samples=16, batch_size=4, cfg_scale=scale)
    for value, row, prompt in zip(found.tolist(), ROWS, PROMPTS, strict=True):

        def log_p(ids: list[int], _: list[int], level: float, prompt: int = prompt) -> Tensor:
            told, blind = by_hand([ids, [MASK] * prompt + ids[prompt:]], level)  # (l, v) each
            return ((1 + scale) * told - scale * blind).log_softmax(-1)

        assert value == pytest.approx(float(bound(row, prompt, log_p)), rel=1e-4)


def test_guidance_with_the_loss_in_the_head_is_that_of_all_logits_and_of_an_adapted_head(pair: Any) -> None:
    base = backbone(VOCABULARY)
    values = []
    for capped in (None, 1e9):  # a cap so high that it changes nothing makes `Backbone.head` None
        base.config.final_logit_softcapping = capped
        options: dict[str, Any] = {"answer_lengths": LENGTHS, "samples": 16, "cfg_scale": 0.7}
        values.append(log_likelihood(base, IDS, PROMPTS, **options))
    torch.testing.assert_close(*values)
    base.config.final_logit_softcapping = None
    torch.manual_seed(0)
    on_head = nara(base, target_modules=["q_proj", "lm_head"])
    with on_head.disable_adapter():
        torch.testing.assert_close(log_likelihood(on_head, IDS, PROMPTS, **options), values[0], rtol=1e-5, atol=1e-4)
    assert not torch.allclose(log_likelihood(on_head, IDS, PROMPTS, **options), values[0], rtol=1e-2)


def test_differentiable_likelihood_has_the_gradients_of_plain_forwards(pair: Any) -> None:
    model, _ = pair
    trained = [p for p in model.parameters() if p.requires_grad]
    weighting = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    options: dict[str, Any] = {"answer_lengths": LENGTHS, "samples": 16, "batch_size": 5}
    found = log_likelihood(model, IDS, PROMPTS, **options, differentiable=True)
    plain = log_likelihood(model, IDS, PROMPTS, **options)
    assert not plain.requires_grad
    torch.testing.assert_close(found.detach(), plain)

    def log_p(ids: list[int], _: list[int], level: float) -> Tensor:
        with noise_level(model, level):
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    expected = torch.stack([bound(row, prompt, log_p) for row, prompt in zip(ROWS, PROMPTS, strict=True)])
    for mine, theirs in zip(
        torch.autograd.grad((weighting * found).sum(), trained),
        torch.autograd.grad((weighting * expected).sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_differentiable_likelihood_leaves_the_model_in_training_with_stratified_counts(pair: Any) -> None:
    """So that dropout and checkpointing act; 12 tokens and 4 samples: one count in each quarter of 1 … 12."""
    model, _ = pair
    ids = torch.randint(6, MASK, (2, 14), generator=torch.Generator().manual_seed(1))
    modes, counts = [], []

    def note(module: Any, args: Any) -> None:
        modes.append(module.training)
        counts.extend((args[0] == MASK).sum(1).tolist())

    handle = model.register_forward_pre_hook(note)
    model.train()
    for seed in range(3):
        log_likelihood(model, ids, [2, 2], samples=4, seed=seed, differentiable=True)
    model.eval()
    handle.remove()
    assert all(modes)
    for start in range(0, len(counts), 4):
        assert sorted((count - 1) // 3 for count in counts[start : start + 4]) == [0, 1, 2, 3]
    assert len(set(counts)) > 4
