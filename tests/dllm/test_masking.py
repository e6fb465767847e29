"""Which positions get masked, at which λ, from which random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nara_diffusion.dllm.masking import MIN_NOISE_LEVEL, answer_positions, draw_noise_levels, mask_answers
from nara_diffusion.dllm.noise_conditioning import mask_density

MASK = 99


def tokens(b: int, width: int) -> torch.Tensor:
    return torch.randint(0, MASK, (b, width))


def test_prompt_and_padding_are_never_masked() -> None:
    input_ids = tokens(3, 20)
    prompt_lengths, ends = [4, 0, 9], [20, 11, 13]
    attention_mask = torch.tensor([[int(j < end) for j in range(20)] for end in ends])
    seen = torch.zeros(3, 20, dtype=torch.bool)
    for seed in range(200):
        batch = mask_answers(
            input_ids, prompt_lengths, mask_token_id=MASK, attention_mask=attention_mask, seed=seed, complementary=True
        )
        for row in range(6):
            start, end = prompt_lengths[row % 3], ends[row % 3]
            outside = [j for j in range(20) if not start <= j < end]
            assert not batch.masked[row, outside].any()
        assert torch.equal(batch.input_ids == MASK, batch.masked)
        assert torch.equal(batch.input_ids[~batch.masked], batch.targets[~batch.masked])
        assert torch.equal(batch.targets, input_ids.repeat(2, 1))
        seen |= batch.masked[:3]
    expected = answer_positions(input_ids, prompt_lengths, attention_mask=attention_mask)
    assert torch.equal(seen, expected)


def test_answer_lengths_and_attention_mask_say_the_same() -> None:
    input_ids = tokens(2, 10)
    attention_mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    by_mask = mask_answers(input_ids, [3, 2], mask_token_id=MASK, attention_mask=attention_mask, seed=1)
    by_length = mask_answers(input_ids, [3, 2], mask_token_id=MASK, answer_lengths=[7, 4], seed=1)
    assert torch.equal(by_mask.input_ids, by_length.input_ids)
    assert torch.equal(by_length.attention_mask, attention_mask)


def test_masks_are_bernoulli_at_the_noise_level() -> None:
    levels = torch.tensor([0.1, 0.35, 0.8])
    input_ids = tokens(3, 4000)
    batch = mask_answers(input_ids, [0, 0, 0], mask_token_id=MASK, noise_level=levels, seed=3)
    shares = batch.masked.double().mean(1)
    assert torch.allclose(shares, levels.double(), atol=4 * (0.25 / 4000) ** 0.5)


def test_a_sample_has_the_same_masks_in_any_batch_order_and_padding() -> None:
    input_ids = tokens(4, 12)
    whole = mask_answers(
        input_ids, [2, 5, 1, 0], mask_token_id=MASK, seed=8, sample_indices=[40, 41, 42, 43], group_size=4
    )
    part = mask_answers(input_ids[[3, 1]], [0, 5], mask_token_id=MASK, seed=8, sample_indices=[43, 41], group_size=4)
    assert torch.equal(part.masked, whole.masked[[3, 1]])
    assert torch.equal(part.noise_level, whole.noise_level[[3, 1]])
    wider = torch.cat([input_ids, torch.zeros(4, 5, dtype=torch.long)], 1)
    padded = mask_answers(
        wider,
        [2, 5, 1, 0],
        mask_token_id=MASK,
        seed=8,
        sample_indices=[40, 41, 42, 43],
        group_size=4,
        answer_lengths=[10, 7, 11, 12],
    )
    assert torch.equal(padded.masked[:, :12], whole.masked)
    shifted = mask_answers(
        torch.cat([torch.zeros(4, 3, dtype=torch.long), input_ids], 1),
        [5, 8, 4, 3],
        mask_token_id=MASK,
        seed=8,
        sample_indices=[40, 41, 42, 43],
        group_size=4,
    )
    assert torch.equal(shifted.masked[:, 3:], whole.masked)


def test_seed_index_and_generator_matter() -> None:
    input_ids = tokens(2, 40)

    def masks(**kwargs) -> torch.Tensor:
        return mask_answers(input_ids, [0, 0], mask_token_id=MASK, noise_level=0.5, **kwargs).masked

    reference = masks(seed=1, sample_indices=[5, 6])
    assert torch.equal(reference, masks(seed=1, sample_indices=[5, 6]))
    assert not torch.equal(reference, masks(seed=2, sample_indices=[5, 6]))
    assert not torch.equal(reference[0], masks(seed=1, sample_indices=[7, 6])[0])
    first = masks(generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, masks(generator=torch.Generator().manual_seed(4)))
    assert not torch.equal(first, masks(generator=torch.Generator().manual_seed(5)))
    torch.manual_seed(11)
    by_global_state = masks()
    assert not torch.equal(by_global_state, masks())
    torch.manual_seed(11)
    assert torch.equal(by_global_state, masks())


def test_masks_of_one_sample_grow_with_the_noise_level() -> None:
    input_ids = tokens(5, 30)
    previous = torch.zeros(5, 30, dtype=torch.bool)
    for level in (0.1, 0.3, 0.6, 0.9, 1.0):
        masked = mask_answers(input_ids, [3] * 5, mask_token_id=MASK, noise_level=level, seed=2).masked
        assert (masked | ~previous).all()
        previous = masked
    assert previous[:, 3:].all()


@pytest.mark.parametrize("n", [1, 4, 7])
def test_stratified_levels_take_every_stratum_once(n: int) -> None:
    for group in range(20):
        levels = draw_noise_levels(range(group * n, (group + 1) * n), seed=5, group_size=n)
        unit = (levels.double() - MIN_NOISE_LEVEL) / (1 - MIN_NOISE_LEVEL)
        assert sorted((unit * n).floor().int().tolist()) == list(range(n))


@pytest.mark.parametrize("stratified", [True, False])
def test_each_place_in_the_batch_gets_every_level(stratified: bool) -> None:
    n = 4
    levels = draw_noise_levels(range(4000), seed=1, group_size=n, stratified=stratified).view(-1, n)
    assert levels.min() >= MIN_NOISE_LEVEL
    assert levels.max() <= 1
    expected = np.linspace(0, 1, 11)
    for place in range(n):
        assert np.allclose(np.quantile(levels[:, place].numpy(), expected), expected, atol=0.06)


def test_stratification_lowers_the_variance_of_a_batch_mean() -> None:
    stratified = draw_noise_levels(range(8000), seed=1, group_size=8).view(-1, 8).mean(1).var()
    plain = draw_noise_levels(range(8000), seed=1, group_size=8, stratified=False).view(-1, 8).mean(1).var()
    assert stratified < plain / 20  # 1/12n against 1/12n³: a factor 64 at n = 8


def test_complementary_masks_cover_each_answer_exactly_once() -> None:
    input_ids = tokens(3, 15)
    batch = mask_answers(input_ids, [2, 6, 0], mask_token_id=MASK, seed=0, complementary=True)
    first, second = batch.masked.chunk(2)
    assert torch.equal(first ^ second, batch.answer[:3])
    assert torch.allclose(batch.noise_level[:3] + batch.noise_level[3:], torch.ones(3))
    assert batch.noise_level.min() >= MIN_NOISE_LEVEL * (1 - 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_lengths": [3, 12]}, "row 1 of the batch: its answer would take positions 12 to 12 of 12"),
        ({"prompt_lengths": [3]}, "prompt_lengths has shape"),
        ({"prompt_lengths": [3.0, 2.0]}, "expected 2 integers"),
        ({"answer_lengths": [4, 11]}, "row 1"),
        ({"attention_mask": torch.tensor([[0] + [1] * 11, [1] * 12])}, "pad sequences on the right"),
        ({"attention_mask": torch.ones(2, 9)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(2, 12), "answer_lengths": [3, 4]}, "pass one of the two"),
        ({"noise_level": torch.tensor([0.0, 0.5])}, "at 0 nothing is masked"),
        ({"noise_level": torch.tensor([float("nan"), 0.5])}, "expected values in"),
        ({"noise_level": 1.5}, "expected values in"),
        ({"noise_level": 1.0, "complementary": True}, "complementary masks get 1 - noise_level"),
        ({"noise_level": torch.ones(3)}, "noise_level has shape (3,), the batch is 2"),
        ({"seed": None, "sample_indices": [1, 2]}, "without a seed"),
        ({"sample_indices": [1]}, "one index >= 0 a sample"),
        ({"group_size": -1}, "group_size is -1"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    defaults = {"prompt_lengths": [3, 2], "mask_token_id": MASK, "seed": 0}
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        mask_answers(tokens(2, 12), **{**defaults, **arguments})


def test_ids_of_one_sample_without_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_ids has shape \(12,\), expected \(b, l\): one row a sample"):
        mask_answers(tokens(2, 12)[0], [3], mask_token_id=MASK, seed=0)


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_mask_density_counts_masked_neighbours_in_the_answer(radius: int) -> None:
    generator = torch.Generator().manual_seed(radius)
    answer = torch.zeros(4, 14, dtype=torch.bool)
    answer[0, 2:], answer[1, 5:9], answer[2, 0:1], answer[3] = True, True, True, True
    masked = answer & (torch.rand(4, 14, generator=generator) < 0.5)
    masked[2, 0], masked[3] = True, False
    expected = []
    for row in range(4):
        shares = []
        for j in masked[row].nonzero().flatten().tolist():
            near = [k for k in range(max(j - radius, 0), min(j + radius + 1, 14)) if k != j and answer[row, k]]
            shares.append(sum(bool(masked[row, k]) for k in near) / len(near) if near else 0.0)
        expected.append(sum(shares) / len(shares) if shares else 0.0)
    assert torch.allclose(mask_density(masked, answer, radius), torch.tensor(expected))
