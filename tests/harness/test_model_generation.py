"""lm-eval's requests to generate, against λ and masks worked out by hand."""

from __future__ import annotations

import logging

import pytest
import torch

from nara_diffusion.harness.model import NaraDLLM
from nara_diffusion.harness.prompts import encode
from tests.dllm.generation_reference import reference_generate

from .harness_calls import logits_at, requests

QUESTIONS = ["reverse: planet", "upper: a", "copy: abcdefgh", "sort: zebra", "swap: tea"]


def test_answers_are_those_of_the_sampler_for_each_question_alone(harness: NaraDLLM) -> None:
    settings = {"gen_length": 8, "steps": 4, "block_length": 4, "until": [], "do_sample": False}
    actual = harness.generate_until(requests("generate_until", *((q, settings) for q in QUESTIONS)))
    for question, text in zip(QUESTIONS, actual, strict=True):
        answer, levels = reference_generate(
            lambda tokens, level: logits_at(harness, tokens, level),
            encode(harness.tokenizer, question, has_template=False),
            gen_length=8,
            steps=4,
            block_length=4,
            mask=283,
            ends=tuple(harness.ends),
        )
        ends = [j for j, token in enumerate(answer) if token in harness.ends]
        assert text == harness.tokenizer.decode(answer[: min(ends, default=8)], skip_special_tokens=True)
        assert levels[0] == 1


def test_the_adapter_and_its_noise_level_decide(harness: NaraDLLM) -> None:
    """Else the test above would prove nothing."""
    tokens = encode(harness.tokenizer, QUESTIONS[0], has_template=False) + [283] * 8
    low, high = logits_at(harness, tokens, 0.1), logits_at(harness, tokens, 0.9)
    with harness.model.disable_adapter(), torch.no_grad():  # type: ignore[operator]
        base = harness.model(torch.tensor([tokens])).logits[0].double()
    assert (low - high).abs().max() > 0.1
    assert (low - base).abs().max() > 0.1


def test_requests_with_other_settings_do_not_share_a_batch(harness: NaraDLLM) -> None:
    short, long = {"max_gen_toks": 2, "until": "\n"}, {"gen_length": 6, "max_gen_toks": 2}
    arguments = [(q, short if i % 2 else long) for i, q in enumerate(QUESTIONS)]
    together = harness.generate_until(requests("generate_until", *arguments))
    alone = [harness.generate_until(requests("generate_until", args))[0] for args in arguments]
    assert together == alone
    assert len(harness.tokenizer(together[1], add_special_tokens=False).input_ids) <= 2


def scripted(harness: NaraDLLM, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Every answer is `ids`."""
    monkeypatch.setattr(harness, "_generated", lambda prompts, sampling, ends: [ids] * len(prompts))


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (["three", ".", "stop"], "  one "),
        ("two", "  one stop "),
        ([], "  one stop two. three"),
        (["<|eot_id|>"], "  one stop two. three"),
    ],
)
def test_an_answer_ends_before_the_first_stop_text_and_keeps_its_white_space(
    harness: NaraDLLM, monkeypatch: pytest.MonkeyPatch, until: list[str] | str, expected: str
) -> None:
    ids = harness.tokenizer("  one stop two. three", add_special_tokens=False).input_ids
    scripted(harness, monkeypatch, [*ids, harness.tokenizer.eos_token_id, *ids])
    settings = {"until": until, "gen_length": 30}
    assert harness.generate_until(requests("generate_until", ("q", settings))) == [expected]


def test_a_special_token_among_the_stop_texts_ends_an_answer(
    harness: NaraDLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = harness.tokenizer.bos_token_id
    assert opening not in harness.ends
    ids = harness.tokenizer("ab", add_special_tokens=False).input_ids
    scripted(harness, monkeypatch, [*ids, opening, *ids])
    ask = {"gen_length": 4}
    assert harness.generate_until(requests("generate_until", ("q", ask))) == ["abab"]
    stop = {**ask, "until": [harness.tokenizer.bos_token]}
    assert harness.generate_until(requests("generate_until", ("q", stop))) == ["ab"]


def test_prompts_too_long_lose_their_start(harness: NaraDLLM, caplog: pytest.LogCaptureFixture) -> None:
    long = "copy: " + "x" * 100
    with caplog.at_level(logging.WARNING, logger="nara_diffusion"):
        (actual,) = harness.generate_until(requests("generate_until", (long, {"gen_length": 4})))
    assert "1 prompts are longer than 60 tokens and lose their start" in caplog.text
    tokens = encode(harness.tokenizer, long, has_template=False)[-60:]
    (row,) = harness._generated([tokens], {"gen_length": 4}, harness.ends)
    assert actual == harness.tokenizer.decode(row, skip_special_tokens=True)


def test_a_temperature_that_is_not_used_is_told_once(
    harness: NaraDLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scripted(harness, monkeypatch, [5])
    asked = {"gen_length": 4, "do_sample": False, "temperature": 0.7}
    with caplog.at_level(logging.WARNING, logger="nara_diffusion"):
        harness.generate_until(requests("generate_until", *((q, asked) for q in QUESTIONS)))
    (message,) = caplog.messages
    assert "temperature=0.7" in message
    caplog.clear()
    harness.generate_until(requests("generate_until", ("q", {**asked, "do_sample": True})))
    assert not caplog.messages


def test_an_answer_longer_than_the_model_is_refused(harness: NaraDLLM) -> None:
    with pytest.raises(
        ValueError, match=r"gen_length is 64 and the model has 64 positions .* --gen_kwargs gen_length=N"
    ):
        harness.generate_until(requests("generate_until", ("q", {"gen_length": 64})))
