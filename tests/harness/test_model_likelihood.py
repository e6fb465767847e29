"""lm-eval's requests for likelihoods of answers and of whole texts, against λ and masks worked out by hand."""

from __future__ import annotations

import itertools
import logging
from math import comb

import pytest
import torch

from nara_diffusion.dllm import encode_records, log_likelihood
from nara_diffusion.dllm.data.records import normalized
from nara_diffusion.harness.model import NaraDLLM
from nara_diffusion.harness.prompts import encode
from tests.dllm.generation_reference import reference_generate

from .harness_calls import logits_at, requests


def bound(harness: NaraDLLM, prompt: list[int], answer: list[int]) -> float:
    """Σ over all masks of the answer, λ told as the masked share of it."""
    n, total = len(answer), 0.0
    for k in range(1, n + 1):
        for subset in itertools.combinations(range(n), k):
            shown = [283 if j in subset else token for j, token in enumerate(answer)]
            log_p = logits_at(harness, prompt + shown, k / n).log_softmax(-1)
            total += sum(log_p[len(prompt) + j, answer[j]].item() for j in subset) / k / comb(n, k)
    return total


def test_likelihoods_are_the_bound_with_the_noise_level_of_each_mask(harness: NaraDLLM) -> None:
    pairs = [("reverse: ab", " ba"), ("reverse: ab", " abcd"), ("upper: house", " H"), ("copy: ab ", "cd")]
    harness.samples = 64
    actual = harness.loglikelihood(requests("loglikelihood", *pairs))
    for (context, continuation), (value, greedy) in zip(pairs, actual, strict=True):
        whole = encode(harness.tokenizer, context + continuation, has_template=False)
        length = len(encode(harness.tokenizer, context.rstrip(), has_template=False))
        prompt, answer = whole[:length], whole[length:]
        assert len(answer) <= 6
        assert value == pytest.approx(bound(harness, prompt, answer), rel=1e-5)
        sampled, _ = reference_generate(
            lambda tokens, level: logits_at(harness, tokens, level),
            prompt,
            gen_length=len(answer),
            steps=len(answer),
            block_length=len(answer),
            mask=283,
        )
        assert greedy is (sampled == answer)


@pytest.mark.parametrize("has_chat_template", [True, False])
def test_a_templated_answer_has_the_likelihood_of_training_and_its_noise_level(
    harness: NaraDLLM, has_chat_template: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_chat_template:
        monkeypatch.setattr(harness.tokenizer, "chat_template", None)
    harness.chat_template(True)
    records = normalized([{"instruction": "reverse: ab", "output": "ba", "answer": "ba"}], source="test")
    row = encode_records(records, harness.tokenizer, max_length=512, progress=False).rows[0]
    prompt, closed = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
    context = harness.apply_chat_template([{"role": "user", "content": "reverse: ab"}])
    ((value, _),) = harness.loglikelihood(requests("loglikelihood", (context, "ba")))
    assert value == pytest.approx(bound(harness, prompt[-62:], closed[:2]), rel=1e-5)
    assert harness.tokenizer.decode(closed[:2]) == "ba"


def test_what_greedy_sampling_gives_is_told_apart(harness: NaraDLLM) -> None:
    prompt = encode(harness.tokenizer, "upper: house", has_template=False)
    (answer,) = harness._generated([prompt], {"gen_length": 3, "stop_at_eos": False}, [])
    other = [*answer[:2], answer[2] + 1]
    assert harness._are_greedy([(prompt, answer), (prompt, other)]) == [True, False]
    harness.greedy = False
    (result,) = harness.loglikelihood(requests("loglikelihood", ("upper: house", " x")))
    assert result[1] is False


def test_a_text_without_context_is_scored(harness: NaraDLLM) -> None:
    ids = harness.tokenizer("abc").input_ids
    ((value, _),) = harness.loglikelihood(requests("loglikelihood", ("", "abc")))
    opening = 1 if ids[0] == harness.tokenizer.bos_token_id else 0
    assert value == pytest.approx(bound(harness, ids[:opening], ids[opening:]), rel=1e-5)


def test_a_context_too_long_loses_its_start(harness: NaraDLLM) -> None:
    ((value, _),) = harness.loglikelihood(requests("loglikelihood", ("y" * 80, " ab")))
    whole = encode(harness.tokenizer, "y" * 80 + " ab", has_template=False)
    answer = whole[len(encode(harness.tokenizer, "y" * 80, has_template=False)) :]
    prompt = whole[: -len(answer)][-(64 - len(answer)) :]
    assert value == pytest.approx(bound(harness, prompt, answer), rel=1e-5)
    with pytest.raises(ValueError, match=r"a continuation has 8[0-9] tokens, and the model 64 positions"):
        harness.loglikelihood(requests("loglikelihood", ("a", " " + "b" * 80)))


def test_contexts_that_lose_their_start_are_counted(harness: NaraDLLM, caplog: pytest.LogCaptureFixture) -> None:
    harness.samples, harness.greedy = 1, False
    pairs = [("y" * 80, " ab"), ("copy: ab", " ab"), ("z" * 90, " a")]
    with caplog.at_level(logging.WARNING, logger="nara_diffusion"):
        harness.loglikelihood(requests("loglikelihood", *pairs))
    assert caplog.messages == ["2 prompts don't fit into 64 tokens with their answers, and lose their start"]
    caplog.clear()
    harness.loglikelihood(requests("loglikelihood", pairs[1]))
    assert not caplog.messages


def test_results_do_not_depend_on_the_other_requests(harness: NaraDLLM) -> None:
    harness.samples = 12
    pairs = [("copy: ab", " abcdefghij"), ("copy: ab", " jihgfedcba"), ("c", " z"), ("copy: abcd", " abcdefgh")]
    together = harness.loglikelihood(requests("loglikelihood", *pairs))
    for pair, (value, greedy) in zip(pairs, together, strict=True):
        ((alone, same),) = harness.loglikelihood(requests("loglikelihood", pair))
        assert alone == pytest.approx(value, rel=1e-6)
        assert same is greedy


def test_texts_are_scored_in_windows_that_see_what_stands_before(harness: NaraDLLM) -> None:
    harness.samples, harness.max_length = 5, 12
    text = "abcdefghijklmnopqrstuvwxyz0123"
    ids = harness.tokenizer(text).input_ids
    opening = 1 if ids[0] == harness.tokenizer.bos_token_id else 0
    windows, start = [(ids[:opening], ids[opening:12])], 12
    while start < len(ids):
        windows.append((ids[start - 6 : start], ids[start : start + 6]))
        start += 6
    assert [token for _, answer in windows for token in answer] == ids[opening:]
    expected = sum(
        log_likelihood(harness.model, torch.tensor([prompt + answer]), [len(prompt)], samples=5).item()
        for prompt, answer in windows
    )
    actual = harness.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("ab",)))
    assert actual[0] == pytest.approx(expected, rel=1e-6)
    assert actual[1] == pytest.approx(bound(harness, ids[:opening], ids[opening : opening + 2]), rel=1e-5)
    assert harness.loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0.0]
