"""The likelihood is LLaDA's bound, by hand in float64: over all masks of a short answer, or over drawn ones.

log p(x) ≥ − E_k n/k Σ_{j masked} − log p(x_j)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import noise_level
from nara_diffusion.dllm import log_likelihood
from tests.acceptance._text import END, ByHand, adapted_pair, bound
from tests.helpers.answers import MASK, PROMPTS, ROWS, VOCABULARY, batch, inputs_of, surprise


@pytest.fixture(scope="module")
def pair() -> tuple[Any, ByHand]:
    return adapted_pair(VOCABULARY)


@pytest.fixture(scope="module")
def logits(pair: tuple[Any, ByHand]) -> Callable[[tuple[int, ...], int, float], Tensor]:
    """Logits by hand (2, l, v) of ids, and of the ids with their prompt masked; each is computed once."""
    return cache(lambda ids, prompt, level: pair[1]([ids, [MASK] * prompt + [*ids[prompt:]]], level))


def check_gradients(model: Any, found: Tensor, expected: Tensor) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    for mine, theirs in zip(*(torch.autograd.grad(loss, trained) for loss in (found, expected)), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def answer_bound(row: int, log_p: Callable[[list[int], float], Tensor]) -> Any:
    return bound(ROWS[row][: PROMPTS[row]], ROWS[row][PROMPTS[row] :], MASK, log_p)


@pytest.mark.parametrize(("scale", "cap"), [(0.0, None), (1.5, None), (1.5, 1e9)])
def test_likelihood_of_short_answer_sums_all_masks(
    pair: Any, logits: Any, scale: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided, too, in the head and by all logits: under a cap, which is too high to change a thing, `head` is None."""
    model, _ = pair
    monkeypatch.setattr(model.get_base_model().config, "final_logit_softcapping", cap, raising=False)
    actual = log_likelihood(model, **batch(), samples=70, batch_size=5, cfg_scale=scale)
    assert (actual.dtype, actual.requires_grad) == (torch.float64, False)
    for i, prompt in enumerate(PROMPTS):

        def log_p(ids: list[int], level: float, prompt: int = prompt) -> Tensor:
            prompted, blind = logits(tuple(ids), prompt, level)  # (l, v) each
            return ((1 + scale) * prompted - scale * blind).log_softmax(-1)

        assert float(actual[i]) == pytest.approx(float(answer_bound(i, log_p)), rel=1e-4)


def test_differentiable_likelihood_has_the_gradients_of_plain_forwards(pair: Any) -> None:
    model, _ = pair
    actual = log_likelihood(model, **batch(), samples=70, batch_size=5, differentiable=True)

    def log_p(ids: list[int], level: float) -> Tensor:
        with noise_level(model, level):
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    expected = torch.stack([answer_bound(i, log_p) for i in range(3)])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
    weighting = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    check_gradients(model, (weighting * actual).sum(), (weighting * expected).sum())


@pytest.mark.parametrize("differentiable", [False, True])
def test_likelihood_of_longer_answer_averages_stratified_masks(pair: Any, differentiable: bool) -> None:
    """10 tokens and 5 masks: a size in each fifth of 1 … 10. The model stays in training where dropout is to act."""
    model, by_hand = pair
    row, prompt, n, modes, sizes = [5, 9, 4, 6, 20, 8, 11, 3, 25, 16, END, END], 2, 10, set(), set()
    options: dict[str, Any] = {"samples": 5, "differentiable": differentiable}
    handle = model.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    model.train()
    for seed in range(3):
        with inputs_of(model) as seen:
            actual = log_likelihood(model, torch.tensor([row]), [prompt], batch_size=4, seed=seed, **options).detach()
        masks = [[j for j, token in enumerate(ids) if token == MASK] for ids in seen]
        assert sorted((len(masked) - 1) // 2 for masked in masks) == [0, 1, 2, 3, 4]
        assert all(min(masked) >= prompt for masked in masks)
        terms = [surprise(by_hand, row, masked, len(masked) / n) * n / len(masked) for masked in masks]
        assert float(actual) == pytest.approx(-sum(terms) / 5, rel=1e-4)
        sizes |= {*map(len, masks)}
    again = log_likelihood(model, torch.tensor([row, row]), [prompt] * 2, seed=2, sample_indices=[1, 0], **options)
    model.eval()
    handle.remove()
    assert modes == {differentiable}
    assert len(sizes) > 5
    assert [value == pytest.approx(float(actual), rel=1e-5) for value in again.tolist()] == [False, True]
