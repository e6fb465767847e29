"""The files of the package that λ passes, in order, from its context or timestep to a layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nara_diffusion
from nara_diffusion import noise_level, register_denoiser
from tests.helpers.adapted import OneLayer, adapted

PACKAGE = Path(nara_diffusion.__file__).parent


def files_in_order(call: Callable[[], Any]) -> list[str]:
    """The files whose functions are called from another file of the package, or from outside, in order."""
    entries: list[str] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or not path.is_relative_to(PACKAGE):
            return
        caller = frame.f_back
        while caller is not None and not Path(caller.f_code.co_filename).is_relative_to(PACKAGE):
            caller = caller.f_back
        if caller is None or caller.f_code.co_filename != frame.f_code.co_filename:
            entries.append(str(path.relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [file for file, _ in groupby(entries)]


class Denoiser(OneLayer):
    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        return self.layer(x)


HOOK_TO_LAYER = ["rows", "core", "variants", "channel", "functional"]


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.usefixtures("_registry")
def test_noise_level_enters_no_file_twice_before_layer(is_trained: bool):
    register_denoiser("Denoiser", "discrete")
    root = adapted(Denoiser(nn.Linear(7, 5)), target_modules=["layer"], noise_level_per="sample").base_model.model
    x, timestep = torch.randn(3, 7), torch.tensor([10, 500, 900])
    first_hook = ["holder", *["checkpointing"] * is_trained, "finder"]

    def under_context() -> None:
        with noise_level(root, [0.1, 0.5, 0.9]):
            root(x)

    with torch.set_grad_enabled(is_trained):
        by_context = files_in_order(under_context)
        by_timestep = files_in_order(lambda: root(x, timestep=timestep))
    by_context, by_timestep = ([Path(file).stem for file in files] for files in (by_context, by_timestep))
    assert by_context == ["context", "level", *first_hook, *HOOK_TO_LAYER, "holder", "context"]  # both take λ away
    assert by_timestep == [*first_hook, "timesteps", "level", *HOOK_TO_LAYER, "holder"]
