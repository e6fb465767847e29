"""Texts that a tokenizer can't read are refused, or told, before anything is trained on them."""

from __future__ import annotations

import logging

import pytest

from nara_diffusion.dllm import encode_records
from nara_diffusion.dllm.data.records import normalized
from tests.dllm.data.word_tokenizers import count_texts, word_tokenizer


def records(*pairs: tuple[str, str]):
    return normalized([{"instruction": q, "output": a} for q, a in pairs], source="test")


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [("w3 w4", "w5"), ("w6", "ja nein w7 doch")],
            r"60 % of the tokens of outputs are \[UNK\], .*such as of 'ja nein w7 doch'",
        ),
        (
            [("w3 was ist", "w5 w6 w7 w8"), ("wer", "w8 w9 w10 w11")],
            r"75 % of the tokens of questions are \[UNK\], .*'wer'",
        ),
    ],
)
def test_encode_records_with_mostly_unknown_words_is_refused(declared: bool, pairs: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_records(records(*pairs), word_tokenizer(declared=declared), max_length=64)


def test_encode_records_with_unknown_words_in_the_second_part_of_questions_is_refused() -> None:
    rows = normalized([{"instruction": "w3", "input": "was ist das", "output": "w4"}], source="test")
    with pytest.raises(ValueError, match=r"75 % of the tokens of questions are \[UNK\]"):
        encode_records(rows, word_tokenizer(), max_length=64)


def test_encode_records_with_some_unknown_words_warns_with_share_and_example(caplog: pytest.LogCaptureFixture) -> None:
    many = [("w3 w4", "w5 w6 w7 w8 w9")] * 9 + [("w3 w4", "w5 w6 ach w8 w9")]
    with caplog.at_level(logging.WARNING):
        encode_records(records(*many), word_tokenizer(), max_length=64)
    (message,) = [text for text in caplog.messages if "[UNK]" in text]
    assert message.startswith("2 % of the tokens of outputs are [UNK]")
    assert "'w5 w6 ach w8 w9'" in message


def test_encode_records_with_known_words_or_hardly_an_unknown_one_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    many = [("w3 w4", "w5 w6 w7 w8 w9")] * 30 + [("w3 w4", "w5 w6 ach w8 w9")]  # 0.6 %
    with caplog.at_level(logging.WARNING):
        assert len(encode_records(records(*many), word_tokenizer(), max_length=64).rows) == 31
    assert caplog.messages == []


def test_encode_records_with_unknown_words_is_refused_before_all_are_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = word_tokenizer()
    seen = count_texts(monkeypatch, tokenizer)
    with pytest.raises(ValueError, match=r"of 20000 records, 1000 of which were looked at"):
        encode_records(records(*[("w3", "ja")] * 20_000), tokenizer, max_length=64)
    assert sum(seen) <= 3000


@pytest.mark.parametrize(("question", "output"), [("w3 [MASK]", "w4"), ("w3", "w4 [MASK] w5")])
def test_encode_records_with_the_mask_token_in_a_text_is_refused(question: str, output: str) -> None:
    with pytest.raises(ValueError, match=r"the record 'w3.* holds the mask token \(\d+\)"):
        encode_records(records(("w3", "w4"), (question, output)), word_tokenizer(), max_length=64)
