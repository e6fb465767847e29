"""The training objective, likelihood and loss over λ are LLaDA's sums, by hand in float64, with the masks drawn.

    L = 1/B Σ_i 1/(λ_i n_i) Σ_{j masked} − log p(x_ij)              log p(x) ≥ − E_k n/k Σ_{j masked} − log p(x_j)

n_i is the length of answer i. The masks are read off the model's own input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import noise_level
from nara_diffusion.dllm import log_likelihood, masked_diffusion_loss, noise_level_curve
from nara_diffusion.dllm.masking import mask_answers
from tests.acceptance._text import END, PAD, ByHand, adapted_pair, bound

VOCABULARY = 30
MASK = VOCABULARY - 1
ROWS = [[5, 9, 11, 4, 6, 20, 8, END, END], [7, 21, 8, 21, 3, END], [12, 4, 9, 25, 16, 10, 17, END]]
PROMPTS = [3, 2, 4]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, ByHand]:
    return adapted_pair(VOCABULARY)


def batch(rows: list[int] | None = None) -> dict[str, Any]:
    """ROWS, or some of them, padded on the right."""
    rows = list(range(len(ROWS))) if rows is None else rows
    width = max(len(ROWS[i]) for i in rows)
    ids = torch.tensor([ROWS[i] + [PAD] * (width - len(ROWS[i])) for i in rows])
    prompts, answers = [PROMPTS[i] for i in rows], [len(ROWS[i]) - PROMPTS[i] for i in rows]
    return {"input_ids": ids, "prompt_lengths": prompts, "answer_lengths": answers}


@contextmanager
def inputs_of(model: Any) -> Iterator[list[list[int]]]:
    """The rows of token ids that the model is given."""
    seen: list[list[int]] = []
    hook = lambda _, args, options: seen.extend((args[0] if args else options["input_ids"]).tolist())  # noqa: E731
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def masked_ids(row: list[int], masked: list[int]) -> list[int]:
    return [MASK if j in masked else token for j, token in enumerate(row)]


def surprise(by_hand: ByHand, row: list[int], masked: list[int], level: float) -> float:
    """Σ − log p of the tokens at the `masked` positions."""
    log_p = by_hand([masked_ids(row, masked)], level)[0].log_softmax(-1)
    return -float(sum(log_p[j, row[j]] for j in masked))


def check_loss(by_hand: ByHand, result: Any, rows: list[int]) -> None:
    """Each share of the loss, and which positions were masked."""
    expected = []
    for i, mask, level in zip(rows, result.masked, result.noise_level.tolist(), strict=True):
        masked = mask.nonzero()[:, 0].tolist()
        assert set(masked) <= set(range(PROMPTS[i], len(ROWS[i])))  # neither prompt nor padding
        expected.append(surprise(by_hand, ROWS[i], masked, level) / level / (len(ROWS[i]) - PROMPTS[i]))
    assert result.per_sample.tolist() == pytest.approx(expected, rel=1e-4)
    assert float(result.loss.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def check_gradients(model: Any, found: Tensor, expected: Tensor) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    for mine, theirs in zip(*(torch.autograd.grad(loss, trained) for loss in (found, expected)), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_loss_at_given_levels_is_the_sum_by_hand(pair: Any) -> None:
    model, by_hand = pair
    levels = torch.tensor([0.9, 0.4, 0.65])
    result = masked_diffusion_loss(model, **batch(), noise_level=levels, seed=4, chunk_size=3)
    assert torch.equal(result.noise_level, levels)
    assert result.masked.any(1).all()
    check_loss(by_hand, result, [0, 1, 2])


def test_loss_draws_one_level_of_each_stratum_however_the_batch_is_split(pair: Any) -> None:
    """As over two processes: λ and masks are those of the sample's place in the stream."""
    model, by_hand = pair
    indices = list(range(8, 16))
    rows = [i % 3 for i in indices]
    options: dict[str, Any] = {"seed": 6, "group_size": 8}
    whole = masked_diffusion_loss(model, **batch(rows), sample_indices=indices, **options)
    check_loss(by_hand, whole, rows)
    strata = ((whole.noise_level.double() - 1e-3) / (1 - 1e-3) * 8).floor().sort().values
    assert strata.tolist() == list(range(8))
    assert whole.noise_level.argsort().tolist() != list(range(8))
    for part in (slice(0, 5), slice(5, 8)):
        half = masked_diffusion_loss(model, **batch(rows[part]), sample_indices=indices[part], **options)
        assert torch.equal(half.noise_level, whole.noise_level[part])
        width = half.masked.shape[1]
        assert torch.equal(half.masked, whole.masked[part, :width])
        assert not whole.masked[part, width:].any()
    other = masked_diffusion_loss(model, **batch(rows), sample_indices=indices, seed=7, group_size=8)
    assert not torch.equal(other.noise_level, whole.noise_level)


