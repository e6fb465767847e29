"""Files of adapters that convert a model, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.pipelines.converted import SCHEDULERS, converted


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a conversion of each kind; "constant" is one to v that doesn't depend on λ."""
    saved = {kind: tmp_path_factory.mktemp(kind) for kind in (*SCHEDULERS, "constant")}
    for number, kind in enumerate(SCHEDULERS):
        converted(kind, seed=1 + number).save_nara_weights(saved[kind])
    converted("v", core_type="constant", core_init="kaiming").save_nara_weights(saved["constant"])
    return saved


@pytest.fixture
def flow(folders) -> Any:
    """A pipeline into which "flow" was loaded."""
    pipe = small_sdxl()
    pipe.load_nara_weights(folders["flow"], "flow")
    return pipe
