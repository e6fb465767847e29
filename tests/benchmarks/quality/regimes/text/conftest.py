"""A few open questions on the shipped models."""

from itertools import islice

import pytest
from quality.images.held_out import BINS
from quality.regimes.text.data import TextData, open_questions
from quality.regimes.text.models import load
from quality.text.data import encode_domain
from quality.text.domains import Domain

TRAIN, EACH_BIN = 20, 3


@pytest.fixture(scope="session")
def text_data() -> TextData:
    questions = open_questions(1)
    sizes = {"train": TRAIN, "tuning": 1, "validation": BINS * EACH_BIN, "test": 1}
    domain = Domain(**{part: list(islice(questions, size)) for part, size in sizes.items()})
    encoded = encode_domain(domain, load("uniform-tiny")[1])
    return TextData(encoded.train, encoded.validation)
