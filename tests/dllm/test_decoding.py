"""The settings of a sampler, and which tokens its rules place, against loops over one place at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nara_diffusion.dllm.decoding import Sampling
from tests.acceptance._text import chosen as by_rule
from tests.acceptance._text import nucleus

GENERATOR = torch.Generator().manual_seed(3)
LOGITS = 3 * torch.randn(2, 6, 9, generator=GENERATOR)  # (a, k, v)
MASKED = torch.tensor([[True, True, False, True, True, True], [False, True, True, True, False, True]])
NONE = torch.tensor([], dtype=torch.long)


def place(count: int = 2, last: torch.Tensor = NONE, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    def refuse(*shape: int, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("greedy decoding draws nothing")

    return Sampling(gen_length=6, **settings).place(LOGITS, MASKED, count, last, refuse)


def ranked(row: int) -> list[tuple[float, int]]:
    """(probability of the likeliest token, place) of a row's masked places, the surest first."""
    best = LOGITS.double().softmax(-1).amax(-1)
    return sorted(((float(best[row, k]), k) for k in range(6) if MASKED[row, k]), reverse=True)


@pytest.mark.parametrize(("length", "block", "steps"), [(12, 6, 6), (12, 4, 9), (12, 12, 5), (6, 3, 6), (8, 8, 8)])
def test_steps_share_a_block_evenly(length: int, block: int, steps: int) -> None:
    counts = Sampling(gen_length=length, block_length=block, steps=steps).tokens_per_step()
    assert (sum(counts), len(counts)) == (block, steps // (length // block))
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_steps_place_the_surest_tokens(count: int) -> None:
    tokens, chosen = place(count)
    assert torch.equal(tokens, LOGITS.argmax(-1))
    for row in range(2):
        assert {k for k in range(6) if chosen[row, k]} == {k for _, k in ranked(row)[:count]}


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.999])
def test_threshold_places_all_surer_tokens_or_one(threshold: float) -> None:
    _, chosen = place(confidence_threshold=threshold)
    for row in range(2):
        sure = [k for p, k in ranked(row) if p > threshold] or [ranked(row)[0][1]]
        assert {k for k in range(6) if chosen[row, k]} == set(sure)


@pytest.mark.parametrize("bound", [0.01, 0.6, 2.0])
def test_entropy_bound_places_tokens_while_their_entropies_allow(bound: float) -> None:
    _, chosen = place(entropy_bound=bound, remasking="entropy")
    p = LOGITS.double().softmax(-1)
    entropy = -(p * p.log()).sum(-1)  # (a, k)
    for row in range(2):
        order = sorted((k for k in range(6) if MASKED[row, k]), key=lambda k: float(entropy[row, k]))
        for n, k in enumerate(order, 1):
            of_first = [float(entropy[row, i]) for i in order[:n]]
            assert bool(chosen[row, k]) == (n == 1 or sum(of_first) - max(of_first) <= bound)


