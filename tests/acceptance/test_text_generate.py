"""`generate` writes what LLaDA's sampler by hand writes, with λ = masked share of each answer at each step."""

from __future__ import annotations

import copy
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion.dllm import generate
from tests.acceptance._text import END, PAD, ByHand, adapted_pair, greedy, two_tokens

VOCABULARY, FEW = 40, 7
PROMPTS = [[5, 9, 11], [7, 7, 30, 8, 21, 3], [12]]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, ByHand]:
    """An adapted model, and its logits by hand."""
    return adapted_pair(VOCABULARY)


@pytest.fixture(scope="module")
def few() -> tuple[Any, ByHand]:
    """The same with a vocabulary of seven tokens, the mask included, so that all answers can be counted."""
    return adapted_pair(FEW)


def padded(side: str) -> dict[str, Any]:
    """PROMPTS as a batch: `side` left is told by an attention mask, right by lengths."""
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
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_by_confidence_writes_the_answers_by_hand(pair: Any, setting: str) -> None:
    """And its forwards run at λ by hand."""
    model, by_hand = pair
    side, options = SETTINGS[setting]
    told: list[list[float]] = []
    watched: dict[str, Any] = {"on_step_end": lambda step: told.append(step.noise_level.tolist()), "return_stats": True}
    result = generate(model, **padded(side), **options, stop_at_eos=False, **watched)
    answers, levels = zip(*(greedy(by_hand, p, mask=VOCABULARY - 1, **options) for p in PROMPTS), strict=True)
    assert result.answers.tolist() == list(answers)
    assert result.forwards == max(map(len, levels))
    for row, column in zip(levels, zip(*told, strict=True), strict=True):
        assert [level for level, _ in groupby(column) if level > 0] == pytest.approx(row)  # a row may wait for others
    longest = max(map(len, PROMPTS)) + options["gen_length"]
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
    assert result.sequences.tolist() == [row + [PAD] * (longest - len(row)) for row in rows]
    constant = copy.copy(by_hand)
    constant.at = lambda level: by_hand.at(0.0)
    assert any(greedy(constant, p, mask=VOCABULARY - 1, **options)[0] not in answers for p in PROMPTS)  # λ matters


def test_generate_fills_an_answer_that_has_ended_with_its_end_token(pair: Any) -> None:
    model, by_hand = pair
    options: dict[str, Any] = {"gen_length": 8, "block_length": 2}
    whole = [greedy(by_hand, p, mask=VOCABULARY - 1, **options)[0] for p in PROMPTS]
    ends = (whole[0][2], whole[1][1])  # tokens that stand inside of answers
    by_hands = [greedy(by_hand, p, mask=VOCABULARY - 1, **options, ends=ends) for p in PROMPTS]
    expected = [answer for answer, _ in by_hands]
    result = generate(model, **padded("right"), **options, eos_token_id=ends, return_stats=True)
    assert result.answers.tolist() == expected != whole
    assert result.forwards == max(len(levels) for _, levels in by_hands)
    assert expected[0][2:] == [ends[0]] * 6


RANDOM: list[tuple[str, float, float]] = [
    ("low_confidence", 2.0, 0.0),
    ("random", 0.0, 0.0),
    ("random", 1.3, 0.6),
]


def counted(model: Any, prompt: list[int], rows: int, seed: int, **options: Any) -> Tensor:
    """How often each answer of two tokens (v, v) is sampled."""
    ids = torch.tensor(prompt).expand(rows, -1)
    random = torch.Generator().manual_seed(seed)
    result = generate(model, ids, gen_length=2, stop_at_eos=False, generator=random, return_stats=True, **options)
    return torch.bincount(result.answers @ torch.tensor([FEW, 1]), minlength=FEW**2).view(FEW, FEW).double()


