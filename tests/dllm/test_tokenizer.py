"""Prompts and answers as texts: by the tokenizer's chat template, or by Alpaca's prompt."""

from __future__ import annotations

from typing import Any

from nara_diffusion.dllm import encode_prompts, prompt_text
from tests.helpers.word_rows import BOT, END, PLAIN, TOKENIZER, TURN, USER, encoded, pairs


def test_chat_template_frames_prompt_and_answer() -> None:
    first = {"instruction": "w7 w8", "input": "w9", "output": "w10 w11", "answer": "w11"}
    rows = encoded([first, {"instruction": "w12", "output": "  w13 w14 w15", "answer": 7}])
    prompts = [[USER, 7, 8, 9, TURN, BOT], [USER, 12, TURN, BOT]]
    answers = [[10, 11, TURN, END], [13, 14, 15, TURN, END]]  # the turn as the template closes it
    assert rows["input_ids"][:] == [p + a for p, a in zip(prompts, answers, strict=True)]
    assert rows["prompt_length"][:] == [6, 4]
    assert rows["answer"][:] == ["w11", "7"]
    texts = [prompt_text(TOKENIZER, "w7 w8", "w9"), prompt_text(TOKENIZER, "w12")]
    assert encode_prompts(TOKENIZER, texts) == prompts  # what generation starts from


def test_answer_without_chat_template_follows_alpacas_prompt() -> None:
    head = "Below is an instruction that describes a task"
    more = ", paired with an input that provides further context"
    tail = ". Write a response that appropriately completes the request.\n\n### Instruction:\nw7 w8\n\n"
    assert prompt_text(PLAIN, "w7 w8") == f"{head}{tail}### Response:\n"
    assert prompt_text(PLAIN, "w7 w8", "w9") == f"{head}{more}{tail}### Input:\nw9\n\n### Response:\n"
    words = " ".join(f"w{i}" for i in range(7, 37))  # most words have to be known
    rows = encoded(pairs((words, "w10 w11"), (words, f"{words} <end>")), PLAIN, max_length=99)
    prompt: Any = PLAIN(prompt_text(PLAIN, words), add_special_tokens=False)["input_ids"]
    assert rows["input_ids"][:] == [prompt + answer for answer in ([10, 11, END], [*range(7, 37), END])]
    assert rows["prompt_length"][:] == [len(prompt)] * 2
