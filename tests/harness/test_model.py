"""lm-eval's three kinds of request, against λ and masks worked out by hand."""

from __future__ import annotations

import itertools
import logging
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from nara_diffusion import noise_level
from nara_diffusion.dllm import encode_prompts, load_backbone, log_likelihood, prompt_text
from nara_diffusion.harness.model import NaraDLLM
from nara_diffusion.harness.prompts import encode
from tests.dllm.generation_reference import reference_generate

from .conftest import LLADA_TINY, make_adapter


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=args, idx=i, metadata=("t", i, 1)) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def harness(adapter: Path) -> NaraDLLM:
    return NaraDLLM(str(LLADA_TINY), str(adapter), batch_size=3, device="cpu")


@pytest.fixture(autouse=True)
def _as_loaded(request: pytest.FixtureRequest) -> None:
    if "harness" in request.fixturenames:
        harness: NaraDLLM = request.getfixturevalue("harness")
        harness.has_template, harness.greedy, harness.samples, harness.max_length = False, True, 128, 64


@torch.no_grad()
def logits_at(harness: NaraDLLM, tokens: list[int], level: float) -> torch.Tensor:
    with noise_level(harness.model, level):
        return harness.model(torch.tensor([tokens])).logits[0].double()


def bound(harness: NaraDLLM, prompt: list[int], answer: list[int]) -> float:
    """Σ over all masks of the answer, λ told as the masked share of it."""
    n, total = len(answer), 0.0
    for k in range(1, n + 1):
        for subset in itertools.combinations(range(n), k):
            shown = [283 if j in subset else token for j, token in enumerate(answer)]
            log_p = logits_at(harness, prompt + shown, k / n).log_softmax(-1)
            total += sum(log_p[len(prompt) + j, answer[j]].item() for j in subset) / k / comb(n, k)
    return total


# generation

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


def test_an_answer_longer_than_the_model_is_refused(harness: NaraDLLM) -> None:
    with pytest.raises(
        ValueError, match=r"gen_length is 64 and the model has 64 positions .* --gen_kwargs gen_length=N"
    ):
        harness.generate_until(requests("generate_until", ("q", {"gen_length": 64})))


# likelihood


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