@pytest.mark.parametrize(("remasking", "temperature", "cfg_scale"), RANDOM)
def test_generate_at_random_has_the_distribution_by_hand(
    few: Any, remasking: str, temperature: float, cfg_scale: float
) -> None:
    """χ² of 3 000 answers against all that there are, in the mean its degrees of freedom ± √(2 · those)."""
    model, by_hand = few
    options: dict[str, Any] = {"remasking": remasking, "temperature": temperature, "cfg_scale": cfg_scale}
    expected = 3000 * two_tokens(by_hand, [3, 5], mask=FEW - 1, **options)
    assert expected.sum() == pytest.approx(3000)
    found = counted(model, [3, 5], 3000, seed=1, **options)
    often = expected >= 5
    pairs = [(found[often], expected[often]), (found[~often].sum()[None], expected[~often].sum()[None] + 1e-9)]
    chi = sum(float(((mine - theirs) ** 2 / theirs).sum()) for mine, theirs in pairs)
    freedom = max(int(often.sum()), 1)
    assert chi < freedom + 4 * (2 * freedom) ** 0.5


def test_generate_draws_by_the_generator_alone(few: Any) -> None:
    model, _ = few
    options: dict[str, Any] = {"temperature": 1.0, "remasking": "random"}
    first = counted(model, [3, 5], 200, seed=7, **options)
    torch.manual_seed(123)
    assert torch.equal(counted(model, [3, 5], 200, seed=7, **options), first)
    assert not torch.equal(counted(model, [3, 5], 200, seed=8, **options), first)


@pytest.mark.parametrize("setting", ["logits_eos_inf", "confidence_eos_eot_inf"])
def test_end_token_of_the_configuration_is_never_predicted_or_placed_last(
    pair: Any, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, by_hand = pair
    options: dict[str, Any] = {"gen_length": 6, "block_length": 6}
    whole, _ = greedy(by_hand, PROMPTS[0], mask=VOCABULARY - 1, **options)
    end = whole[1]
    monkeypatch.setattr(model.get_base_model().config, "eos_token_id", end)

    def guided(*given: Any) -> Tensor:
        free = by_hand.guided(*given)
        never, token = free.index_fill(1, torch.tensor(end), -torch.inf), free.argmax(1)
        least_sure = 1e-9 * torch.nn.functional.one_hot(token, VOCABULARY)  # but for its first place still `token`
        is_last = (token == end) & (setting == "confidence_eos_eot_inf")
        return torch.where(is_last[:, None], least_sure, never)

    expected, _ = greedy(SimpleNamespace(guided=guided), PROMPTS[0], mask=VOCABULARY - 1, **options)  # type: ignore[arg-type]
    found: Any = generate(model, torch.tensor(PROMPTS[:1]), **options, stop_at_eos=False, **{setting: True})
    assert found[0, len(PROMPTS[0]) :].tolist() == expected != whole
    assert (end in expected) is (setting == "confidence_eos_eot_inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 3}, "block_length 3 doesn't divide"),
        ({"block_length": 4, "steps": 3}, "steps is 3 and there are 2 blocks"),
        ({"remasking": "entropie"}, "remasking is 'entropie', expected one of 'low_confidence', .*'entropy'"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"gen_length": 62}, "positions"),
        ({"steps": 4, "factor": 1.0}, "steps and factor each say how many tokens a step places: give one"),
        ({"confidence_threshold": 0.9, "entropy_bound": 0.1}, "confidence_threshold and entropy_bound each"),
        ({"factor": 1.0, "remasking": "random"}, "factor goes with remasking low_confidence or maskgit_plus"),
        ({"entropy_bound": 1.0, "remasking": "random"}, "entropy_bound goes with remasking .* or entropy, .* 'random'"),
    ],
)
def test_generate_refuses_impossible_settings_by_name(pair: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(pair[0], torch.tensor([[5, 9, END]]), **{"gen_length": 8, **options})


@pytest.mark.parametrize("given", ["a text", [[1, 2]], torch.ones(1, 3), torch.tensor([1, 2])])
def test_generate_of_what_is_no_batch_of_tokens_says_how_to_encode_it(pair: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=r"^input_ids is .*expected a tensor \(b, p\) of token ids: .*encode_prompts"):
        generate(pair[0], given)
