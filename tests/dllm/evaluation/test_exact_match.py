"""Loss over λ, exact match and likelihood against sums written out."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from nara_diffusion import noise_level
from nara_diffusion.dllm import (
    AnswerCollator,
    encode_records,
    exact_match,
    generate,
    log_likelihood,
    mask_answers,
    noise_level_curve,
)
from nara_diffusion.dllm.data.records import normalized
from nara_diffusion.dllm.evaluation.answers import rule_of
from nara_diffusion.dllm.evaluation.exact_match import stop_token_ids
from nara_diffusion.dllm.evaluation.likelihood import stratified_masks
from tests.dllm.models.llada_reference import save_tokenizer

MASK, END = 49, 1
ROWS = [
    {"input_ids": [5, 6, 7, 8, END], "prompt_length": 2},
    {"input_ids": [9, 6, 7, 8, 9, 10, 11, END], "prompt_length": 1},
    {"input_ids": [5, 6, 12, 13, 14, END], "prompt_length": 3},
]


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_noise_level_curve_is_the_ratio_of_its_docstring(adapted_llama: PeftModel, batch_size: int) -> None:
    collator = AnswerCollator(END, trained_padding=1)
    levels = [0.2, 0.7, 1.0]
    curve = noise_level_curve(
        adapted_llama, ROWS, levels, collator=collator, batch_size=batch_size, repeats=2, seed=3, progress=False
    )
    expected = []
    for level in levels:
        total = count = 0.0
        for repeat, (index, row) in itertools.product(range(2), enumerate(ROWS)):
            batch = mask_answers(
                **collator([row]), mask_token_id=MASK, noise_level=level, seed=3, sample_indices=[3 * repeat + index]
            )
            with noise_level(adapted_llama, level):
                logits = adapted_llama(batch.input_ids).logits[0]
            length = len(row["input_ids"]) + 1 - row["prompt_length"]
            for j in batch.masked[0].nonzero().flatten().tolist():
                total -= F.log_softmax(logits[j].double(), -1)[batch.targets[0, j]].item() / length
                count += 1 / length
        expected.append(total / count)
    assert curve == pytest.approx(expected, rel=1e-5)


def test_curves_leave_the_model_as_it_was_and_are_repeatable(adapted_llama: PeftModel) -> None:
    adapted_llama.train()
    adapted_llama.base_model.model.lm_head.eval()
    modes = [module.training for module in adapted_llama.modules()]
    collator = AnswerCollator(END)
    one, two = (
        noise_level_curve(adapted_llama, ROWS, [0.5], collator=collator, progress=False, repeats=4) for _ in range(2)
    )
    assert one == two
    assert [module.training for module in adapted_llama.modules()] == modes
    assert math.isnan(noise_level_curve(adapted_llama, ROWS, [1e-6], collator=collator, progress=False)[0])


def test_without_collator_each_answer_counts_with_its_end_alone(adapted_llama: PeftModel) -> None:
    alone = AnswerCollator(END, trained_padding=0)
    curves = [noise_level_curve(adapted_llama, ROWS, [0.5], **c, progress=False) for c in ({}, {"collator": alone})]
    assert curves[0] == pytest.approx(curves[1])
    with pytest.raises(ValueError, match="no rows"):
        noise_level_curve(adapted_llama, [], [0.5])
    with pytest.raises(ValueError, match="batch_size is 0"):
        noise_level_curve(adapted_llama, ROWS, [0.5], batch_size=0)
    with pytest.raises(ValueError, match="at 0 nothing is masked"):
        noise_level_curve(adapted_llama, ROWS, [0.0], progress=False)


# exact match


@pytest.fixture
def tokenizer(tmp_path: Path):
    save_tokenizer(tmp_path, 50, chat=True)
    return AutoTokenizer.from_pretrained(tmp_path)


def encoded(tokenizer, answers: list[str]):
    questions = ["w5", "w6 w7 w8", "w9 w10", "w11 w12 w13 w14"]
    records = [{"instruction": q, "output": "w20", "answer": a} for q, a in zip(questions, answers, strict=True)]
    return encode_records(normalized(records, source="test"), tokenizer, max_length=64).rows


@pytest.mark.parametrize("batch_size", [1, 3])
def test_exact_match_counts_what_generate_answers(tiny_llama: LlamaForCausalLM, tokenizer, batch_size: int) -> None:
    options = {"gen_length": 4, "steps": 2, "block_length": 2}
    tiny_llama.config.eos_token_id = END
    rows = encoded(tokenizer, ["w20"] * 4)
    answers = []
    for row in rows:
        prompt = torch.tensor([row["input_ids"][: row["prompt_length"]]])
        tokens = generate(tiny_llama, prompt, **options)[0, prompt.shape[1] :].tolist()
        tokens = tokens[: tokens.index(END)] if END in tokens else tokens
        answers.append(" ".join(f"w{token}" for token in tokens))
    rows = encoded(tokenizer, [answers[0], "w20 w21", answers[2].replace(" ", "  "), "w30"])
    result = exact_match(tiny_llama, tokenizer, rows, batch_size=batch_size, progress=False, **options)
    assert [generation["generation"] for generation in result.generations] == answers
    assert [generation["correct"] for generation in result.generations] == [True, False, True, False]
    assert (result.score, result.correct, result.total) == (0.5, 2, 4)
    assert result.forwards == 2 * math.ceil(4 / batch_size)
    mine = exact_match(
        tiny_llama,
        tokenizer,
        rows,
        batch_size=batch_size,
        progress=False,
        extract=lambda text: text[:0] + "x",
        **options,
    )
    assert mine.score == 1.0


def test_answers_end_at_any_end_token(tiny_llama: LlamaForCausalLM, tokenizer) -> None:
    tiny_llama.config.eos_token_id = [END, 7]
    assert stop_token_ids(tiny_llama, tokenizer) == [1, 7]
    tokenizer.add_tokens(["<|eot_id|>"])
    assert stop_token_ids(tiny_llama, tokenizer) == [1, 7, len(tokenizer) - 1]


@pytest.mark.parametrize(
    ("extract", "text", "answer", "named", "is_right"),
    [
        ("text", " two  words\n", "two words", "two words", True),
        ("text", "", "", "", False),
        ("number", "so 3 + 4 = 7, and 1,250.50 is the answer", "1250.5", "1250.5", True),
        ("number", "the answer is -12.", "-12", "-12", True),
        ("number", "1234567", "1234568", "1234567", False),
        ("number", "0.3333", "0.333", "0.3333", True),
        ("number", "0.335", "0.333", "0.335", False),
        ("number", "none", "1", "", False),
        ("number", "1", "none", "1", False),
        ("choice", "the correct answer is Option2", "option2", "option2", True),
        ("choice", "the correct answer is answer2, not answer1", "answer2", "answer2", True),
        ("choice", "answer1, not answer2", "the correct answer is answer2", "answer1", False),
        ("choice", "True is not the question: ending3", "ending3", "ending3", True),
        ("choice", "True or false? false", "false", "true", False),
        ("choice", "untrue", "true", "", False),
        ("choice", "A is wrong. The answer is (B).", "B", "B", True),
        ("choice", "The Answer is Clear", "C", "", False),
        ("choice", "answer1", "what you like", "", False),
    ],
)
def test_what_a_text_names(extract: str, text: str, answer: str, named: str, is_right: bool) -> None:
    assert rule_of(extract, [answer])(text, answer) == (named, is_right)


def test_a_set_has_as_many_choices_as_its_answers_name_and_those_of_llm_adapters_at_least() -> None:
    text = "option3, not option1"
    assert rule_of("choice", ["option1", "option2"])(text, "option1") == ("option1", True)
    assert rule_of("choice", ["option1", "option4"])(text, "option1") == ("option3", False)


def say(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """The answers are these, one after the other."""
    left = iter(texts)
    monkeypatch.setattr("nara_diffusion.dllm.evaluation.exact_match.decode_answer", lambda *_: next(left))


def test_exact_match_goes_by_its_rule(tiny_llama: LlamaForCausalLM, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = encoded(tokenizer, ["1234567", "2", "3.0", "4"])
    say(monkeypatch, "1234567", "I say 3", "-2", "4 or 5")  # the second prompt is longer than the third
    options = {"gen_length": 2, "batch_size": 1, "progress": False}
    result = exact_match(tiny_llama, tokenizer, rows, extract="number", **options)
    assert [generation["correct"] for generation in result.generations] == [True, False, True, False]
    assert [generation["extracted"] for generation in result.generations] == ["1234567", "-2", "3", "5"]
    say(monkeypatch, *["1234568"] * 4)
    assert exact_match(tiny_llama, tokenizer, rows, extract="number", **options).correct == 0


def test_right_answers_that_name_nothing_are_told(
    tiny_llama: LlamaForCausalLM, tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = encoded(tokenizer, ["answer1", "b", "answer1", "none"])
    say(monkeypatch, *["answer1"] * 4)
    options = {"gen_length": 2, "batch_size": 1, "progress": False}
    assert exact_match(tiny_llama, tokenizer, rows, extract="choice", **options).correct == 2
    (message,) = caplog.messages
    assert message.startswith("2 of 4 right answers name nothing by the rule 'choice', the first of them 'b'")


def test_exact_match_refuses_no_rows_and_unknown_rules(tiny_llama: LlamaForCausalLM, tokenizer) -> None:
    with pytest.raises(ValueError, match="no rows"):
        exact_match(tiny_llama, tokenizer, [], gen_length=4)
    with pytest.raises(ValueError, match="extract is 'digits', expected one of 'text', 'number', 'choice'"):
        exact_match(tiny_llama, tokenizer, ROWS, gen_length=4, extract="digits")


# likelihood


class Independent(nn.Module):
    """A model whose prediction doesn't depend on its input: its likelihood is exact, whatever is masked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*input_ids.shape, -1)


