"""LLaDAPipeline and `exact_match` on the shipped model, which can do one-step tasks: adapters come, answer and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion.dllm import Sampling, encode_prompts, exact_match, generate, load_backbone, prompt_text
from nara_diffusion.dllm.kinds.masked_kind import CHAT_BLOCKS
from pipelines.llada import LLaDAPipeline
from tests.acceptance._text import DREAM_TINY, LLADA_TINY, nara

QUESTIONS = ["reverse: planet", "upper: planet", "sort: zebra"]
ANSWERS = ["tenalp", "PLANET", "aberz"]
LENGTH: dict[str, Any] = {"gen_length": 12}
USER = {"role": "user", "content": QUESTIONS[0]}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as PEFT saves it, whose adapter changes answers, by λ too."""
    folder = tmp_path_factory.mktemp("adapter")
    nara(load_backbone(LLADA_TINY)[0], core_hidden_dims=(8, 8)).save_pretrained(folder)
    return folder


def pipeline(folder: str | Path = LLADA_TINY, **options: Any) -> LLaDAPipeline:
    pipe = LLaDAPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shared() -> LLaDAPipeline:
    return pipeline()


def sequences(model: Any, tokenizer: Any, questions: list[str] = QUESTIONS, **options: Any) -> Tensor:
    """By `generate` itself."""
    prompts = encode_prompts(tokenizer, [prompt_text(tokenizer, question) for question in questions])
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [tokenizer.pad_token_id] * (width - len(prompt)) for prompt in prompts])
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|eot_id|>"])
    lengths = [len(prompt) for prompt in prompts]
    return generate(model, ids, prompt_lengths=lengths, eos_token_id=ends, **LENGTH, **options)


def test_pipeline_answers_questions_and_chats_in_any_batch(shared: LLaDAPipeline) -> None:
    texts, ids = shared(QUESTIONS, **LENGTH, return_dict=False)
    assert texts == shared(QUESTIONS, **LENGTH).texts == ANSWERS
    assert torch.equal(ids, sequences(*load_backbone(LLADA_TINY)))
    turns = [{"role": "user", "content": "upper: planet"}, {"role": "assistant", "content": "PLANET"}, USER]
    chat = shared.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = shared(chat, **LENGTH, apply_template=False)
    assert torch.equal(shared(turns, **LENGTH).sequences, expected.sequences)
    assert shared([turns, [USER]], **LENGTH).texts == [*expected.texts, "tenalp"]
    several: dict[str, Any] = {"temperature": 3.0, "num_answers_per_prompt": 2}
    result = shared(QUESTIONS[1:], **LENGTH, **several, generator=torch.Generator().manual_seed(0))
    starts = result.prompt_lengths.tolist()
    assert starts[0] == starts[1] != starts[2] == starts[3]
    assert not torch.equal(result.answers[0], result.answers[1])


