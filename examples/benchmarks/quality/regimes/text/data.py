"""The questions of the text regimes: what is learnt from, and what the loss is measured on, which no training sees."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice

from quality.images.held_out import BINS
from quality.text.data import Rows, encode_domain
from quality.text.domains import DOMAINS, PARTS, Domain, Question, Sizes, build_domain
from quality.text.runs import load

EACH_BIN = 120  # held-out questions
TRAIN = 6000
SEED = 5  # of the open questions
LENGTH = 8  # characters of an open answer
CHARACTERS = string.ascii_lowercase + string.digits

_TOKENIZER = "llada-tiny"  # uniform-tiny has the same


@dataclass(frozen=True)
class TextData:
    """Attributes:
    train: what is learnt from.
    held_out: BINS · n questions: the first n are of the first bin of λ, and so on.
    """

    train: Rows
    held_out: Rows


@cache
def determined_data() -> TextData:
    """The three domains of the text benchmark, whose questions take turns: the prompt determines the answer."""
    count = len(DOMAINS)
    sizes = Sizes(train=TRAIN // count, tuning=1, validation=BINS * EACH_BIN // count, test=1)
    domains = [build_domain(name, sizes) for name in DOMAINS]
    parts = {part: zip(*(getattr(domain, part) for domain in domains), strict=True) for part in PARTS}
    return _encoded(Domain(**{part: list(chain.from_iterable(questions)) for part, questions in parts.items()}))


@cache
def open_data() -> TextData:
    """Random characters: neither the prompt nor the rest of an answer says anything of a character."""
    questions = open_questions(SEED)
    sizes = {"test": 1, "validation": BINS * EACH_BIN, "tuning": 1, "train": TRAIN}
    return _encoded(Domain(**{part: list(islice(questions, size)) for part, size in sizes.items()}))


def open_questions(seed: int) -> Iterator[Question]:
    """ "code 41352" → "k7rqx0d3": questions without end, none of which comes twice."""
    rng = random.Random(seed)
    for number in rng.sample(range(10000, 100000), 90000):
        yield Question("code", f"code {number}", "".join(rng.choices(CHARACTERS, k=LENGTH)), {})


def _encoded(domain: Domain) -> TextData:
    encoded = encode_domain(domain, load(_TOKENIZER)[1])
    return TextData(encoded.train, encoded.validation)