@pytest.mark.parametrize("group_size", [1, 8])
def test_masks_given_a_level_cover_each_position_with_that_probability(group_size: int) -> None:
    """In each eighth of λ, within 5 standard deviations: the draw of λ says nothing else about the masks."""
    count, answer = 4000, 3
    rows = torch.zeros(count, 1 + answer, dtype=torch.long)
    indices = list(range(count))
    options: dict[str, Any] = {"seed": 0, "sample_indices": indices, "group_size": group_size}
    batch = mask_answers(rows, [1] * count, mask_token_id=MASK, **options)
    for part in range(8):
        chosen = (part / 8 < batch.noise_level) & (batch.noise_level <= (part + 1) / 8)
        levels = batch.noise_level[chosen].double()
        deviation = (levels * (1 - levels)).sum().sqrt() / len(levels)
        difference = batch.masked[chosen, 1:].double().mean(0) - levels.mean()  # one each position
        assert (difference.abs() <= 5 * deviation).all()


def test_loss_with_complementary_masks_trains_each_token_of_an_answer_once(pair: Any) -> None:
    model, by_hand = pair
    result = masked_diffusion_loss(model, **batch(), seed=2, complementary=True)
    first, second = result.masked.chunk(2)
    answers = [[PROMPTS[i] <= j < len(ROWS[i]) for j in range(first.shape[1])] for i in range(3)]
    assert torch.equal(first ^ second, torch.tensor(answers))
    assert torch.equal(first | second, torch.tensor(answers))
    levels = result.noise_level
    torch.testing.assert_close(levels[3:], 1 - levels[:3])
    assert len(set(levels.tolist())) == 6
    check_loss(by_hand, result, [0, 1, 2, 0, 1, 2])


def answer_bound(row: int, log_p: Callable[[list[int], float], Tensor]) -> Any:
    return bound(ROWS[row][: PROMPTS[row]], ROWS[row][PROMPTS[row] :], MASK, log_p)


