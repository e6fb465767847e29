"""The rules by which a step places tokens, against the papers' sentences in plain Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nara_diffusion.dllm import Sampling, generate, load_backbone

LLADA_TINY, DREAM_TINY = (
    str(Path(__file__).parents[2] / "examples" / "assets" / name) for name in ("llada-tiny", "dream-tiny")
)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def nucleus(row: list[float], top_p: float) -> list[float]:
    """Probabilities of the fewest likeliest tokens that have top_p together."""
    p, kept, total = softmax(row), [], 0.0
    for token in sorted(range(len(row)), key=lambda t: -p[t]):
        kept.append(token)
        total += p[token]
        if total > top_p:
            break
    return [p[t] / total if t in kept else 0.0 for t in range(len(row))]


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def score(remasking: str, p: list[float], q: list[float], token: int) -> float:
    first, second = sorted(q, reverse=True)[:2]
    scores = {"low_confidence": p[token], "maskgit_plus": q[token], "topk_margin": first - second}
    return -entropy(q) if remasking == "entropy" else scores[remasking]


def chosen_by_hand(rows: list[list[float]], count: int, last: tuple[int, ...] = (), **settings: Any) -> dict[int, int]:
    """{place: token} for the logits of all masked places of one row, at temperature 0."""
    remasking = settings.get("remasking", "low_confidence")
    found = []
    for place, logits in enumerate(rows):
        token = max(range(len(logits)), key=lambda t: logits[t])
        without = [-50.0 if t in last else x for t, x in enumerate(logits)]
        p, q = softmax(without), nucleus(without, settings.get("top_p", 1.0))
        rank = 0.0 if token in last else -score(remasking, p, q, token)
        found.append((token in last, rank, place, token, p[token], entropy(q)))
    found.sort()
    n = 1
    for m in range(2, len(found) + 1):
        is_end, confidence, entropies = found[m - 1][0], found[m - 1][4], [one[5] for one in found[:m]]
        if "confidence_threshold" in settings:
            fits = confidence > settings["confidence_threshold"] and not is_end
        elif "factor" in settings:
            fits = (m + 1) * (1 - confidence) < settings["factor"] and not is_end
        elif "entropy_bound" in settings:
            fits = sum(entropies) - max(entropies) <= settings["entropy_bound"]
        else:
            fits = m <= count
        if not fits:
            break
        n = m
    return {place: token for _, _, place, token, _, _ in found[:n]}


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
            expected = chosen_by_hand(logits[row, places].double().tolist(), 2, last, **rule)
            found = chosen[row].nonzero()[:, 0].tolist()
            assert found == sorted(places[place] for place in expected)
            assert {places.index(j): int(tokens[row, j]) for j in found} == expected
            numbers.add(len(found))
    assert numbers == {2} or len(numbers) > 1


def test_top_p_draws_from_the_nucleus_alone_in_its_shares() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -0.5, -1.0])
    sampling = Sampling(gen_length=1, temperature=0.7, top_p=0.8)
    random = torch.Generator().manual_seed(0)
    many = logits.expand(20000, 1, -1)
    draw = lambda *shape, dtype: torch.rand(20000, *shape, dtype=dtype, generator=random)  # noqa: E731
    masked = torch.ones(20000, 1, dtype=torch.bool)
    tokens, chosen = sampling.place(many, masked, 1, torch.tensor([], dtype=torch.long), draw)
    assert chosen.all()
    shares = torch.bincount(tokens[:, 0], minlength=5) / 20000
    expected = nucleus([x / 0.7 for x in logits.tolist()], 0.8)
    assert expected.count(0.0) == 3
    assert shares.tolist() == pytest.approx(expected, abs=0.015)
    assert shares[2:].sum() == 0


def test_chat_takes_the_block_length_of_the_models_own_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Sampling, "tokens_per_step", lambda self: asked.append(self.block) or [1])
    llada, dream = (load_backbone(name)[0] for name in (LLADA_TINY, DREAM_TINY))
    for model, settings, block in [
        (llada, {"gen_length": 64}, 32),
        (llada, {"gen_length": 32}, 32),
        (llada, {"gen_length": 64, "block_length": 16}, 16),
        (llada, {"gen_length": 64, "steps": 4}, 32),
        (llada, {"gen_length": 64, "steps": 3}, 64),
        (llada, {"gen_length": 12}, 12),
        (dream, {"gen_length": 64}, 64),
    ]:
        model.config.max_position_embeddings = 128
        generate(model, torch.tensor([[65, 66]]), chat=True, **settings)
        assert asked.pop(0) == block, settings
        asked.clear()
    generate(llada, torch.tensor([[65, 66]]), gen_length=64)
    assert asked[0] == 64