def test_chat_prompt_is_answered_in_the_chats_blocks(shared: LLaDAPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three tokens here, where they divide the answer, and their number the steps."""
    blocks, steps = [], Sampling.tokens_per_step
    assert CHAT_BLOCKS["llama"] == 32
    monkeypatch.setitem(CHAT_BLOCKS, "llama", 3)
    monkeypatch.setitem(CHAT_BLOCKS, "qwen2", 3)  # which Dream's own chat hasn't
    monkeypatch.setattr(Sampling, "tokens_per_step", lambda self: blocks.append(self.block) or steps(self))
    for settings, block in [
        ({}, 3),
        ({"apply_template": False}, 12),
        ({"block_length": 6}, 6),
        ({"steps": 8}, 3),
        ({"steps": 6}, 12),
        ({"gen_length": 10}, 10),
    ]:
        shared(QUESTIONS[0], **{**LENGTH, **settings})
        assert {*blocks} == {block}, settings
        blocks.clear()
    generate(load_backbone(DREAM_TINY)[0], torch.tensor([[65, 66]]), chat=True, **LENGTH)
    assert {*blocks} == {12}


def test_callback_sees_each_step_and_changes_it(shared: LLaDAPipeline) -> None:
    seen = []

    def callback(given: Any, step: int, noise_level: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        seen.append((step, noise_level.item(), tensors["masked"].float().mean().item()))
        tensors["sequences"][:, -1] = shared.tokenizer.eos_token_id  # the last place of the answer
        return {"sequences": tensors["sequences"]}

    names = ["sequences", "masked"]
    options = {**LENGTH, "callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    result = shared(QUESTIONS[0], **options)
    assert [step for step, _, _ in seen] == list(range(result.forwards))
    assert seen[0][1] == 1
    assert seen[1][1] == pytest.approx(seen[0][2] - 1 / 12)  # the token put in by hand is no mask any more
    assert result.answers[0, -1] == shared.tokenizer.eos_token_id
    assert shared(QUESTIONS[1], **{**options, "callback_on_step_end": lambda *_: None}).texts == ["PLANET"]


def test_prompt_without_chat_template_is_that_of_training() -> None:
    other = pipeline()
    other.tokenizer.chat_template = None
    assert other.prompt_text(QUESTIONS[2]) == prompt_text(other.tokenizer, QUESTIONS[2])


def test_prompts_and_arguments_are_refused(shared: LLaDAPipeline) -> None:
    for prompt, arguments, message in [
        ([], {}, r"prompt is \[\], expected one or several texts"),
        (["a", " \n"], {}, r"prompt ' \\n' is empty"),
        ([{"role": "assistant", "content": "a"}], {}, "doesn't end with the user's turn"),
        ([USER], {"apply_template": False}, "without a chat template"),
        ("a", {"gen_length": 65}, "gen_length is 65, .* but the model has 64 positions"),
        ("a" * 100, {}, r"the longest prompt has \d+ tokens and gen_length is 12, .* but the model has 64 positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            shared(prompt, **{**LENGTH, **arguments})


def test_models_that_cannot_unmask_are_refused(shared: LLaDAPipeline, tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=284, **sizes))
    wrapped = get_peft_model(load_backbone(LLADA_TINY)[0], LoraConfig(target_modules=["q_proj"]))
    for model, message in ((causal, "LlamaForCausalLM, expected"), (wrapped, r"PeftModel.*pipe\.load_nara_weights")):
        with pytest.raises(ValueError, match=message):
            LLaDAPipeline(model, shared.tokenizer)
    causal.config.is_causal = False
    with pytest.raises(ValueError, match="no mask_token_id"):
        LLaDAPipeline(causal, shared.tokenizer)
    with pytest.raises(ValueError, match=r"There is no 'config\.json' in the folder"):
        LLaDAPipeline.from_pretrained(tmp_path)


def test_adapted_pipeline_answers_as_peft_and_saves_both(adapter: Path, tmp_path: Path) -> None:
    pipe = pipeline()
    base = pipe(QUESTIONS, **LENGTH).sequences
    pipe.load_nara_weights(adapter, adapter_name="mine")
    model, tokenizer = load_backbone(LLADA_TINY)
    options: dict[str, Any] = {"block_length": 6, "steps": 8, "temperature": 0.8, "cfg_scale": 0.5}
    adapted = PeftModel.from_pretrained(model, adapter)
    expected = sequences(adapted, tokenizer, generator=torch.Generator().manual_seed(3), **options)
    actual = pipe(QUESTIONS, generator=torch.Generator().manual_seed(3), **LENGTH, **options).sequences
    assert torch.equal(actual, expected)
    greedy = pipe(QUESTIONS, **LENGTH).sequences
    assert torch.equal(greedy, sequences(adapted, tokenizer))
    assert not torch.equal(greedy, base)
    pipe.save_nara_weights(tmp_path / "adapter", "mine")
    pipe.unload_nara_weights()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    pipe.save_pretrained(tmp_path / "pipe")
    again = pipeline(tmp_path / "pipe")
    assert again(QUESTIONS, **LENGTH).texts == ANSWERS
    again.load_nara_weights(tmp_path / "adapter")
    assert torch.equal(again(QUESTIONS, **LENGTH).sequences, greedy)


def rows_of(answers: list[str]) -> list[dict[str, Any]]:
    tokenizer = load_backbone(LLADA_TINY)[1]
    prompts = encode_prompts(tokenizer, [prompt_text(tokenizer, question) for question in QUESTIONS])
    return [
        {"input_ids": [*prompt, 65, 66], "prompt_length": len(prompt), "instruction": question, "answer": answer}
        for prompt, question, answer in zip(prompts, QUESTIONS, answers, strict=True)
    ]


def test_exact_match_is_the_share_of_right_answers() -> None:
    model, tokenizer = load_backbone(LLADA_TINY)
    rows = rows_of([ANSWERS[0], "planet", f" {ANSWERS[2]}\n"])
    result = exact_match(model, tokenizer, rows, **LENGTH, batch_size=2, progress=False)
    assert (result.correct, result.total, result.score) == (2, 3, pytest.approx(2 / 3))
    assert [generation["generation"] for generation in result.generations] == ANSWERS
    assert [generation["correct"] for generation in result.generations] == [True, False, True]
    rows[0]["answer"] = "other"
    by_function = exact_match(model, tokenizer, rows, **LENGTH, extract=str.lower, progress=False)
    assert [generation["correct"] for generation in by_function.generations] == [False, True, False]
