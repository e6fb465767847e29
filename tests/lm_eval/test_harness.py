"""lm-eval's requests to a model with an adapter, against the sampler and the likelihood of each alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from nara_diffusion.dllm import encode_records, generate, load_backbone, log_likelihood
from nara_diffusion.dllm.records import normalized
from nara_diffusion.lm_eval.harness_model import NaraDLLM, load_adapted
from nara_diffusion.lm_eval.harness_text import encode, encode_pair, read_gen_kwargs, templated
from tests.acceptance._text import DREAM_BOS, DREAM_MASK, DREAM_TINY, DreamByHand, greedy, nara
from tests.acceptance._text import bound as all_masks

from .conftest import LLADA_TINY

QUESTIONS = ["reverse: planet", "upper: a", "copy: abcdefgh", "sort: zebra", "swap: tea"]


@pytest.fixture(scope="module")
def loaded(adapter: str) -> NaraDLLM:
    return NaraDLLM(LLADA_TINY, adapter, batch_size=3, device="cpu")


@pytest.fixture
def harness(loaded: NaraDLLM, monkeypatch: pytest.MonkeyPatch) -> NaraDLLM:
    for name, value in {"has_template": False, "greedy": True, "samples": 128, "max_length": 64}.items():
        monkeypatch.setattr(loaded, name, value)
    return loaded


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=args, idx=i, metadata=("t", i, 1)) for i, args in enumerate(arguments)]


def bound(harness: NaraDLLM, prompt: list[int], answer: list[int], **options: Any) -> float:
    return log_likelihood(harness.model, torch.tensor([prompt + answer]), [len(prompt)], **options).item()


def answer_of(harness: NaraDLLM, prompt: list[int], **options: Any) -> list[int]:
    """By the sampler alone, the end and what stands behind it included."""
    tokens: Any = generate(harness.model, torch.tensor([prompt]), eos_token_id=harness.ends, **options)
    return tokens[0, len(prompt) :].tolist()


def test_generate_until_answers_as_the_sampler_does(harness: NaraDLLM) -> None:
    settings = {"gen_length": 8, "steps": 4, "block_length": 4, "until": [], "do_sample": False}
    shorter = {"max_gen_toks": 4, "until": "\n"}
    questions = [(question, settings) for question in QUESTIONS] + [(QUESTIONS[0], shorter)]
    for (question, how), text in zip(
        questions, harness.generate_until(requests("generate_until", *questions)), strict=True
    ):
        length = how.get("gen_length", 4)
        prompt = encode(harness.tokenizer, question, has_template=False)
        answer = answer_of(harness, prompt, gen_length=length, steps=4, block_length=4)
        end = next((j for j, token in enumerate(answer) if token in harness.ends), length)
        expected = harness.tokenizer.decode(answer[:end], skip_special_tokens=True)
        assert text == (expected.split("\n")[0] if how is shorter else expected)


def test_canvas_model_answers_itself_and_has_no_likelihood() -> None:
    harness = NaraDLLM(str(Path(LLADA_TINY).with_name("gemma-tiny")), batch_size=3, device="cpu")
    calls = []
    for question in ("reverse: planet", "upper: planet", "sort: zebra"):
        prompt = harness.apply_chat_template([{"role": "user", "content": question}])
        calls.append((prompt, {"gen_length": 16, "until": []}))
    torch.manual_seed(0)
    assert harness.generate_until(requests("generate_until", *calls)) == ["tenalp", "PLANET", "aberz"]
    with pytest.raises(ValueError, match="random tokens in place of masks"):
        harness.loglikelihood(requests("loglikelihood", ("a", "b")))


@pytest.mark.parametrize(
    ("until", "expected"),
    [(["three", ".", "stop"], "  one "), ("two", "  one stop "), ([], "  one stop two. three")],
)
def test_generate_until_stops_before_stop_text_keeping_spaces(
    harness: NaraDLLM, monkeypatch: pytest.MonkeyPatch, until: Any, expected: str
) -> None:
    ids = harness.tokenizer("  one stop two. three", add_special_tokens=False).input_ids
    answers = torch.tensor([[*ids, harness.tokenizer.eos_token_id, *ids]])
    generation = type("Found", (), {"answers": answers})
    monkeypatch.setattr("nara_diffusion.lm_eval.harness_model.answer_prompts", lambda *_, **__: generation)
    assert harness.generate_until(requests("generate_until", ("q", {"until": until, "gen_length": 30}))) == [expected]


def test_prompts_too_long_lose_their_start(harness: NaraDLLM, caplog: pytest.LogCaptureFixture) -> None:
    long = "copy: " + "x" * 100
    with caplog.at_level(logging.WARNING, logger="nara_diffusion"):
        (text,) = harness.generate_until(requests("generate_until", (long, {"gen_length": 4})))
    assert caplog.messages[-1:] == ["1 of 1 prompts lose their start, since with the answer they exceed 64 tokens."]
    tokens = encode(harness.tokenizer, long, has_template=False)[-60:]
    assert text == harness.tokenizer.decode(answer_of(harness, tokens, gen_length=4), skip_special_tokens=True)
    with pytest.raises(ValueError, match=r"gen_length is 64 and the model has 64 positions"):
        harness.generate_until(requests("generate_until", ("q", {"gen_length": 64})))


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_loglikelihood_is_the_bound_at_mask_levels(
    harness: NaraDLLM, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    monkeypatch.setattr(harness, "cfg_scale", scale)
    pairs = [("reverse: ab", " ba"), ("reverse: ab", " abcd"), ("upper: house", " H"), ("copy: ab ", "cd")]
    actual = harness.loglikelihood(requests("loglikelihood", *pairs))
    for (context, continuation), (value, is_greedy) in zip(pairs, actual, strict=True):
        text = encode(harness.tokenizer, context + continuation, has_template=False)
        length = len(encode(harness.tokenizer, context.rstrip(), has_template=False))
        prompt, answer = text[:length], text[length:]
        assert value == pytest.approx(bound(harness, prompt, answer, cfg_scale=scale), rel=1e-5)
        options = {"gen_length": len(answer), "stop_at_eos": False, "cfg_scale": scale}
        assert is_greedy is (answer_of(harness, prompt, **options) == answer)
    with pytest.raises(ValueError, match=r"A continuation has 8[0-9] tokens, but the model has room for 64"):
        harness.loglikelihood(requests("loglikelihood", ("a", " " + "b" * 80)))


@pytest.mark.parametrize("has_chat_template", [True, False])
def test_template_makes_prompt_and_answer_of_training(
    harness: NaraDLLM, has_chat_template: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_chat_template:
        monkeypatch.setattr(harness.tokenizer, "chat_template", None)
    assert harness.chat_template(True) == (harness.tokenizer.chat_template or "alpaca")
    records = normalized([{"instruction": "reverse: ab", "output": "ba", "answer": "ba"}], source="test")
    row = encode_records(records, harness.tokenizer, max_length=512).rows[0]
    prompt, closed = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
    context = harness.apply_chat_template([{"role": "user", "content": "reverse: ab"}])
    assert encode(harness.tokenizer, context, has_template=True) == prompt
    ((value, _),) = harness.loglikelihood(requests("loglikelihood", (context, "ba")))
    assert value == pytest.approx(bound(harness, prompt[-62:], closed[:2]), rel=1e-5)


def test_encode_pair_is_the_whole_text_divided() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLADA_TINY)
    assert encode_pair(tokenizer, "", "ab", has_template=False) == ([], tokenizer("ab").input_ids)
    with pytest.raises(ValueError, match="The continuation '' adds no token"):
        encode_pair(tokenizer, "one", "", has_template=False)
    prompt, answer = encode_pair(tokenizer, "ab ", "cd", has_template=False)
    assert (prompt, prompt + answer) == (tokenizer("ab").input_ids, tokenizer("ab cd").input_ids)


def test_encode_pair_keeps_an_answers_start_in_prompt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLADA_TINY)
    turns = [{"role": "user", "content": "copy: ab"}, {"role": "assistant", "content": "ab"}]
    context = templated(tokenizer, turns, add_generation_prompt=False)
    prompt, answer = encode_pair(tokenizer, context, " cd", has_template=True)
    assert prompt == encode(tokenizer, context, has_template=True)
    assert answer == tokenizer(" cd", add_special_tokens=False).input_ids


def test_read_gen_kwargs_takes_lm_evals_names_only() -> None:
    for gen_kwargs, until, sampling in [
        ({}, (), {"gen_length": 256}),
        ({"max_gen_toks": 8, "until": "x", "temperature": 0.7, "do_sample": False}, ("x",), {"gen_length": 8}),
        ({"gen_length": 6, "max_gen_toks": 8, "steps": 3.0, "top_k": 9}, (), {"gen_length": 6, "steps": 3}),
        ({"max_tokens": 4, "temperature": 0.5, "top_p": 0.9}, (), {"gen_length": 4, "temperature": 0.5, "top_p": 0.9}),
    ]:
        assert read_gen_kwargs(gen_kwargs) == (until, sampling)
    for gen_kwargs, message in [
        ({"top_k": 9, "temperature": 1}, "gen_kwargs has top_k, but the sampler's settings are"),
        ({"beams": 3}, "gen_kwargs has beams"),
        ({"steps": "many"}, "gen_kwargs: .*'many'"),
        ({"temperature": "hot"}, "gen_kwargs: .*'str'"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_gen_kwargs(gen_kwargs)


def test_impossible_arguments_are_refused_by_name() -> None:
    for arguments, message in [
        ({}, "names no model"),
        ({"pretrained": LLADA_TINY, "gen_length": 12}, "--model_args has gen_length.* belong in --gen_kwargs"),
        ({"pretrained": LLADA_TINY, "max_length": 65}, "max_length is 65, but the model has 64 positions"),
        ({"peft": "outputs/dllm-9"}, "'outputs/dllm-9' is not a local folder, and the Hub can't be reached"),
    ]:
        with pytest.raises(ValueError, match=message):
            NaraDLLM(**{"device": "cpu", **arguments})


def test_adapter_with_another_noise_level_is_refused(tmp_path: Any) -> None:
    nara(load_backbone(LLADA_TINY)[0], noise_convention="flow").save_pretrained(tmp_path)
    harness = NaraDLLM(LLADA_TINY, str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match=r"was trained with λ defined as 'flow', and this is 'masked_share'"):
        harness.loglikelihood(requests("loglikelihood", ("a", "b")))


def test_adapter_names_its_base_also_as_plain_lora(adapter: str, harness: NaraDLLM, tmp_path: Any) -> None:
    tokens = encode(harness.tokenizer, "upper: ab", has_template=False)
    alone = NaraDLLM(peft=adapter, batch_size="2", device="cpu")
    assert bound(alone, tokens[:-2], tokens[-2:]) == bound(harness, tokens[:-2], tokens[-2:])
    model = get_peft_model(
        load_backbone(LLADA_TINY)[0], LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    model.save_pretrained(tmp_path)
    lora = NaraDLLM(LLADA_TINY, str(tmp_path), device="cpu")
    with torch.no_grad():
        assert torch.equal(*(one(torch.tensor([tokens])).logits for one in (lora.model, model)))


def test_base_is_read_from_the_adapters_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def from_pretrained(source: str, revision: str | None = None) -> LoraConfig:
        asked.append(revision)
        return LoraConfig(base_model_name_or_path="./no-such-base")

    monkeypatch.setattr("nara_diffusion.lm_eval.harness_model.PeftConfig.from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="no-such-base"):
        load_adapted(None, "someone/adapter", "cpu", peft_revision="v2")
    assert asked == ["v2"]


def test_dream_texts_begin_with_bos_as_in_paper() -> None:
    harness, by_hand = NaraDLLM(DREAM_TINY, device="cpu", batch_size=2, samples=64), DreamByHand()
    log_p = lambda ids, level: by_hand([ids], level)[0].log_softmax(-1)  # noqa: E731
    ids = harness.tokenizer("upper: ab").input_ids
    questions = [("", "ab"), ("upper: a", "b"), ("<|startoftext|>", "ab")]
    pairs = [([DREAM_BOS], ids[-2:]), ([DREAM_BOS, *ids[:3]], ids[3:]), ([DREAM_BOS], ids[-2:])]
    values = [value for value, _ in harness.loglikelihood(requests("loglikelihood", *questions))]
    expected = [float(all_masks(*pair, DREAM_MASK, log_p)) for pair in pairs]
    assert values == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="loglikelihood_rolling"):
        harness.loglikelihood_rolling(requests("loglikelihood_rolling", ("upper: ab",)))
    for text, prompt in (("", [DREAM_BOS]), ("upper: ab", [DREAM_BOS, *ids])):
        tokens, _ = greedy(by_hand, prompt, gen_length=4, block_length=4, mask=DREAM_MASK, ends=harness.ends)
        (answer,) = harness.generate_until(requests("generate_until", (text, {"gen_length": 4})))
        length = next((i for i, token in enumerate(tokens) if token in harness.ends), 4)
        assert answer == harness.tokenizer.decode(tokens[:length], skip_special_tokens=True)
