"""Short questions against the generators that they come from."""

import re
from itertools import islice

import pytest
from quality.text.domains import fits
from quality.text.families import FAMILIES, Question, is_right, questions


def some(name: str, count: int = 40) -> list[Question]:
    return list(islice(filter(fits, questions(name, seed=4)), count))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_right_answer_is_right_in_the_generators_own_form(name):
    family = FAMILIES[name]
    for question in some(name):
        restored = family.restore(question.answer, question.item)
        assert re.fullmatch(family.shape, question.answer), question
        if name not in ("number_sorting", "palindrome_generation", "letter_jumble"):
            assert restored.split() == question.item["answer"].split()
        # by the verifier, which `is_right` doesn't ask where the answer is the very one
        assert is_right(Question(name, question.text, "not it", question.item), question.answer), question


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_answer_is_wrong(name):
    for question in some(name, 20):
        first = question.answer[0]
        other = next(c for c in "zb31AB" if re.fullmatch(FAMILIES[name].shape, c) or c in "31")
        wrong = ("4" if other == first else other) + question.answer[1:] + question.answer[-1:] * 2
        assert not is_right(question, wrong), (question, wrong)
        assert not is_right(question, "")


def test_questions_are_the_generators_cut_to_one_line():
    spiral = some("spiral_matrix", 1)[0]
    matrix = spiral.item["metadata"]["matrix"]
    assert spiral.text == "rotate then: " + "".join(str(n) for row in matrix for n in row)
    (a, b, c), (d, e, f), (g, h, i) = matrix
    assert spiral.answer == "".join(map(str, (a, b, c, f, i, h, g, d, e)))
    total = some("chain_sum", 1)[0]
    assert int(total.answer) == eval(total.text.removeprefix("add: "))
    program = some("ab", 1)[0]
    rules = {"Aa": "", "Ab": "bA", "Ba": "aB", "Bb": ""}
    text = program.text.removeprefix("copy then: ")
    while match := re.search("|".join(rules), text):
        text = text[: match.start()] + rules[match[0]] + text[match.end() :]
    assert program.answer == text


def test_every_right_answer_counts():
    item = {"answer": "abccba", "metadata": {"letters": list("aabbcc")}}
    question = Question("palindrome_generation", "sort palindrome: aabbcc", "abccba", item)
    assert is_right(question, "cabbac")
    assert not is_right(question, "cabbab")
    assert not is_right(question, "aaccaa")


def test_what_a_model_writes_is_never_run(monkeypatch):
    called = []
    monkeypatch.setattr("builtins.exit", lambda *args: called.append(args))
    for name in FAMILIES:
        assert not is_right(some(name, 1)[0], "exit()")
    assert called == []


def test_two_seeds_share_no_item_and_one_seed_repeats_itself():
    first, again = (list(islice(questions("chain_sum", 1), 300)) for _ in range(2))
    other = list(islice(questions("prime_factorization", 2), 300))
    assert first == again
    known = {question.text for question in islice(questions("prime_factorization", 1), 300)}
    assert len(known & {question.text for question in other}) < 30