class Noted:
    """As lm-eval's CacheHook, which puts what is done so far on disk."""

    def __init__(self) -> None:
        self.done: dict[tuple, Any] = {}

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.done[attr, str(req)] = res


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood", "loglikelihood_rolling"])
def test_what_is_done_is_cached_at_once(harness: NaraDLLM, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that --use_cache lets a run go on that was stopped in the middle."""
    monkeypatch.setattr("nara_diffusion.harness.model._GROUP", 1)
    monkeypatch.setattr(harness, "batch_size", 1)
    harness.samples, harness.greedy = 3, False
    given = {
        "generate_until": [("a", {"gen_length": 2}), ("b", {"gen_length": 2}), ("c", {"gen_length": 2})],
        "loglikelihood": [("a", " x"), ("b", " y"), ("c", " z")],
        "loglikelihood_rolling": [("ab",), ("cd",), ("ef",)],
    }[kind]
    expected = getattr(harness, kind)(requests(kind, *given))
    noted = Noted()
    monkeypatch.setattr(harness, "cache_hook", noted)
    calls = itertools.count()
    inner = "_generated" if kind == "generate_until" else "_log_likelihoods"
    original = getattr(harness, inner)

    def stopped(*args: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(harness, inner, stopped)
    with pytest.raises(KeyboardInterrupt):
        getattr(harness, kind)(requests(kind, *given))
    assert noted.done == {(kind, str(args)): value for args, value in zip(given[:2], expected[:2], strict=True)}


# prompts


def test_a_question_in_the_template_is_the_prompt_of_training(harness: NaraDLLM) -> None:
    assert harness.chat_template(True) == harness.tokenizer.chat_template
    text = harness.apply_chat_template([{"role": "user", "content": "reverse: planet"}])
    assert text == prompt_text(harness.tokenizer, "reverse: planet")
    expected = encode_prompts(harness.tokenizer, [text])[0]
    assert encode(harness.tokenizer, text, has_template=harness.has_template) == expected
    begun = harness.apply_chat_template(
        [{"role": "user", "content": "reverse: planet"}, {"role": "assistant", "content": "ten"}], False
    )
    assert begun == text + "ten"


# loading


def test_the_adapter_says_what_model_it_belongs_to(adapter: Path, harness: NaraDLLM) -> None:
    loaded = NaraDLLM(peft=str(adapter), batch_size="2", device="cpu")
    tokens = encode(harness.tokenizer, "upper: ab", has_template=False)
    assert torch.equal(logits_at(loaded, tokens, 0.4), logits_at(harness, tokens, 0.4))


def test_a_plain_lora_is_evaluated_too(tmp_path: Path) -> None:
    base, _ = load_backbone(str(LLADA_TINY))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    harness = NaraDLLM(str(LLADA_TINY), str(tmp_path), device="cpu", dtype="float32")
    tokens = encode(harness.tokenizer, "upper: ab", has_template=False)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([tokens])).logits
        assert torch.equal(harness.model(torch.tensor([tokens])).logits, expected)
    (text,) = harness.generate_until(requests("generate_until", ("upper: ab", {"gen_length": 2})))
    assert isinstance(text, str)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "names no model"),
        ({"gen_length": 12}, "gen_length in --model_args: .* belong to --gen_kwargs"),
        ({"batch_size": "auto"}, "--batch_size auto: .* name one"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"pretraned": "x"}, "--model_args has pretraned, which nara_dllm doesn't know"),
        ({"dtype": "float12"}, "dtype is 'float12', expected auto"),
        ({"device": "cuda:99"}, "--device cuda:99 can't be used"),
    ],
)
def test_impossible_arguments_are_told(arguments: dict[str, Any], message: str) -> None:
    model = {} if message == "names no model" else {"pretrained": str(LLADA_TINY)}
    with pytest.raises(ValueError, match=message):
        NaraDLLM(**{"device": "cpu", **model, **arguments})


def test_an_adapter_with_another_noise_level_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path, noise_convention="flow")
    with pytest.raises(ValueError, match="was trained with λ as 'flow', and the λ of a masked-diffusion"):
        NaraDLLM(str(LLADA_TINY), str(tmp_path), device="cpu")


def test_a_model_in_four_bits_answers_nearly_as_the_whole_one(adapter: Path, harness: NaraDLLM) -> None:
    pytest.importorskip("bitsandbytes")
    small = NaraDLLM(str(LLADA_TINY), str(adapter), device="cpu", load_in_4bit=True, dtype="float32")
    layer = small.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    assert type(layer).__name__ == "Linear4bit"
    tokens = encode(harness.tokenizer, "upper: ab", has_template=False)
    ours, theirs = logits_at(small, tokens, 0.4), logits_at(harness, tokens, 0.4)
    assert 0 < (ours - theirs).norm() < 0.3 * theirs.norm()


def test_no_hook_moves_weights_about(harness: NaraDLLM) -> None:
    """PEFT hooks a model that has a map of devices with the CPU on it."""
    assert [name for name, module in harness.model.named_modules() if hasattr(module, "_hf_hook")] == []


def test_virtual_tokens_stand_before_each_text(tmp_path: Path, harness: NaraDLLM) -> None:
    """Prompt tuning: logits of the text alone, answers and likelihoods as the model with its tokens gives them."""
    base, _ = load_backbone(str(LLADA_TINY))
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path)
    tuned = NaraDLLM(str(LLADA_TINY), str(tmp_path), device="cpu")
    assert tuned.max_length == 61

    @torch.no_grad()
    def logits(tokens: list[int], _: float = 0.0) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0, 3:].double()

    prompt = encode(harness.tokenizer, "upper: ab", has_template=False)
    answer, _ = reference_generate(logits, prompt, gen_length=4, steps=2, block_length=4, mask=283)
    ask = {"gen_length": 4, "steps": 2, "until": []}
    tuned.ends = []
    (text,) = tuned.generate_until(requests("generate_until", ("upper: ab", ask)))
    assert text == harness.tokenizer.decode(answer, skip_special_tokens=True)
    ((value, _),) = tuned.loglikelihood(requests("loglikelihood", ("upper: ", "A")))
    whole = encode(harness.tokenizer, "upper: A", has_template=False)
    expected = logits([*whole[:-1], 283]).log_softmax(-1)[-1, whole[-1]].item()
    assert value == pytest.approx(expected, rel=1e-5)
