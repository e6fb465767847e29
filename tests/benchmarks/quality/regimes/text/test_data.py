"""What the text regimes learn from and are measured on."""

import pytest
import torch
from quality.images.held_out import BINS
from quality.regimes.text.data import EACH_BIN, TRAIN, determined_data, open_data
from quality.regimes.text.models import load
from quality.text.domains import DOMAINS
from quality.text.families import is_right


@pytest.mark.parametrize("data_of", [open_data, determined_data])
def test_held_out_questions_fill_the_bins_and_are_not_learnt_from(data_of):
    data = data_of()
    assert (len(data.train), len(data.held_out)) == (TRAIN, BINS * EACH_BIN)
    learnt = {question.text for question in data.train.questions}
    held_out = {question.text for question in data.held_out.questions}
    assert (len(learnt), len(held_out)) == (TRAIN, BINS * EACH_BIN)
    assert not learnt & held_out


def test_open_answers_are_random_characters_in_tokens_of_the_noise():
    data = open_data()
    answers = [question.answer for question in (*data.train.questions, *data.held_out.questions)]
    assert {len(answer) for answer in answers} == {8}
    assert len(set(answers)) == len(answers)
    for place in range(8):  # each as often in each place, and beside each other one
        assert len({answer[place] for answer in answers}) == 36
    assert len({answer[:2] for answer in answers}) > 0.99 * 36**2
    end = load("llada-tiny")[1].convert_tokens_to_ids("<|eot_id|>")
    for rows in (data.train, data.held_out):  # a token a character, and the end
        assert rows.answer_length == 9
        assert set(rows.input_ids[torch.arange(len(rows)), rows.prompt_lengths + 8].tolist()) == {end}
    counts = [sum(answer.count(letter) for answer in answers) for letter in set("".join(answers))]
    assert len(counts) == 36
    assert max(counts) < 1.2 * min(counts)


def test_determined_answers_are_right_and_each_bin_has_every_family():
    data = determined_data()
    families = {family for names in DOMAINS.values() for family in names}
    for start in range(0, len(data.held_out), EACH_BIN):
        part = data.held_out.questions[start : start + EACH_BIN]
        assert {question.family for question in part} == families
        assert all(is_right(question, question.answer) for question in part[:6])
