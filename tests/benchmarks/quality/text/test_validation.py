"""The loss over ten bins of λ: its masks, its figures against a loop in plain Python, its standard errors."""

import math

import pytest
import torch
from peft import get_peft_model
from quality.text.validation import BINS, _draw, binned_loss, summarise, validation_set

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.noise.ablations import changed_noise, reversed_noise
from tests.helpers.adapted import disturb


@pytest.fixture(scope="module")
def masked(task):
    return validation_set(task.data.validation, task.model.config.mask_token_id)


def flat(found, name):
    return [row for batch in found.batches for row in getattr(batch, name)]


def test_each_question_comes_twice_with_complementary_masks(task, masked):
    n, length = len(task.data.validation), task.data.validation.answer_length
    seen = {}
    rows = zip(flat(masked, "masked"), flat(masked, "answer"), flat(masked, "noise_level"), strict=True)
    for question, (mask, answer, level), weight in zip(
        masked.questions.tolist(), rows, masked.weights.tolist(), strict=True
    ):
        assert int(answer.sum()) == length
        assert weight == pytest.approx(1 if level > 0.5 else 1 - (1 - float(level)) ** length, abs=1e-6)
        seen.setdefault(question, {})[float(level) > 0.5] = (mask[answer], float(level))
    assert len(seen) == n
    whole = 0
    for pair in seen.values():
        (mask, level), (other, complement) = pair[False], pair[True]
        assert mask.any()
        assert other.all() or torch.equal(mask, ~other)
        whole += int(other.all())
        assert level + complement == pytest.approx(1)
    assert 0 < whole < n


def test_bins_are_equally_full_and_hold_their_own_noise_levels(masked):
    levels = torch.stack(flat(masked, "noise_level"))
    assert torch.bincount(masked.bins, minlength=BINS).tolist() == [6] * BINS
    assert torch.equal((levels * BINS).long(), masked.bins)


def test_masks_follow_their_noise_level_and_are_always_the_same():
    drawn, again = _draw(20000, 9), _draw(20000, 9)
    for one, other in zip(drawn, again, strict=True):
        assert torch.equal(one, other)
    levels, masks, weights = drawn
    for k in range(BINS):  # each token is masked with probability λ, once a mask that can't be empty counts less
        chosen = (levels * BINS).long() == k
        shares = (weights[chosen, None] * masks[chosen]).mean(0)
        assert shares.tolist() == pytest.approx([levels[chosen].mean().item()] * 9, abs=0.03)
    within = levels[:20000][torch.arange(20000) % 5 == 2] * BINS - 2  # stratified: far more even than independent ones
    assert within.sort().values.sub(torch.linspace(0, 1, len(within))).abs().max() < 1 / len(within) + 1e-3


def test_the_wholly_masked_answer_is_as_frequent_as_in_training():
    levels, masks, weights = _draw(20000, 9)
    assert masks[:20000].any(1).all()  # a row without a masked token has no loss
    assert torch.equal(weights[20000:], torch.ones(20000))
    for k in range(6, BINS):
        chosen = (levels * BINS).long() == k
        expected = (levels[chosen] ** 9).mean().item()
        assert masks[chosen].all(1).float().mean().item() == pytest.approx(expected, rel=0.25)


def test_rows_that_count_less_say_what_rows_with_empty_masks_would_have_said():
    n, length = 50000, 4
    generator = torch.Generator().manual_seed(5)
    questions = torch.arange(n).repeat(2)

    def made_up(masks):  # a masked token is harder, the more of the others are masked
        return (masks * torch.tensor([1.0, 2.0, 0.5, 3.0]).double()).sum(1) * (1 + masks.sum(1))

    levels, masks, weights = _draw(n, length)
    bins = (levels * BINS).long().clamp(max=BINS - 1)
    found = summarise(weights * made_up(masks), weights * masks.sum(1).double(), bins, questions)
    plain = torch.rand(2 * n, length, generator=generator) < levels[:, None]
    wanted = summarise(made_up(plain), plain.sum(1).double(), bins, questions)
    for k in range(BINS):
        error = math.hypot(found.errors[k], wanted.errors[k])
        assert abs(found.losses[k] - wanted.losses[k]) < 4 * error
        assert error < 0.02 * wanted.losses[k]
    assert found.errors[0] < 0.9 * wanted.errors[0]  # more rows say something


def test_masked_tokens_alone_are_hidden_and_padding_is_not_attended_to(task, masked):
    mask_id = task.model.config.mask_token_id
    for batch in masked.batches:
        assert torch.equal(batch.input_ids == mask_id, batch.masked)
        assert torch.equal(batch.targets[~batch.masked], batch.input_ids[~batch.masked])
        ends = batch.answer.shape[1] - batch.answer.flip(1).int().argmax(1)
        assert batch.attention_mask is not None
        assert torch.equal(batch.attention_mask.sum(1), ends)


def reference(model, found, level_of):
    """Each row by itself, each token by itself."""
    sums, counts = [0.0] * BINS, [0.0] * BINS
    order = iter(zip(found.bins.tolist(), found.weights.tolist(), strict=True))
    for batch in found.batches:
        for i in range(len(batch.input_ids)):
            k, weight = next(order)
            width = int(batch.attention_mask[i].sum())
            with noise_level(model, level_of(batch.noise_level[i])), torch.no_grad():
                logits = model(batch.input_ids[i : i + 1, :width]).logits[0].double()
            for j in batch.masked[i].nonzero()[:, 0].tolist():
                sums[k] -= weight * logits[j].log_softmax(-1)[batch.targets[i, j]].item()
                counts[k] += weight
    return [total / count for total, count in zip(sums, counts, strict=True)]


def test_losses_are_nats_a_masked_token_at_the_noise_level_that_is_told(task, masked):
    import copy

    torch.manual_seed(3)
    model = get_peft_model(
        copy.deepcopy(task.model), NaraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    )
    disturb(model)
    found = binned_loss(model, masked, lambda batch: batch.noise_level)
    assert found.losses == pytest.approx(reference(model, masked, lambda level: level), rel=1e-4)
    assert found.mean == pytest.approx(sum(found.losses) / BINS)
    told = binned_loss(model, masked, lambda batch: 1 - batch.noise_level)
    assert told.losses == pytest.approx(reference(model, masked, lambda level: 1 - level), rel=1e-4)
    assert told.losses != pytest.approx(found.losses, rel=1e-3)
    with changed_noise(model, reversed_noise):
        assert binned_loss(model, masked, lambda batch: batch.noise_level).losses == pytest.approx(told.losses)


def test_standard_errors_are_those_of_many_samples():
    generator = torch.Generator().manual_seed(0)
    n = 400

    def sample():
        bins = torch.cat([torch.arange(n) % 5, 9 - torch.arange(n) % 5])
        count = torch.randint(1, 9, (2 * n,), generator=generator).double()
        common = torch.randn(n, generator=generator).repeat(2)  # a question is hard in both of its rows
        total = count * (1 + 0.3 * common + 0.2 * torch.randn(2 * n, generator=generator))
        return summarise(total, count, bins, torch.arange(n).repeat(2))

    found = [sample() for _ in range(300)]
    for value, error in (
        (lambda one: one.losses[3], lambda one: one.errors[3]),
        (lambda one: one.mean, lambda one: one.mean_error),
    ):
        values = torch.tensor([value(one) for one in found])
        stated = torch.tensor([error(one) for one in found]).mean()
        assert values.std().item() == pytest.approx(stated.item(), rel=0.12)
    independent = math.sqrt(sum(error**2 for error in found[0].errors)) / BINS
    assert found[0].mean_error > 1.1 * independent