def test_likelihood_of_an_independent_model_is_exact_in_expectation() -> None:
    model = Independent(torch.randn(50, dtype=torch.float64))
    input_ids = torch.tensor([[5, 6, 7, 8, 9, 1, 1], [5, 6, 7, 8, 9, 10, 11]])
    estimate = log_likelihood(
        model, input_ids, [2, 4], answer_lengths=[3, 3], samples=4000, batch_size=500, mask_token_id=MASK
    )
    log_p = model.logits.log_softmax(0)
    expected = torch.stack([log_p[[7, 8, 9]].sum(), log_p[[9, 10, 11]].sum()])
    assert torch.allclose(estimate, expected, rtol=0.02)


@torch.no_grad()
def test_likelihood_is_the_sum_over_counts_and_masks(adapted_llama: PeftModel) -> None:
    """All masks of all counts, enumerated, against the estimate; λ = k / n reaches the adapter."""
    input_ids = torch.tensor([[5, 6, 7, 8, 9]])
    exact = 0.0
    for k in (1, 2, 3):
        subsets = list(itertools.combinations((2, 3, 4), k))
        for subset in subsets:
            tokens = input_ids.clone()
            tokens[0, list(subset)] = MASK
            with noise_level(adapted_llama, k / 3):
                log_p = adapted_llama(tokens).logits[0].double().log_softmax(-1)
            exact += sum(log_p[j, input_ids[0, j]].item() for j in subset) * 3 / k / len(subsets) / 3
    estimate = log_likelihood(adapted_llama, input_ids, [2], samples=3000, batch_size=200)
    assert estimate.item() == pytest.approx(exact, rel=0.01)
    again = log_likelihood(adapted_llama, input_ids, [2], samples=3000, batch_size=77)
    assert again.item() == pytest.approx(estimate.item(), rel=1e-6)


def test_counts_are_stratified() -> None:
    answer = torch.tensor([False, True, True, True, True, False])
    masks, counts = stratified_masks(answer, 8, np.random.default_rng(0))
    assert counts.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(masks.sum(1), counts)
    assert not masks[:, ~answer].any()
    _, counts = stratified_masks(answer, 400, np.random.default_rng(1))
    assert torch.bincount(counts).tolist() == [0, 100, 100, 100, 100]


def test_likelihood_refusals(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="samples is 0"):
        log_likelihood(tiny_llama, torch.ones(1, 4, dtype=torch.long), [1], samples=0)
