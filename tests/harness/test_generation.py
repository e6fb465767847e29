"""What task files and --gen_kwargs say, as settings of the sampler."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nara_diffusion.harness.generation import contradiction, cut, read_gen_kwargs

GREEDY = {"temperature": 0.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"gen_length": 256, **GREEDY}),
        ({"max_gen_toks": 32}, {"gen_length": 32, **GREEDY}),
        ({"max_new_tokens": 7, "max_tokens": 9}, {"gen_length": 7, **GREEDY}),
        ({"gen_length": 64, "max_gen_toks": 32}, {"gen_length": 64, **GREEDY}),
        ({"gen_length": 64.0, "steps": 8}, {"gen_length": 64, "steps": 8, **GREEDY}),
        ({"gen_length": 64, "block_length": 32}, {"gen_length": 64, "block_length": 32, **GREEDY}),
        ({"do_sample": False, "temperature": 0.8, "top_p": 0.9, "num_beams": 4}, {"gen_length": 256, **GREEDY}),
        ({"temperature": 0.8, "top_p": 1.0}, {"gen_length": 256, "temperature": 0.8}),
        ({"do_sample": True, "temperature": 0.8}, {"gen_length": 256, "temperature": 0.8}),
        ({"cfg_scale": 1}, {"gen_length": 256, "cfg_scale": 1.0, **GREEDY}),
        ({"remasking": "random"}, {"gen_length": 256, "remasking": "random", **GREEDY}),
        ({"confidence_threshold": 0.9, "steps": None}, {"gen_length": 256, "confidence_threshold": 0.9, **GREEDY}),
    ],
)
def test_settings(given: dict[str, Any], expected: dict[str, Any]) -> None:
    how = read_gen_kwargs({**given, "until": ["x"]})
    assert dict(how.sampling) == expected
    assert how.until == ("x",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 0.9, "temperature": 1.0}, r"top_p=0.9, .* --gen_kwargs top_p=1$"),
        ({"stepps": 3}, "gen_kwargs has stepps; the sampler's settings are gen_length, steps"),
        ({"steps": "many"}, "steps='many', expected a whole number"),
        ({"steps": 2.5}, "steps=2.5, expected a whole number"),
        ({"remasking": 3}, "remasking=3, expected a word"),
        ({"steps": [3]}, r"steps=\[3\], expected a whole number"),
        ({"steps": float("inf")}, "steps=inf, expected a whole number"),
        ({"cfg_scale": [1.0]}, r"cfg_scale=\[1\.0\], expected a number"),
        ({"max_gen_toks": "many"}, "max_gen_toks='many', expected a whole number"),
        ({"gen_length": 10, "block_length": 4}, "block_length 4 doesn't divide gen_length 10"),
        ({"remasking": "high"}, "remasking is 'high', expected one of"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_gen_kwargs(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, None),
        ({"temperature": 0.7}, None),
        ({"do_sample": False}, None),
        ({"do_sample": False, "temperature": 0.0}, None),
        ({"do_sample": True, "temperature": 0.7}, None),
        (
            {"do_sample": False, "temperature": 0.7},
            "temperature=0.7, .* do_sample=False: add --gen_kwargs do_sample=True",
        ),
        ({"do_sample": True}, "do_sample=True, .* temperature=0 .* --gen_kwargs temperature=0.7"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True, .* temperature=0 .* --gen_kwargs temperature=0.7"),
    ],
)
def test_a_contradiction_is_told(given: dict[str, Any], message: str | None) -> None:
    told = contradiction(given)
    assert told is None if message is None else re.search(message, str(told))


def test_equal_settings_compare_equal_whatever_their_order() -> None:
    one = read_gen_kwargs({"steps": 8, "gen_length": 16, "until": ["a"]})
    assert one == read_gen_kwargs({"until": "a", "gen_length": 16, "steps": 8})
    assert one != read_gen_kwargs({"until": "a", "gen_length": 16, "steps": 4})


def test_a_text_is_cut_at_the_first_stop() -> None:
    assert cut("a b c", ("c", "b")) == "a "
    assert cut("a b c", ("",)) == "a b c"
    assert cut("a b c", ()) == "a b c"
    assert cut("abc", ("a",)) == ""
