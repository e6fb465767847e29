"""Records as token ids, and rows as batches."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nara_diffusion.dllm import AnswerCollator, encode_prompts, encode_records, mask_answers, prompt_text
from nara_diffusion.dllm.data.records import normalized
from tests.dllm.data.word_tokenizers import count_texts
from tests.dllm.models.llada_reference import save_tokenizer

END = 1


def records(*pairs: tuple[str, str]):
    return normalized([{"instruction": q, "output": a, "answer": a} for q, a in pairs], source="test")


@pytest.fixture(params=[False, True], ids=["plain", "chat"])
def chat(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def tokenizer(tmp_path: Path, chat: bool) -> PreTrainedTokenizerBase:
    save_tokenizer(tmp_path, 40, chat=chat)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_prompt_answer_and_end(tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    rows = encode_records(records(("w5 w6", "w7 w8 w9")), tokenizer, max_length=64).rows
    row = rows[0]
    prompt, answer = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
    assert (row["instruction"], row["answer"]) == ("w5 w6", "w7 w8 w9")
    if chat:
        assert prompt == [2, 5, 6, 3, 4]
        assert answer == [7, 8, 9, 3, END]  # the turn as the template closes it
    else:
        assert prompt == tokenizer(prompt_text(tokenizer, "w5 w6"))["input_ids"]
        assert "### Instruction:\nw5 w6\n\n### Response:" in prompt_text(tokenizer, "w5 w6")
        assert "### Input:\nw7" in prompt_text(tokenizer, "w5", "w7")
        assert answer == [7, 8, 9, END]
    assert encode_prompts(tokenizer, [prompt_text(tokenizer, "w5 w6")]) == [prompt]


def test_a_chat_template_that_fails_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('not so') }}"
    with pytest.raises(ValueError, match=r"chat template refuses the turns 'user' \(not so\)"):
        encode_records(records(("w5", "w7")), tokenizer, max_length=64)


def test_encoders_tokenizers_open_a_prompt_and_don_t_close_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]")
    row = encode_records(records(("a", "b a")), tokenizer, max_length=64).rows[0]
    assert (row["input_ids"][0], row["input_ids"][row["prompt_length"] :]) == (1, [4, 3, 2])
    assert 2 not in row["input_ids"][: row["prompt_length"]]


@pytest.mark.parametrize("chat", [True], indirect=True)
def test_a_template_whose_turns_don_t_continue_its_prompt_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("else 'w4 '", "else 'w6 '")
    with pytest.raises(ValueError, match=r"begins an answer with 'w4 ' as generation prompt, .* 'w6 w7 w8"):
        encode_records(records(("w5", "w7 w8")), tokenizer, max_length=64)


@pytest.mark.parametrize("chat", [True], indirect=True)
def test_what_is_cut_and_dropped_is_counted_and_logged(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    source = records(("w5", "w7 w8"), ("w5", "w7 w8 w9 w10 w11"), ("w5 w5 w5 w5 w5", "w7"))
    with caplog.at_level(logging.WARNING):
        encoded = encode_records(source, tokenizer, max_length=8)
    assert (encoded.total, len(encoded.rows), encoded.truncated, encoded.dropped) == (3, 2, 1, 1)
    assert "3 records: 2 kept, 1 of them cut, 1 dropped" in caplog.text
    assert [len(row["input_ids"]) for row in encoded.rows] == [8, 8]
    assert [row["input_ids"][-1] == END for row in encoded.rows] == [True, False]
    with pytest.raises(
        ValueError, match=r"none of 3 records is left: their prompts alone have 4 tokens \(max_length\)"
    ):
        encode_records(source, tokenizer, max_length=4)


ROWS = [
    {"input_ids": [5, 6, 7, END], "prompt_length": 2},
    {"input_ids": [5, 6, 7, 8, 9, 10, END], "prompt_length": 1},
    {"input_ids": [5, 6, 7, 8, 9, 10, 11, 12], "prompt_length": 5},  # cut: no end
]


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({}, [8, 8, 8]),
        ({"trained_padding": 0}, [4, 7, 8]),
        ({"trained_padding": 2}, [6, 9, 8]),
        ({"trained_padding": 2, "max_length": 8}, [6, 8, 8]),
        ({"trained_padding": "max_length", "max_length": 10}, [10, 10, 8]),
        ({"trained_padding": "gen_length", "gen_length": 7, "max_length": 8}, [9, 8, 8]),
    ],
)
def test_how_much_padding_is_trained_on(options: dict, ends: list[int]) -> None:
    batch = AnswerCollator(END, **options)(ROWS)
    assert batch["prompt_lengths"].tolist() == [2, 1, 5]
    assert batch["answer_lengths"].tolist() == [end - start for end, start in zip(ends, [2, 1, 5], strict=True)]
    assert batch["input_ids"].shape == (3, max(ends))
    whole = AnswerCollator(END, **options)(ROWS[:2])  # rows that end, and so are padded
    assert whole["input_ids"].shape[1] == AnswerCollator(END, **options).padded_length(7, 2)
    for row, expected in zip(batch["input_ids"].tolist(), ROWS, strict=True):
        length = len(expected["input_ids"])
        assert row == expected["input_ids"] + [END] * (max(ends) - length)
    masked = mask_answers(**batch, mask_token_id=39, noise_level=1.0, seed=0)
    assert [int(row.nonzero().max()) + 1 for row in masked.masked] == ends


def test_positions_in_the_stream_become_sample_indices() -> None:
    batch = AnswerCollator(END)([row | {"position": 7 + i} for i, row in enumerate(ROWS)])
    assert torch.equal(batch["sample_indices"], torch.tensor([7, 8, 9]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained_padding": "all"}, "trained_padding is 'all'"),
        ({"trained_padding": -1}, "trained_padding is -1"),
        ({"trained_padding": "max_length"}, "needs max_length"),
        ({"trained_padding": "gen_length"}, "needs gen_length"),
    ],
)
def test_collator_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnswerCollator(END, **options)


def many(count: int, output: str):
    return records(*[("w5", output)] * count)


@pytest.mark.parametrize("chat", [True], indirect=True)
def test_encode_records_with_too_small_a_max_length_is_refused_before_all_are_tokenised(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_texts(monkeypatch, tokenizer)
    message = r"none of a sample of 1000 of 20000 records is left: their prompts alone have 4 tokens \(max_length\)"
    with pytest.raises(ValueError, match=message + r".*; 9 of 10 records have 8 tokens or fewer"):
        encode_records(many(20_000, "w7 w8"), tokenizer, max_length=4)
    assert sum(seen) <= 5000


@pytest.mark.parametrize("chat", [True], indirect=True)
def test_encode_records_with_a_max_length_that_cuts_warns_before_all_are_tokenised(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_texts(monkeypatch, tokenizer)
    told: list[tuple[str, int]] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append((record.getMessage(), sum(seen)))
    logging.getLogger("nara_diffusion.dllm.data.encoding").addHandler(handler)
    try:
        # prompt: 4 tokens; answer and its two ends: 8
        encoded = encode_records(many(5_000, "w7 w8 w9 w10 w11 w12"), tokenizer, max_length=6)
    finally:
        logging.getLogger("nara_diffusion.dllm.data.encoding").removeHandler(handler)
    (first, texts), (last, _) = told
    assert first.startswith("a sample of 1000 of 5000 records: 1000 kept, 1000 of them cut, 0 dropped; ")
    assert first.endswith("max_length 6 holds 25 % of their answers' tokens; 9 of 10 records have 12 tokens or fewer")
    assert texts <= 5000
    assert last.startswith("5000 records: 5000 kept, 5000 of them cut, 0 dropped; max_length 6 holds 25 %")
    assert (len(encoded.rows), encoded.truncated) == (5000, 5000)


@pytest.mark.parametrize("chat", [True], indirect=True)
def test_encode_records_that_fit_says_nothing_and_keeps_their_order(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    source = records(*((f"w{5 + i % 30}", f"w{5 + i % 31}") for i in range(2500)))
    with caplog.at_level(logging.WARNING):
        encoded = encode_records(source, tokenizer, max_length=7)
    assert [row["input_ids"] for row in encoded.rows] == [
        [2, 5 + i % 30, 3, 4, 5 + i % 31, 3, END] for i in range(2500)
    ]
    assert caplog.messages == []
