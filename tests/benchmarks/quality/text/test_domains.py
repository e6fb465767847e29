from collections import Counter

import pytest
from quality.text.domains import DOMAINS, MAX_ANSWER, MAX_QUESTION, PARTS, Sizes, build_domain, sizes_of

SMALL = Sizes(train=60, tuning=10, validation=20, test=8)


@pytest.mark.parametrize("name", DOMAINS)
def test_no_question_occurs_twice_and_families_take_turns(name):
    domain = build_domain(name, SMALL)
    everything = [question for part in PARTS for question in getattr(domain, part)]
    assert len({question.text for question in everything}) == len(everything) == 98
    assert [len(getattr(domain, part)) for part in PARTS] == [60, 10, 20, 8]
    assert max(len(question.text) for question in everything) <= MAX_QUESTION
    assert max(len(question.answer) for question in everything) <= MAX_ANSWER
    counts = Counter(question.family for question in domain.train)
    assert set(counts) == set(DOMAINS[name])
    assert min(counts.values()) >= 60 / len(DOMAINS[name]) * 0.6


def test_what_is_held_out_does_not_depend_on_what_is_learned_from():
    many = build_domain("code", Sizes(train=200, tuning=10, validation=20, test=8))
    few = build_domain("code", SMALL)
    for part in ("tuning", "validation", "test"):
        assert getattr(many, part) == getattr(few, part)
    assert many.train[:60] == few.train


def test_a_family_alone_is_a_domain():
    domain = build_domain("chain_sum", SMALL)
    assert {question.family for question in domain.train} == {"chain_sum"}


def test_unknown_names_and_too_small_families_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="domain is 'maths', expected one of commonsense, arithmetic, code, or a family"
    ):
        build_domain("maths", SMALL)
    monkeypatch.setattr("quality.text.domains.PATIENCE", 10)
    monkeypatch.setattr("quality.text.domains.fits", lambda question: False)
    with pytest.raises(ValueError, match="there are only 0 different questions: ask for fewer than 3"):
        build_domain("chain_sum", Sizes(train=1, tuning=1, validation=1, test=3))


def test_sizes_come_from_the_command_line_as_a_mapping():
    assert sizes_of({"train": 7}) == Sizes(train=7)
    assert sizes_of(SMALL) is SMALL
    with pytest.raises(ValueError, match=r"sizes is \{'rows': 3\}, expected a number of questions for any of train"):
        sizes_of({"rows": 3})
    with pytest.raises(ValueError, match="sizes is"):
        sizes_of({"train": 0})
