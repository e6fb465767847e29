import torch
from quality.text import answers
from quality.text.answers import answered_right

from nara_diffusion.dllm import Generation


def test_answers_are_generated_from_prompts_alone_and_judged_one_by_one(task, monkeypatch):
    """A sampler that answers every other question rightly; one answer of those is another right one."""
    rows, tokenizer = task.data.test, task.tokenizer
    by_prompt = {}
    for i, question in enumerate(rows.questions):
        start = int(rows.prompt_lengths[i])
        text = question.answer if i % 2 == 0 else "3" + question.answer
        by_prompt[tuple(rows.input_ids[i, :start].tolist())] = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]

    def sampler(model, prompts, *, prompt_lengths, gen_length, eos_token_id, **_):
        tokens = torch.full((len(prompts), gen_length), 7)
        for row, prompt, length in zip(tokens, prompts, prompt_lengths, strict=True):
            answer = by_prompt[tuple(prompt[:length].tolist())][:gen_length]
            row[: len(answer)] = torch.tensor(answer)
        assert tokenizer.eos_token_id in eos_token_id
        return Generation(prompts, tokens, prompt_lengths, 1)

    monkeypatch.setattr(answers, "generate", sampler)
    monkeypatch.setattr(answers, "BATCH", 3)
    assert answered_right(task.model, tokenizer, rows) == 0.5


def test_the_untrained_model_answers_nothing_rightly(task):
    assert answered_right(task.model, task.tokenizer, task.data.test) == 0
