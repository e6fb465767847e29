import torch
from quality.text.data import encode_domain

from tests.benchmarks.quality.conftest import SMALL


def test_a_row_is_prompt_answer_end_and_ends_to_learn(task):
    rows, tokenizer = task.data.train, task.tokenizer
    longest = max(len(question.answer) for question in rows.questions)
    assert rows.answer_length >= longest + 1
    for index in (0, 1, 7):
        question, start = rows.questions[index], int(rows.prompt_lengths[index])
        text = tokenizer.decode(rows.input_ids[index])
        assert text.startswith(
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
            f"{question.text}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{question.answer}<|eot_id|>"
        )
        end = start + len(tokenizer(question.answer)["input_ids"])
        assert tokenizer.decode(rows.input_ids[index, end]) == "<|eot_id|>"
        assert (rows.input_ids[index, end + 1 :] == tokenizer.eos_token_id).all()


def test_all_parts_have_one_answer_length(task):
    lengths = {getattr(task.data, part).answer_length for part in ("train", "tuning", "validation", "test")}
    assert len(lengths) == 1


def test_a_batch_is_no_wider_than_it_needs(task):
    rows = task.data.train
    shortest = rows.prompt_lengths.argsort()[:3]
    batch = rows.batch(shortest)
    width = int(rows.prompt_lengths[shortest].max()) + rows.answer_length
    assert batch["input_ids"].shape == (3, width)
    assert torch.equal(batch["input_ids"], rows.input_ids[shortest, :width])
    assert batch["answer_lengths"].tolist() == [rows.answer_length] * 3


def test_a_tokenizer_without_a_chat_template_ends_answers_with_its_eos(task):
    import copy

    from quality.text.domains import build_domain

    plain = copy.deepcopy(task.tokenizer)
    plain.chat_template = None
    rows = encode_domain(build_domain("code", SMALL), plain).train
    start = int(rows.prompt_lengths[0])
    prompt = plain.decode(rows.input_ids[0, :start])
    assert f"### Instruction:\n{rows.questions[0].text}\n\n### Response:\n" in prompt
