"""`generate` writes what LLaDA's sampler by hand writes, with λ = masked share of each answer at each step."""

from __future__ import annotations

import copy
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion.dllm import generate, load_backbone, log_likelihood, masked_diffusion_loss
from tests.acceptance._text import (
    DREAM_BOS,
    DREAM_MASK,
    DREAM_TINY,
    END,
    PAD,
    ByHand,
    DreamByHand,
    adapted_pair,
    bound,
    greedy,
)

VOCABULARY = 40
PROMPTS = [[5, 9, 11], [7, 7, 30, 8, 21, 3], [12]]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, ByHand]:
    """An adapted model, and its logits by hand."""
    return adapted_pair(VOCABULARY)


def padded(side: str) -> dict[str, Any]:
    """PROMPTS as a batch: `side` left is given by an attention mask, right by lengths."""
    width = max(map(len, PROMPTS))
    rows = [[PAD] * (width - len(p)) + p if side == "left" else p + [PAD] * (width - len(p)) for p in PROMPTS]
    if side == "right":
        return {"input_ids": torch.tensor(rows), "prompt_lengths": [len(prompt) for prompt in PROMPTS]}
    real = [[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(real)}


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "one block, a step a token": ("right", {"gen_length": 6, "block_length": 6}),
    "two blocks, uneven steps": ("left", {"gen_length": 8, "block_length": 4, "steps": 6}),
    "guidance": ("right", {"gen_length": 6, "block_length": 3, "steps": 4, "cfg_scale": 1.5}),
    "threshold": ("left", {"gen_length": 8, "block_length": 4, "confidence_threshold": 0.6}),
    "entropy": ("right", {"gen_length": 8, "block_length": 4, "entropy_bound": 0.9, "remasking": "entropy"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_by_confidence_writes_the_answers_by_hand(pair: Any, setting: str) -> None:
    """And its forwards run at λ by hand."""
    model, by_hand = pair
    side, options = SETTINGS[setting]
    levels_seen: list[list[float]] = []
    watched: dict[str, Any] = {
        "on_step_end": lambda step: levels_seen.append(step.noise_level.tolist()),
        "return_stats": True,
    }
    result = generate(model, **padded(side), **options, stop_at_eos=False, **watched)
    answers, levels = zip(*(greedy(by_hand, p, mask=VOCABULARY - 1, **options) for p in PROMPTS), strict=True)
    assert result.answers.tolist() == list(answers)
    assert result.forwards == max(map(len, levels))
    for row, column in zip(levels, zip(*levels_seen, strict=True), strict=True):
        assert [level for level, _ in groupby(column) if level > 0] == pytest.approx(row)  # a row may wait for others
    longest = max(map(len, PROMPTS)) + options["gen_length"]
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
    assert result.sequences.tolist() == [row + [PAD] * (longest - len(row)) for row in rows]
    constant = copy.copy(by_hand)
    constant.at = lambda level: by_hand.at(0.0)
    assert any(greedy(constant, p, mask=VOCABULARY - 1, **options)[0] not in answers for p in PROMPTS)  # λ matters


def test_generate_keeps_and_counts_tokens_of_last_step(pair: Any) -> None:
    levels_seen: list[float] = []

    def fill(step: Any) -> None:
        levels_seen.append(float(step.noise_level))
        step.sequences[:, 6:] = 8

    options: dict[str, Any] = {"gen_length": 6, "steps": 6, "stop_at_eos": False}
    assert generate(pair[0], torch.tensor([PROMPTS[0]]), **options, on_step_end=fill)[0, 6:].tolist() == [8, 8, 8]
    assert levels_seen[1] <= 3 / 6


def test_generate_merged_at_another_level_is_refused() -> None:
    model = adapted_pair(VOCABULARY)[0]
    model.merge_adapter(noise_level=0.5)
    with pytest.raises(ValueError, match=r"merged at noise_level 0\.5, but this forward asks for \[1"):
        generate(model, torch.tensor([PROMPTS[0]]), gen_length=4)


def test_generate_fills_ended_answer_with_its_end_token(pair: Any) -> None:
    model, by_hand = pair
    options: dict[str, Any] = {"gen_length": 8, "block_length": 2}
    full = [greedy(by_hand, p, mask=VOCABULARY - 1, **options)[0] for p in PROMPTS]
    ends = (full[0][2], full[1][1])  # tokens that stand inside of answers
    by_hands = [greedy(by_hand, p, mask=VOCABULARY - 1, **options, ends=ends) for p in PROMPTS]
    expected = [answer for answer, _ in by_hands]
    result = generate(model, **padded("right"), **options, eos_token_id=ends, return_stats=True)
    assert result.answers.tolist() == expected != full
    assert result.forwards == max(len(levels) for _, levels in by_hands)
    assert expected[0][2:] == [ends[0]] * 6


def test_generate_draws_by_the_generator_alone(pair: Any) -> None:
    def drawn(seed: int) -> Tensor:
        settings: dict[str, Any] = {"gen_length": 4, "temperature": 1.0, "remasking": "random", "stop_at_eos": False}
        return generate(pair[0], torch.full((9, 3), 5), generator=torch.Generator().manual_seed(seed), **settings)  # type: ignore[return-value]

    first = drawn(7)
    assert len(first.unique(dim=0)) > 1  # a stream a row
    torch.manual_seed(123)
    assert torch.equal(drawn(7), first)
    assert not torch.equal(drawn(8), first)


@pytest.mark.parametrize("setting", ["logits_eos_inf", "confidence_eos_eot_inf"])
def test_configured_end_token_is_never_predicted_or_last(
    pair: Any, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, by_hand = pair
    options: dict[str, Any] = {"gen_length": 6, "block_length": 6}
    full, _ = greedy(by_hand, PROMPTS[0], mask=VOCABULARY - 1, **options)
    end, is_last = full[1], setting == "confidence_eos_eot_inf"
    monkeypatch.setattr(model.get_base_model().config, "eos_token_id", end)
    never = SimpleNamespace(guided=lambda *given: by_hand.guided(*given).index_fill(1, torch.tensor(end), -torch.inf))
    hand: Any = by_hand if is_last else never
    expected, _ = greedy(hand, PROMPTS[0], mask=VOCABULARY - 1, last=(end,) if is_last else (), **options)
    actual: Any = generate(model, torch.tensor(PROMPTS[:1]), **options, stop_at_eos=False, **{setting: True})
    assert actual[0, len(PROMPTS[0]) :].tolist() == expected != full
    assert (end in expected) is is_last


# ---------------------------------------------------------------- Dream


def test_dream_answers_by_hand_and_refuses_empty_prompts() -> None:
    model, by_hand = load_backbone(DREAM_TINY)[0], DreamByHand()
    prompts = torch.tensor([[DREAM_BOS, 5, 5], [9, 8, 7]])
    result: Any = generate(model, prompts, gen_length=4, prompt_lengths=[1, 3], stop_at_eos=False, return_stats=True)
    for row, prompt in enumerate(([DREAM_BOS], [9, 8, 7])):
        expected, _ = greedy(by_hand, prompt, gen_length=4, block_length=4, mask=DREAM_MASK)
        assert result.answers[row].tolist() == expected
        assert result.sequences[row, : len(prompt) + 4].tolist() == prompt + expected
    with pytest.raises(ValueError, match=r"an empty prompt, .* predicts the next token, .* begin the prompt with"):
        generate(model, prompts, gen_length=4, prompt_lengths=[0, 3])
    rows = torch.tensor([[DREAM_BOS, 70, 71, 72, 0], [9, 8, 75, 76, 77], [DREAM_BOS, 73, 0, 0, 0]])
    pairs = [([DREAM_BOS], [70, 71, 72]), ([9, 8], [75, 76, 77]), ([DREAM_BOS], [73])]
    log_p = lambda ids, level: by_hand([ids], level)[0].log_softmax(-1)  # noqa: E731
    expected = [float(bound(*pair, DREAM_MASK, log_p)) for pair in pairs]
    actual = log_likelihood(model, rows, [1, 2, 1], answer_lengths=[3, 3, 1]).tolist()
    assert actual == pytest.approx(expected, rel=1e-5)
    for function in (masked_diffusion_loss, log_likelihood):
        with pytest.raises(ValueError, match=r"an answer begins its row, .* nothing predicts the first"):
            function(model, rows, [0, 2, 0])


# ---------------------------------------------------------------- what is refused


def test_generate_refuses_impossible_settings_by_name(pair: Any) -> None:
    for options, message in [
        ({"block_length": 3}, "block_length 3 has to divide"),
        ({"block_length": 4, "steps": 3}, "steps is 3 and there are 2 blocks"),
        ({"remasking": "entropie"}, "remasking is 'entropie', expected one of .'low_confidence', .*'entropy'"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"gen_length": 62}, "positions"),
        ({"steps": 4, "factor": 1.0}, "steps and factor each say how many tokens a step places: give one"),
        ({"confidence_threshold": 0.9, "entropy_bound": 0.1}, "confidence_threshold and entropy_bound each"),
        ({"factor": 1.0, "remasking": "random"}, "factor goes with remasking low_confidence or maskgit_plus"),
        ({"entropy_bound": 1.0, "remasking": "random"}, "entropy_bound goes with remasking .* or entropy, .* 'random'"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(pair[0], torch.tensor([[5, 9, END]]), **{"gen_length": 8, **options})
    message = r"^input_ids is .*expected a tensor \(b, p\) of token ids: .*encode_prompts"
    for prompt in ("a text", [[1, 2]], torch.ones(1, 3), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match=message):
            generate(pair[0], prompt)  # type: ignore[arg-type]
