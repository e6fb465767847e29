"""What every test shares: no network, one thread, fixed seeds, and a small masked-diffusion backbone."""

# ruff: noqa: E402  (what the first statements set is read by imports)
import gc
import os

# The environment is read when torch and the Hugging Face libraries are imported, so it is set before them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "True"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until the tests are collected: what imports make is kept

import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from nara_diffusion.cores.registry import CUSTOM
from nara_diffusion.noise.denoisers import _DENOISERS
from nara_diffusion.utils.files import atomic_write
from tests.acceptance._text import backbone
from tests.helpers.process_state import fail_if_left, process_state


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """The garbage collector skips what has been imported, and runs less often: it took 7 % of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    gc.enable()


@pytest.fixture(autouse=True)
def _test_leaves_the_process_as_it_was() -> Iterator[None]:
    """Inside all wider fixtures, whose changes last longer than a test; so may the workers of their pools."""
    original = process_state()
    yield
    fail_if_left(original)


@pytest.fixture(scope="session", autouse=True)
def _data_sets_in_a_folder_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` caches isn't put among the user's; programs that tests start find the folder too."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", Path(folder))
        yield


PLOTS = {
    "nara_diffusion.training.report": "plot_noise_level_curves",
    "nara_diffusion.dreambooth.image_report": "write_grid",
    "nara_diffusion.dreambooth.fidelity": "write_grid",
}
"""{module: what it draws with}."""


@pytest.fixture(scope="session", autouse=True)
def _runs_write_their_plots_empty() -> Iterator[None]:
    """Drawing takes half of a short run. The drawings: tests/training/test_report.py, dreambooth/test_samples.py."""
    with pytest.MonkeyPatch.context() as patch:
        for module, function in PLOTS.items():
            if module in sys.modules:
                patch.setattr(sys.modules[module], function, _write_empty)
        yield


@pytest.fixture(scope="session", autouse=True)
def _templates_of_cards_are_compiled_once() -> Iterator[None]:
    """huggingface_hub compiles PEFT's template anew for each adapter that is saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jinja2.Template", cache(jinja2.Template))
        yield


def _write_empty(path: Path, *_: Any, **__: Any) -> None:
    with atomic_write(path) as partial:
        partial.touch()


@pytest.fixture(autouse=True)
def _same_draws_in_every_test() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test read the legacy global state)
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return backbone(50)


@pytest.fixture
def _custom_cores() -> Iterator[None]:
    """A test starts without custom cores, and its own are forgotten after it."""
    original = dict(CUSTOM)
    CUSTOM.clear()
    yield
    CUSTOM.clear()
    CUSTOM.update(original)


@pytest.fixture
def _registry() -> Iterator[None]:
    """What a test declares of denoisers is forgotten after it."""
    original = dict(_DENOISERS)
    yield
    _DENOISERS.clear()
    _DENOISERS.update(original)
