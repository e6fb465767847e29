import pytest
from quality.text.domains import Sizes
from quality.text.runs import Task, load_task

SMALL = Sizes(train=80, tuning=20, validation=30, test=8)


@pytest.fixture(scope="session")
def task() -> Task:
    """The code domain of the shipped model, a few questions of it."""
    return load_task("llada-tiny", "code", SMALL)