def test_last_tokens_come_after_all_others() -> None:
    sure = [ranked(row)[0][1] for row in range(2)]
    ends = torch.tensor(sorted({int(LOGITS[row, sure[row]].argmax()) for row in range(2)}))
    tokens, chosen = place(1, last=ends)
    assert torch.equal(tokens, LOGITS.argmax(-1))
    for row in range(2):
        in_order = [k for _, k in ranked(row) if int(tokens[row, k]) not in ends.tolist()]
        assert sure[row] not in in_order
        assert int(tokens[row, int(chosen[row].int().argmax())]) not in ends.tolist()
        assert int(chosen[row].sum()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 6, "block_length": 4}, "4 .* gen_length 6"),
        ({"gen_length": 6, "block_length": 2, "steps": 4}, "3 blocks"),
        ({"gen_length": 6, "block_length": 2, "steps": -3}, "3 blocks"),
        ({"steps": 2, "factor": 1.0}, "steps and factor"),
        ({"factor": 1.0, "remasking": "entropy"}, "factor goes with"),
        ({"entropy_bound": 1.0, "remasking": "random"}, "entropy_bound goes with"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": float("nan")}, "temperature"),
        ({"cfg_scale": float("inf")}, "cfg_scale is inf"),
        ({"remasking": "lowest"}, "remasking is 'lowest'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_confidence_beside_last_tokens_is_among_the_others() -> None:
    ends = torch.tensor([int(LOGITS[0, 0].argmax()), int(LOGITS[1, 1].argmax())]).unique()
    usual = [token for token in range(9) if token not in ends.tolist()]
    among_all = LOGITS.double().softmax(-1).amax(-1)  # (a, k)
    among_others = LOGITS.double()[..., usual].softmax(-1).amax(-1)
    is_other = ~torch.isin(LOGITS.argmax(-1), ends) & MASKED
    row, k = divmod(int(((among_others - among_all) * is_other).argmax()), 6)
    threshold = float(among_all[row, k] + among_others[row, k]) / 2
    _, chosen = place(last=ends, confidence_threshold=threshold)
    assert torch.equal(chosen[row], (is_other & (among_others > threshold))[row])


def test_random_order_places_last_tokens_last_too() -> None:
    tokens = LOGITS.argmax(-1)
    last = tokens[0, 0].reshape(1)
    draws = torch.full((2, 6), 0.5)
    draws[0, 0] = 0.9  # the highest score, but for an end token
    settings = Sampling(gen_length=6, remasking="random")
    chosen = settings.place(LOGITS, MASKED, 1, last, lambda *shape, **kwargs: draws)[1]
    assert not chosen[0, 0]
    assert chosen.sum(1).tolist() == [1, 1]


# ---------------------------------------------------------------- the papers' sentences in plain Python

RULES: list[dict[str, Any]] = [
    {},
    {"remasking": "entropy"},
    {"remasking": "topk_margin"},
    {"remasking": "maskgit_plus", "top_p": 0.8},
    {"remasking": "entropy", "top_p": 0.7},
    {"confidence_threshold": 0.6},
    {"factor": 1.0},
    {"factor": 1.6},
    {"entropy_bound": 0.4},
    {"entropy_bound": 1.2, "remasking": "entropy"},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("last", [(), (2, 3)])
def test_place_chooses_what_the_rule_by_hand_does(rule: dict[str, Any], last: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    sampling = Sampling(gen_length=6, **rule)
    numbers = set()
    for _ in range(12):
        logits = 4 * torch.randn(2, 6, 9, generator=random)
        masked = torch.ones(2, 6, dtype=torch.bool)
        masked[1, 2] = False
        tokens, chosen = sampling.place(logits, masked, 2, torch.tensor(last, dtype=torch.long), torch.rand)
        for row in range(2):
            places = masked[row].nonzero()[:, 0].tolist()
            expected = by_rule(logits[row, places].double().tolist(), 2, last, **rule)
            actual = chosen[row].nonzero()[:, 0].tolist()
            assert actual == sorted(places[place] for place in expected)
            assert {places.index(j): int(tokens[row, j]) for j in actual} == expected
            numbers.add(len(actual))
    assert numbers == {2} or len(numbers) > 1


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_place_draws_from_nucleus_and_keeps_surest_tokens(remasking: str) -> None:
    logits = torch.tensor([[1.0, 0.9, -1.0, -2.0, -3.0], [1.2, 0.1, 0.05, -0.1, -0.2]])
    sampling, rows = Sampling(gen_length=2, temperature=0.7, top_p=0.8, remasking=remasking), 20000
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape, dtype: torch.rand(rows, *shape, dtype=dtype, generator=random)  # noqa: E731
    masked = torch.ones(rows, 2, dtype=torch.bool)
    tokens, chosen = sampling.place(logits.expand(rows, 2, 5), masked, 1, torch.tensor([], dtype=torch.long), draw)
    for place in range(2):
        shares = torch.bincount(tokens[:, place], minlength=5) / rows
        expected = nucleus([x / 0.7 for x in logits[place].tolist()], 0.8)
        assert shares.tolist() == pytest.approx(expected, abs=0.015)
        assert [share > 0 for share in shares] == [p > 0 for p in expected]
    assert (chosen.sum(1) == 1).all()
    confidence = logits.softmax(-1).expand(rows, 2, 5).gather(2, tokens[..., None])[..., 0]
    surest = chosen[:, 0] == (confidence[:, 0] > confidence[:, 1])
    assert float(surest.float().mean()) == pytest.approx(1 if remasking == "low_confidence" else 0.5, abs=0.015)