@pytest.mark.parametrize(("scale", "cap"), [(0.0, None), (1.5, None), (1.5, 1e9)])
def test_likelihood_of_a_short_answer_is_the_sum_over_all_masks(
    pair: Any, scale: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided, too, in the head and by all logits: under a cap, which is too high to change a thing, `head` is None."""
    model, by_hand = pair
    monkeypatch.setattr(model.get_base_model().config, "final_logit_softcapping", cap, raising=False)
    found = log_likelihood(model, **batch(), samples=70, batch_size=5, cfg_scale=scale)
    assert (found.dtype, found.requires_grad) == (torch.float64, False)
    for i, prompt in enumerate(PROMPTS):

        def log_p(ids: list[int], level: float, prompt: int = prompt) -> Tensor:
            told, blind = by_hand([ids, [MASK] * prompt + ids[prompt:]], level)  # (l, v) each
            return ((1 + scale) * told - scale * blind).log_softmax(-1)

        assert float(found[i]) == pytest.approx(float(answer_bound(i, log_p)), rel=1e-4)


def test_differentiable_likelihood_has_the_gradients_of_plain_forwards(pair: Any) -> None:
    model, _ = pair
    found = log_likelihood(model, **batch(), samples=70, batch_size=5, differentiable=True)

    def log_p(ids: list[int], level: float) -> Tensor:
        with noise_level(model, level):
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    expected = torch.stack([answer_bound(i, log_p) for i in range(3)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    weighting = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    check_gradients(model, (weighting * found).sum(), (weighting * expected).sum())


@pytest.mark.parametrize("differentiable", [False, True])
def test_likelihood_of_a_longer_answer_is_the_mean_over_masks_of_stratified_sizes(
    pair: Any, differentiable: bool
) -> None:
    """10 tokens and 5 masks: a size in each fifth of 1 … 10. The model stays in training where dropout is to act."""
    model, by_hand = pair
    row, prompt, n, modes, sizes = [5, 9, 4, 6, 20, 8, 11, 3, 25, 16, END, END], 2, 10, set(), set()
    options: dict[str, Any] = {"samples": 5, "differentiable": differentiable}
    handle = model.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    model.train()
    for seed in range(3):
        with inputs_of(model) as seen:
            found = log_likelihood(model, torch.tensor([row]), [prompt], batch_size=4, seed=seed, **options).detach()
        masks = [[j for j, token in enumerate(ids) if token == MASK] for ids in seen]
        assert sorted((len(masked) - 1) // 2 for masked in masks) == [0, 1, 2, 3, 4]
        assert all(min(masked) >= prompt for masked in masks)
        terms = [surprise(by_hand, row, masked, len(masked) / n) * n / len(masked) for masked in masks]
        assert float(found) == pytest.approx(-sum(terms) / 5, rel=1e-4)
        sizes |= {*map(len, masks)}
    again = log_likelihood(model, torch.tensor([row, row]), [prompt] * 2, seed=2, sample_indices=[1, 0], **options)
    model.eval()
    handle.remove()
    assert modes == {differentiable}
    assert len(sizes) > 5
    assert [value == pytest.approx(float(found), rel=1e-5) for value in again.tolist()] == [False, True]


def test_curve_at_each_level_is_the_ratio_by_hand(pair: Any) -> None:
    """Σ_i 1/n_i Σ_{j masked} − log p over Σ_i 1/n_i Σ_{j masked} 1; masks grow with λ."""
    model, by_hand = pair
    rows = [{"input_ids": ids, "prompt_length": n} for ids, n in zip(ROWS, PROMPTS, strict=True)]
    levels, masks = [0.2, 0.4, 0.5, 0.6, 0.8, 1.0], []
    with inputs_of(model) as seen:
        curve = noise_level_curve(model, rows, levels, batch_size=2, seed=1, progress=False)
    for number, (level, loss) in enumerate(zip(levels, curve, strict=True)):
        total = count = 0.0
        masks.append([{j for j, token in enumerate(ids) if token == MASK} for ids in seen[3 * number : 3 * number + 3]])
        for row, prompt, masked in zip(ROWS, PROMPTS, masks[-1], strict=True):
            total += surprise(by_hand, row, sorted(masked), level) / (len(row) - prompt)
            count += len(masked) / (len(row) - prompt)
        assert loss == pytest.approx(total / count, rel=1e-4)
    assert masks[-1] == [set(range(n, len(row))) for n, row in zip(PROMPTS, ROWS, strict=True)]
    for fewer, more in pairwise(masks):
        assert all(low <= high for low, high in zip(fewer, more, strict=True))
    assert len({tuple(map(len, sizes)) for sizes in masks}) >= 4


@pytest.mark.parametrize("lengths", [[3], [3, 4, 5], [3.0, 4.0], 3])
def test_loss_refuses_lengths_that_are_not_one_a_row(pair: Any, lengths: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt_lengths is .*: pass a whole number for each of the 2 rows"):
        masked_diffusion_loss(pair[0], torch.ones(2, 9, dtype=torch.long), lengths)
